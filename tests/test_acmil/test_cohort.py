"""The cohort table: what is read, and what is refused."""

from pathlib import Path

import pytest

from acmil.cohort import Cohort, CohortError, CohortRow, read_cohort


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "cohort.csv"
    path.write_bytes(text.encode(encoding))
    return path


def refusal(folder: Path, text: str, **options: bool) -> str:
    path = write(folder, text)
    with pytest.raises(CohortError) as caught:
        read_cohort(path, **options)
    assert "cohort.csv" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_columns_in_any_order_separator_line_end_and_byte_order_mark(
    tmp_path: Path, separator: str, line_end: str, encoding: str
) -> None:
    lines = [
        ["split", "label", '"site, ward; 2"', "slide_id", "case_id"],
        ["train", "tumör", "A", "007", "p1"],
        ["test", '"a, b; c"', "B", ' "no" ', "p2"],
    ]
    lines[2][3] = "0012 "
    cohort = read_cohort(write(tmp_path, line_end.join(map(separator.join, lines)) + line_end * 2, encoding))
    assert cohort.rows == (CohortRow("007", "tumör", "p1", "train"), CohortRow("0012", "a, b; c", "p2", "test"))
    assert cohort.has_cases
    assert cohort.path == tmp_path / "cohort.csv"


def test_case_defaults_to_slide_and_split_to_none(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, "\nslide_id;label\ns1;1\n\ns2.svs;0\n"))
    assert cohort.rows == (CohortRow("s1", "1", "s1", None), CohortRow("s2.svs", "0", "s2.svs", None))
    assert not cohort.has_cases


def test_empty_case_and_split_columns_are_as_absent_ones(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, "slide_id,label,case_id,split\ns1,1,,\ns2,0,,\n"))
    assert cohort.rows == (CohortRow("s1", "1", "s1", None), CohortRow("s2", "0", "s2", None))
    assert not cohort.has_cases


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "9", "-1", "1.5"], ("-1", "1.5", "9", "10")),
        (["10", "9", "benign"], ("10", "9", "benign")),
        (["nan", "2", "10"], ("10", "2", "nan")),
    ],
)
def test_classes_are_sorted_as_numbers_when_all_are(labels: list[str], classes: tuple[str, ...]) -> None:
    rows = tuple(CohortRow(str(i), label, str(i), None) for i, label in enumerate(labels))
    assert Cohort((*rows, CohortRow("x", None, "x", None)), False, Path("c.csv")).classes == classes


def test_without_labels(tmp_path: Path) -> None:
    assert read_cohort(write(tmp_path, "slide_id\ns1\n"), require_labels=False).rows[0].label is None
    mixed = read_cohort(write(tmp_path, "slide_id,label\ns1,\ns2,a\n"), require_labels=False)
    assert [row.label for row in mixed.rows] == [None, "a"]
    assert mixed.classes == ("a",)


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, "Slide ID,label\ns1,0\n")
    assert "must have a column 'slide_id', found 'Slide ID', 'label'" in message
    assert message.endswith("Rename 'Slide ID' to 'slide_id'?")
    assert "must have a column 'label', found 'slide_id', 'grade'" in refusal(tmp_path, "slide_id,grade\ns1,0\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cohort is empty"),
        ("\n  \n", "cohort is empty"),
        ("slide_id,label\n", "at least 1 row"),
        ("slide_id,label\ns1,0\n,1\n", "slide_id must not be empty, it is on line 3"),
        ("slide_id,label\ns1,0\ns2,\n\ns3,\n", "label must not be empty, it is on lines 3, 5 "),
        ("slide_id,label\ns1,0\ns2,1\ns1,0\n", "slide_id must occur once, 's1' is on lines 2 and 4"),
        ("slide_id,label,split\ns1,0,train\ns2,1,Valid\n", "got 'Valid' on line 3"),
        ("slide_id,label,split\ns1,0,train\ns2,1,\n", "split must not be empty, it is on line 3"),
        ("slide_id,label,case_id\ns1,0,p1\ns2,1,\n", "case_id must not be empty, it is on line 3"),
        ("slide_id,label\ns1,0,7\n", "line 2 must have 2 fields as the header has, got 3"),
        ("slide_id,label\ns1\n", "line 2 must have 2 fields as the header has, got 1"),
        ("slide_id,label,label\ns1,0,1\n", "column 'label' must occur once, found 2 times"),
        ("slide_id,label\n../s1,0\n", "must be a name without folders, got '../s1' on line 2"),
        ('slide_id,label\n"s1"x,0\n', "must be CSV text in UTF-8"),
    ],
)
def test_refusals_say_where(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    assert refusal(tmp_path, "slide_id,label,split\ns1,0,training\n").endswith("Nearest: 'train'.")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"found nothing .*absent\.csv"):
        read_cohort(tmp_path / "absent.csv")
    with pytest.raises(CohortError, match="found a folder"):
        read_cohort(tmp_path)
    with pytest.raises(CohortError, match="Save it as 'CSV UTF-8'"):
        read_cohort(write(tmp_path, "slide_id,label\ns1,0\n", "utf-16"))


