"""Splits by patient: all slides of one case are on the same side, in every class the same shares."""

import csv
import hashlib
import io
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from acmil.cohort import SPLITS, Cohort, CohortError
from acmil.preprocessing.atomic import write_text

logger = logging.getLogger(__name__)

SPLIT_COLUMNS = ("slide_id", "case_id", "label", "split")


def assign_splits(cohort: Cohort, *, val_fraction: float, test_fraction: float, seed: int) -> Cohort:
    """Draw training, validation and test cases, stratified by label.

    A case counts for its rarest label (of its slides' labels, the one that the fewest slides of the cohort have): a
    patient with one tumour slide is a tumour patient. Within each class, cases are put in the order of
    sha256(seed, case_id), and the first `n·test_fraction` and then `n·val_fraction` of them, rounded and at least
    one, leave the training set. So the result depends on the seed and the cases only: not on the order of the rows,
    the machine or the version of a library; and the test set does not depend on `val_fraction` (but where a class is
    so small that training would be left without it). Any splits which the cohort has are replaced.

    Args:
        cohort: The cohort, every row with a label.
        val_fraction: Share of the cases for validation, in [0, 1); 0 for none.
        test_fraction: Share of the cases for the test set, in [0, 1); 0 for none.
        seed: Selects the draw.

    Returns:
        The cohort, rows in the same order, each with its split.

    Raises:
        CohortError: If a label is missing, or a class has too few cases to be in every split that is asked for.
        ValueError: If the fractions leave nothing for training.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            "val_fraction and test_fraction must be in [0, 1) and sum to less than 1, "
            f"got {val_fraction} and {test_fraction}."
        )
    _check_labels(cohort)
    fractions = {name: f for name, f in (("test", test_fraction), ("val", val_fraction)) if f > 0}
    _check_cases_suffice(cohort, n_splits=1 + len(fractions))
    split_of: dict[str, str] = {}
    for cases in _cases_by_class(cohort).values():
        ordered = sorted(cases, key=lambda case_id: _draw(seed, case_id))
        start = 0
        for name, count in _held_out_counts(len(ordered), fractions).items():
            split_of.update(dict.fromkeys(ordered[start : start + count], name))
            start += count
        split_of.update(dict.fromkeys(ordered[start:], "train"))
    result = replace(cohort, rows=tuple(row.with_split(split_of[row.case_id]) for row in cohort.rows))
    _check_classes_everywhere(result, ("train", *fractions))
    return result


def assign_folds(cohort: Cohort, *, n_folds: int, seed: int) -> dict[str, int]:
    """Deal the cases into folds, in every class the same number up to one.

    As in `assign_splits` a case counts for its rarest label and the draw depends on seed and cases only. Splits which
    the cohort has do not matter.

    Args:
        cohort: The cohort, every row with a label.
        n_folds: At least 2.
        seed: Selects the draw.

    Returns:
        The fold of each case, from 0.

    Raises:
        CohortError: If a label is missing, a class has too few cases for as many folds with training and validation
            beside the test, or a fold is left without a class.
    """
    _check_labels(cohort)
    cases_of: dict[str, set[str]] = defaultdict(set)
    for row in cohort.rows:
        cases_of[row.label or ""].add(row.case_id)
    needed = max(n_folds, 4 if n_folds == 2 else 0)  # of two folds each must give training and validation
    for label in cohort.classes:
        n_cases = len(cases_of[label])
        if n_cases < needed:
            fewer = f"give --n-folds {n_cases}" if n_cases >= 3 else "drop the class"
            raise CohortError(
                f"each class needs at least {needed} cases for {n_folds} folds, class {label!r} has {n_cases} "
                f"({cohort.path}). Add cases, or {fewer}."
            )
    fold_of: dict[str, int] = {}
    for _, cases in sorted(_cases_by_class(cohort).items()):
        for case_id in sorted(cases, key=lambda case_id: _draw(seed, case_id)):
            fold_of[case_id] = len(fold_of) % n_folds
    for label in cohort.classes:
        lacking = sorted(set(range(n_folds)) - {fold_of[case_id] for case_id in cases_of[label]})
        if lacking:
            raise CohortError(
                f"every class must be in every fold, class {label!r} has no case in fold {lacking[0]} ({cohort.path}): "
                "few of its cases have this label alone. Try another --split-seed, or fewer folds."
            )
    return fold_of


def check_splits(cohort: Cohort) -> None:
    """Check that a cohort's splits can be trained on: no leak between them, and two classes to tell apart.

    A class without a slide in some split is logged as a warning: its AUROC there is not defined.

    Args:
        cohort: A cohort whose rows have labels and splits; a test set may be absent.

    Raises:
        CohortError: If a split or a label is missing, a case is in two splits, train or val is empty, or training
            has one class only.
    """
    _check_labels(cohort)
    unassigned = [row.slide_id for row in cohort.rows if row.split is None]
    if unassigned:
        raise CohortError(
            f"every slide must have a split, {unassigned[0]!r} has none, {len(unassigned)} in all ({cohort.path})."
        )
    _check_cases_apart(cohort)
    classes = _classes_by_split(cohort)
    for name in SPLITS[:2]:
        if not classes[name]:
            raise CohortError(
                f"split {name!r} must have at least 1 slide, got none ({cohort.path}). "
                "Mark some slides with it, or remove the split column to have the splits drawn."
            )
    if len(classes["train"]) < 2:
        raise CohortError(
            f"training needs at least 2 classes, got {', '.join(map(repr, sorted(classes['train'])))} in the "
            f"{sum(row.split == 'train' for row in cohort.rows)} training slides ({cohort.path})."
        )
    for name, present in classes.items():
        absent = [label for label in cohort.classes if present and label not in present]
        if absent:
            logger.warning("split %r has no slide of class %s (%s)", name, ", ".join(map(repr, absent)), cohort.path)


def split_rows(cohort: Cohort) -> list[tuple[str, str, str, str]]:
    """Return the rows of `splits.csv`, in the order of `SPLIT_COLUMNS`; what is not known is empty."""
    return [(row.slide_id, row.case_id, row.label or "", row.split or "") for row in cohort.rows]


def write_splits(path: Path, cohort: Cohort) -> None:
    """Write `splits.csv`, which is a cohort table again.

    Args:
        path: The file to write.
        cohort: The cohort with its splits.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(SPLIT_COLUMNS)
    writer.writerows(split_rows(cohort))
    write_text(Path(path), table.getvalue())


