"""Splits: by case, stratified, the same whatever the order of the rows."""

import logging
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acmil.cohort import Cohort, CohortError, CohortRow, read_cohort
from acmil.splits import SPLIT_COLUMNS, assign_splits, check_splits, split_rows, write_splits

PATH = Path("cohort.csv")


def cohort_of(*rows: tuple[str, str, str, str | None]) -> Cohort:
    return Cohort(tuple(CohortRow(*row) for row in rows), True, PATH)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Cases of one label each, at least three a class, one to four slides a case, rows in any order."""
    rows = []
    for label in range(draw(st.integers(2, 4))):
        for case in range(draw(st.integers(3, 25))):
            n_slides = draw(st.integers(1, 4))
            rows += [CohortRow(f"s{label}-{case}-{i}", str(label), f"p{label}-{case}", None) for i in range(n_slides)]
    return Cohort(tuple(draw(st.permutations(rows))), True, PATH)


@given(cohorts(), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 2**32))
def test_laws(cohort: Cohort, val_fraction: float, test_fraction: float, seed: int) -> None:
    result = assign_splits(cohort, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    assert [row.with_split(None) for row in result.rows] == list(cohort.rows)
    split_of: dict[str, set[str | None]] = defaultdict(set)
    for row in result.rows:
        split_of[row.case_id].add(row.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    for label in cohort.classes:
        cases = {row.case_id for row in cohort.rows if row.label == label}
        for name, fraction in (("val", val_fraction), ("test", test_fraction)):
            n_drawn = sum(split_of[case] == {name} for case in cases)
            assert abs(n_drawn - fraction * len(cases)) <= 1
            assert (n_drawn >= 1) == (fraction > 0)
        assert any(split_of[case] == {"train"} for case in cases)
    if val_fraction > 0:
        check_splits(result)


@given(cohorts(), st.integers(0, 100), st.randoms())
def test_order_of_rows_does_not_matter(cohort: Cohort, seed: int, random: object) -> None:
    shuffled = list(cohort.rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    options = {"val_fraction": 0.2, "test_fraction": 0.3, "seed": seed}
    first = assign_splits(cohort, **options)
    second = assign_splits(Cohort(tuple(shuffled), True, PATH), **options)
    assert {row.slide_id: row.split for row in first.rows} == {row.slide_id: row.split for row in second.rows}


def numbered(n_cases: int) -> Cohort:
    return cohort_of(*((f"s{i}", str(i % 2), f"p{i}", None) for i in range(n_cases)))


def test_draw_is_fixed_for_good() -> None:
    result = assign_splits(numbered(12), val_fraction=0.25, test_fraction=0.25, seed=0)
    letters = "".join((row.split or "-")[1] for row in result.rows)  # r train, a val, e test
    assert letters == "aaearrrraeee"


def test_seed_changes_the_draw_and_val_fraction_does_not_change_the_test_set() -> None:
    def test_set(seed: int, val_fraction: float) -> set[str]:
        result = assign_splits(numbered(60), val_fraction=val_fraction, test_fraction=0.2, seed=seed)
        return {row.slide_id for row in result.rows if row.split == "test"}

    assert len(test_set(0, 0.1)) == 12
    assert test_set(0, 0.1) == test_set(0, 0.3)
    assert test_set(0, 0.1) != test_set(1, 0.1)


def test_case_with_two_labels_counts_for_the_rarer() -> None:
    """Every patient has normal slides, some have a tumour slide: the tumour patients are spread over the splits."""
    rows = [(f"p{i}-n{k}", "normal", f"p{i}", None) for i in range(30) for k in range(3)]
    rows += [(f"p{i}-t", "tumour", f"p{i}", None) for i in range(10)]
    result = assign_splits(cohort_of(*rows), val_fraction=0.2, test_fraction=0.2, seed=3)
    tumour = [row.split for row in result.rows if row.label == "tumour"]
    assert (tumour.count("val"), tumour.count("test"), tumour.count("train")) == (2, 2, 6)
    normal = [row.split for row in result.rows if row.label == "normal"]
    assert (normal.count("val"), normal.count("test"), normal.count("train")) == (18, 18, 54)


def test_too_few_cases_names_class_and_need() -> None:
    rows = [(f"a{i}", "a", f"a{i}", None) for i in range(9)] + [(f"b{i}", "b", f"b{i // 2}", None) for i in range(4)]
    with pytest.raises(CohortError, match="needs at least 3 cases to be in 3 splits, class 'b' has 2"):
        assign_splits(cohort_of(*rows), val_fraction=0.2, test_fraction=0.2, seed=0)
    result = assign_splits(cohort_of(*rows), val_fraction=0.2, test_fraction=0, seed=0)
    assert {row.split for row in result.rows if row.label == "b"} == {"train", "val"}


def test_class_that_the_draw_leaves_out_of_a_split_is_an_error() -> None:
    """Class a has three patients, but two of them count for the rarer class b and may land anywhere."""
    rows = [(f"a{i}", "a", "p0", None) for i in range(20)] + [(f"b{i}", "b", f"q{i}", None) for i in range(8)]
    rows += [(f"{label}-m{i}", label, f"m{i}", None) for label in "ab" for i in range(2)]
    with pytest.raises(CohortError, match="class 'a' has no case for 'test'"):
        assign_splits(cohort_of(*rows), val_fraction=0.1, test_fraction=0.1, seed=0)


@pytest.mark.parametrize(("val_fraction", "test_fraction"), [(0.5, 0.5), (-0.1, 0.2), (1.0, 0.0), (0.2, 1.5)])
def test_fractions_must_leave_training(val_fraction: float, test_fraction: float) -> None:
    with pytest.raises(ValueError, match=f"got {val_fraction} and {test_fraction}"):
        assign_splits(numbered(20), val_fraction=val_fraction, test_fraction=test_fraction, seed=0)


def test_labels_are_needed() -> None:
    rows = (CohortRow("s1", "a", "s1", "train"), CohortRow("s2", None, "s2", "val"))
    for action in (check_splits, lambda c: assign_splits(c, val_fraction=0.1, test_fraction=0, seed=0)):
        with pytest.raises(CohortError, match="must have a label, 's2' has none, 1 in all"):
            action(Cohort(rows, False, PATH))


def test_leaking_case_is_named_with_its_slides() -> None:
    leaky = cohort_of(("s1", "a", "p1", "train"), ("s2", "b", "p2", "train"), ("s3", "a", "p1", "val"))
    with pytest.raises(CohortError, match=r"case 'p1' has s1 \(train\), s3 \(val\)"):
        check_splits(leaky)


def test_split_missing_for_a_slide() -> None:
    with pytest.raises(CohortError, match="must have a split, 's2' has none, 1 in all"):
        check_splits(cohort_of(("s1", "a", "p1", "train"), ("s2", "b", "p2", None)))


@pytest.mark.parametrize("empty", ["train", "val"])
def test_train_and_val_must_not_be_empty(empty: str) -> None:
    other = {"train": "val", "val": "train"}[empty]
    with pytest.raises(CohortError, match=f"split '{empty}' must have at least 1 slide"):
        check_splits(cohort_of(("s1", "a", "p1", other), ("s2", "b", "p2", "test")))


def test_training_needs_two_classes() -> None:
    rows = [("s1", "a", "p1", "train"), ("s2", "a", "p2", "train"), ("s3", "b", "p3", "val")]
    with pytest.raises(CohortError, match="training needs at least 2 classes, got 'a' in the 2 training slides"):
        check_splits(cohort_of(*rows))


def test_class_missing_from_a_split_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = [("s1", "a", "p1", "train"), ("s2", "b", "p2", "train"), ("s3", "b", "p3", "val")]
    with caplog.at_level(logging.WARNING):
        check_splits(cohort_of(*rows))
    assert caplog.messages == ["split 'val' has no slide of class 'a' (cohort.csv)"]


def test_written_splits_are_a_cohort_again(tmp_path: Path) -> None:
    cohort = assign_splits(numbered(10), val_fraction=0.2, test_fraction=0.2, seed=1)
    path = tmp_path / "splits.csv"
    write_splits(path, cohort)
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(SPLIT_COLUMNS) == "slide_id,case_id,label,split"
    assert read_cohort(path).rows == cohort.rows
    assert split_rows(cohort)[3] == ("s3", "p3", "1", cohort.rows[3].split)


def test_reference_cohort(shared_data: Path) -> None:
    """Camelyon16's list: 362 patients, 37 with two slides, 10 of those with both labels."""
    cohort = read_cohort(shared_data / "reference_formats" / "acmil" / "camelyon16.csv")
    result = assign_splits(cohort, val_fraction=0.1, test_fraction=0.3, seed=0)
    check_splits(result)
    sizes = {name: sum(row.split == name for row in result.rows) for name in ("train", "val", "test")}
    assert sum(sizes.values()) == 399
    assert abs(sizes["test"] - 0.3 * 399) < 8
    positive = sum(row.label == "1" for row in result.rows if row.split == "test")
    assert abs(positive / sizes["test"] - 160 / 399) < 0.04


def test_split_of_the_reference_by_slide_leaks_cases(shared_data: Path) -> None:
    """The published split 1 has patients of training in validation, which is refused with their names."""
    import json

    folder = shared_data / "reference_formats" / "acmil"
    names = json.loads((folder / "split_1.json").read_text())
    split_of = {slide: key.removesuffix("_names") for key, slides in names.items() for slide in slides}
    cohort = read_cohort(folder / "camelyon16.csv")
    rows = tuple(row.with_split(split_of[row.slide_id]) for row in cohort.rows if row.slide_id in split_of)
    with pytest.raises(CohortError, match=r"case 'patient_\d+' has .*\(train\).* 3 other cases leak too"):
        check_splits(Cohort(rows, True, cohort.path))