def test_with_split_changes_the_split_alone() -> None:
    assert CohortRow("s", "1", "p", None).with_split("val") == CohortRow("s", "1", "p", "val")


def test_reference_cohort(shared_data: Path) -> None:
    cohort = read_cohort(shared_data / "reference_formats" / "acmil" / "camelyon16.csv")
    assert len(cohort.rows) == 399
    assert cohort.has_cases
    assert len({row.case_id for row in cohort.rows}) == 362
    assert cohort.classes == ("0", "1")
    assert sum(row.label == "1" for row in cohort.rows) == 111 + 49


@pytest.mark.parametrize(("column", "name"), [("Case_ID", "case_id"), ("case id", "case_id"), ("Split", "split")])
def test_a_known_column_in_another_spelling_is_refused(tmp_path: Path, column: str, name: str) -> None:
    text = f"slide_id,label,{column}\ns1,a,train\ns2,b,test\n"
    assert f"column {column!r} must be called {name!r}" in refusal(tmp_path, text)


def test_a_column_of_patients_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_cohort(write(tmp_path, "slide_id,label,patient_id\ns1,a,p1\ns2,b,p1\n"))
    assert "If 'patient_id' says whose a slide is, rename it to 'case_id'" in caplog.text
    caplog.clear()
    read_cohort(write(tmp_path, "slide_id,label,case_id,patient_id\ns1,a,p1,p1\ns2,b,p1,p1\n"))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Tumour", "tumour"], "a class must have one spelling, got 'Tumour' on line 2 and 'tumour' on line 3"),
        (["0", "1", "1.0"], "a class must have one spelling, got '1' on line 3 and '1.0' on line 4"),
        (["a", "nan"], "label must name a class, got 'nan' on line 3"),
        (["a", "N/A", "b"], "label must name a class, got 'N/A' on line 3"),
    ],
)
def test_labels_that_would_be_classes_by_mistake(tmp_path: Path, labels: list[str], said: str) -> None:
    rows = "".join(f"s{number},{label}\n" for number, label in enumerate(labels))
    assert said in refusal(tmp_path, "slide_id,label\n" + rows)


@pytest.mark.parametrize("word", ["nan", "NA", "<NA>"])
def test_cases_that_are_not_known_are_not_one_case(tmp_path: Path, word: str) -> None:
    said = refusal(tmp_path, f"slide_id,label,case_id\ns1,a,p1\ns2,b,{word}\ns3,b,{word}\n")
    assert f"case_id must name a case, got {word!r} on line 3" in said


def test_letters_written_in_two_ways_are_the_same(tmp_path: Path) -> None:
    composed, taken_apart = "M\u00e9tastase", "Me\u0301tastase"
    cohort = read_cohort(write(tmp_path, f"slide_id,label\ns1,{composed}\n{taken_apart},{taken_apart}\n"))
    assert cohort.classes == (composed,)
    assert cohort.rows[1].slide_id == composed