def _check_labels(cohort: Cohort) -> None:
    unlabelled = [row.slide_id for row in cohort.rows if row.label is None]
    if unlabelled:
        raise CohortError(
            f"every slide must have a label, {unlabelled[0]!r} has none, {len(unlabelled)} in all ({cohort.path})."
        )


def _check_cases_apart(cohort: Cohort) -> None:
    slides: dict[str, dict[str, str]] = defaultdict(dict)  # case → slide → split
    for row in cohort.rows:
        slides[row.case_id][row.slide_id] = row.split or ""
    leaks = {case_id: splits for case_id, splits in slides.items() if len(set(splits.values())) > 1}
    if leaks:
        case_id, splits = next(iter(leaks.items()))
        shown = ", ".join(f"{slide_id} ({split})" for slide_id, split in list(splits.items())[:6])
        others = f" {len(leaks) - 1} other cases leak too." if len(leaks) > 1 else ""
        raise CohortError(
            f"all slides of a case must be in one split, case {case_id!r} has {shown} ({cohort.path}).{others} "
            "Move them together, or remove the split column to have the splits drawn."
        )


def _check_cases_suffice(cohort: Cohort, n_splits: int) -> None:
    cases: dict[str, set[str]] = defaultdict(set)
    for row in cohort.rows:
        cases[row.label or ""].add(row.case_id)
    for label in cohort.classes:
        if len(cases[label]) < n_splits:
            _refuse_class(cohort, label, len(cases[label]), n_splits)


def _check_classes_everywhere(cohort: Cohort, names: Iterable[str]) -> None:
    classes = _classes_by_split(cohort)
    for name in names:
        for label in cohort.classes:
            if label not in classes[name]:
                raise CohortError(
                    f"every class must be in every split, class {label!r} has no case for {name!r} ({cohort.path}): "
                    "few of its cases have this label alone. Try another seed, or give a split column."
                )


def _refuse_class(cohort: Cohort, label: str, n_cases: int, n_splits: int) -> None:
    raise CohortError(
        f"each class needs at least {n_splits} cases to be in {n_splits} splits, class {label!r} has {n_cases} "
        f"({cohort.path}). Add cases, drop the class, or set val_fraction or test_fraction to 0."
    )


def _classes_by_split(cohort: Cohort) -> Mapping[str, set[str]]:
    return {name: {row.label or "" for row in cohort.rows if row.split == name} for name in SPLITS}


def _cases_by_class(cohort: Cohort) -> dict[str, set[str]]:
    """The cases of each class, a case counting for its rarest label."""
    slides = Counter(row.label or "" for row in cohort.rows)
    labels: dict[str, set[str]] = defaultdict(set)
    for row in cohort.rows:
        labels[row.case_id].add(row.label or "")
    cases: dict[str, set[str]] = defaultdict(set)
    for case_id, found in labels.items():
        cases[min(found, key=lambda label: (slides[label], label))].add(case_id)
    return cases


def _held_out_counts(n_cases: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """How many of a class's cases leave the training set, which keeps at least one."""
    at_least = 1 if n_cases > len(fractions) else 0
    counts = {name: max(at_least, math.floor(n_cases * fraction + 0.5)) for name, fraction in fractions.items()}
    while sum(counts.values()) >= n_cases:
        most_over = max(counts, key=lambda name: (counts[name] > at_least, counts[name] - n_cases * fractions[name]))
        counts[most_over] -= 1
    return counts


def _draw(seed: int, case_id: str) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}\0{case_id}".encode()).digest(), case_id
