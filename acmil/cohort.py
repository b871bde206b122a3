"""The cohort table: which slides there are, whose they are, and what is to be predicted for them."""

import csv
import difflib
import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

COLUMNS = ("slide_id", "label", "case_id", "split")
SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)

_LIKE_CASES = ("patient", "subject", "participant", "case", "donor")  # in the name of a column that may be case_id's
_MISSING = {"nan", "na", "n/a", "null", "<na>", "#n/a"}  # what programs write where there is no value
_MAX_NAMED = 5  # more lines than this are counted, not listed


class CohortError(ValueError):
    """A cohort table that cannot be used: the message names the file, the line or the case, and the mend."""


@dataclass(frozen=True)
class CohortRow:
    """One slide of a cohort.

    Attributes:
        slide_id: The slide's name, as text: leading zeros stay.
        label: Its class, or None where it is not known.
        case_id: The patient; equals `slide_id` where the table has no such column.
        split: "train", "val", "test", or None where none is assigned.
    """

    slide_id: str
    label: str | None
    case_id: str
    split: str | None

    def with_split(self, split: str | None) -> "CohortRow":
        """Return the same slide in another split."""
        return replace(self, split=split)


@dataclass(frozen=True)
class Cohort:
    """The rows of a cohort table.

    Attributes:
        rows: One row a slide, in the table's order.
        has_cases: Whether the table says which patient a slide is of.
        path: The table's file.
    """

    rows: tuple[CohortRow, ...]
    has_cases: bool
    path: Path

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted; as numbers when all of them are numbers."""
        return sort_labels({row.label for row in self.rows if row.label is not None})


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Sort labels, by value when all of them are finite numbers, else as text.

    >>> sort_labels({"10", "9"}), sort_labels({"b", "a", "10"})
    (('9', '10'), ('10', 'a', 'b'))
    """
    if all(_is_number(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    return tuple(sorted(labels))


def read_cohort(path: Path, *, require_labels: bool = True) -> Cohort:
    """Read a cohort table.

    The table is CSV text (UTF-8; comma, semicolon or tab, taken from the header line) with a header in any order:
    `slide_id`, `label`, and, if there, `case_id` and `split`. Other columns are ignored, but for one whose name is one
    of these in another spelling; what looks like a column of patients is warned of. `case_id` and `split` are given for
    all rows or for none.

    Args:
        path: The table.
        require_labels: Whether every row must have a label; without it the column may be absent or have gaps.

    Returns:
        The rows, in the table's order.

    Raises:
        CohortError: If the file is missing, empty or not such a table, a column or a value is missing, a slide
            occurs twice, a split is none of train, val, test, or two labels are one in two spellings.
    """
    path = Path(path)
    (_, header), *records = list(_records(path)) or [(0, [])]
    required = COLUMNS[:2] if require_labels else COLUMNS[:1]
    column_of = _find_columns(header, required, path)
    if not records:
        raise CohortError(f"cohort needs at least 1 row below its header, got none ({path}).")
    _check_widths(records, len(header), path)
    lines = [line for line, _ in records]
    columns = {
        name: [_one_form(record[column_of[name]]) if name in column_of else "" for _, record in records]
        for name in COLUMNS
    }
    _check_filled("slide_id", columns["slide_id"], lines, path)
    _check_slide_ids(columns["slide_id"], lines, path)
    if require_labels:
        _check_filled("label", columns["label"], lines, path)
    _check_labels(columns["label"], lines, path)
    has_cases, has_splits = any(columns["case_id"]), any(columns["split"])
    if has_cases:
        _check_filled("case_id", columns["case_id"], lines, path, mend="Give it for every slide, or for none.")
        _check_cases(columns["case_id"], lines, path)
    if has_splits:
        _check_splits_known(columns["split"], lines, path)
        _check_filled("split", columns["split"], lines, path, mend="Give it for every slide, or for none.")
    rows = tuple(
        CohortRow(slide_id, label or None, case_id or slide_id, split or None)
        for slide_id, label, case_id, split in zip(*(columns[name] for name in COLUMNS), strict=True)
    )
    return Cohort(rows, has_cases, path)


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number (where the record ends) and fields of every record that is not blank."""
    if not path.is_file():
        raise CohortError(f"cohort must be a CSV file, found {'a folder' if path.is_dir() else 'nothing'} ({path}).")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(next((line for line in file if line.strip()), ""))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for record in reader:
                if any(field.strip() for field in record):
                    yield reader.line_num, record
    except (UnicodeDecodeError, csv.Error) as error:
        raise CohortError(f"cohort must be CSV text in UTF-8: {error} ({path}). Save it as 'CSV UTF-8'.") from error


def _delimiter(header: str) -> str:
    """The separator which splits the header into most of the known columns, else most often there; comma if none is."""

    def score(delimiter: str) -> tuple[int, int]:
        names = {name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])}
        return len(names.intersection(COLUMNS)), header.count(delimiter)

    return max(",;\t", key=score)


def _find_columns(header: Sequence[str], required: Sequence[str], path: Path) -> dict[str, int]:
    """Position of each known column."""
    names = [name.strip() for name in header]
    if not names:
        raise CohortError(f"cohort is empty ({path}). Its header must be slide_id,label[,case_id][,split].")
    for name in required:
        if name not in names:
            shown = ", ".join(map(repr, names))
            raise CohortError(f"cohort must have a column {name!r}, found {shown} ({path}).{_nearest(name, names)}")
    for name in COLUMNS:
        if names.count(name) > 1:
            raise CohortError(f"column {name!r} must occur once, found {names.count(name)} times ({path}).")
        if name not in names:
            for other in names:
                if _letters(other) == _letters(name):
                    raise CohortError(f"column {other!r} must be called {name!r} ({path}). Rename it.")
    if "case_id" not in names:
        like = [name for name in names if any(word in name.lower() for word in _LIKE_CASES)]
        if like:
            logger.warning(
                "no column 'case_id' in %s: every slide counts as a patient of its own. If %r says whose a slide is, "
                "rename it to 'case_id'",
                path,
                like[0],
            )
    return {name: names.index(name) for name in COLUMNS if name in names}


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _nearest(wanted: str, names: Sequence[str]) -> str:
    simple = {name.lower().replace(" ", "_"): name for name in names}
    near = difflib.get_close_matches(wanted, simple, n=1, cutoff=0.5)
    return f" Rename {simple[near[0]]!r} to {wanted!r}?" if near else ""


def _check_widths(records: Sequence[tuple[int, list[str]]], n_columns: int, path: Path) -> None:
    for line, record in records:
        if len(record) != n_columns:
            raise CohortError(
                f"line {line} must have {n_columns} fields as the header has, got {len(record)} ({path}). "
                "Put quotes round values that hold the separator."
            )


def _check_filled(name: str, values: Sequence[str], lines: Sequence[int], path: Path, *, mend: str = "") -> None:
    empty = [line for line, value in zip(lines, values, strict=True) if not value]
    if empty:
        raise CohortError(f"{name} must not be empty, it is on {name_lines(empty)} ({path}). {mend}".rstrip())


def _check_slide_ids(slide_ids: Sequence[str], lines: Sequence[int], path: Path) -> None:
    """Each slide once, and fit to be a file's name, as files are named after slides."""
    first_line: dict[str, int] = {}
    for line, slide_id in zip(lines, slide_ids, strict=True):
        if "/" in slide_id or "\\" in slide_id or slide_id in {".", ".."}:
            raise CohortError(f"slide_id must be a name without folders, got {slide_id!r} on line {line} ({path}).")
        if slide_id in first_line:
            raise CohortError(
                f"slide_id must occur once, {slide_id!r} is on lines {first_line[slide_id]} and {line} ({path}). "
                "Several slides of one patient share a case_id, not a slide_id."
            )
        first_line[slide_id] = line


def _one_form(text: str) -> str:
    """Text without space around it, an accented letter as one character (NFC), whichever system wrote it."""
    return unicodedata.normalize("NFC", text.strip())


def _check_cases(cases: Sequence[str], lines: Sequence[int], path: Path) -> None:
    """No case is called what programs write where there is no value: all such slides would be of one patient."""
    for line, case_id in zip(lines, cases, strict=True):
        if case_id.casefold() in _MISSING:
            raise CohortError(
                f"case_id must name a case, got {case_id!r} on line {line} ({path}). "
                "Where the case is not known, write the slide_id there."
            )


def _check_labels(labels: Sequence[str], lines: Sequence[int], path: Path) -> None:
    """No label says that there is none, and no two are one in two spellings: each would become a class."""
    line_of = dict(zip(reversed(labels), reversed(lines), strict=True))  # the first
    spellings: dict[str | float, list[str]] = defaultdict(list)
    for label in filter(None, dict.fromkeys(labels)):
        if label.casefold() in _MISSING:
            raise CohortError(
                f"label must name a class, got {label!r} on line {line_of[label]} ({path}). "
                "Leave the row out, or give the class another name."
            )
        spellings[float(label) if _is_number(label) else label.casefold()].append(label)
    for same in spellings.values():
        if len(same) > 1:
            raise CohortError(
                f"a class must have one spelling, got {same[0]!r} on line {line_of[same[0]]} and {same[1]!r} on line "
                f"{line_of[same[1]]} ({path}). Write them alike."
            )


def describe_classes(cohort: Cohort) -> str:
    """Say how many slides and cases each class has.

    >>> rows = (CohortRow("s1", "a", "c1", None), CohortRow("s2", "a", "c1", None), CohortRow("s3", "b", "c2", None))
    >>> describe_classes(Cohort(rows, True, Path("cohort.csv")))
    'a: 2 slides of 1 case, b: 1 slide of 1 case'
    """
    slides = Counter(row.label for row in cohort.rows)
    cases = Counter(label for label, _ in {(row.label, row.case_id) for row in cohort.rows})
    return ", ".join(
        f"{name}: {slides[name]} slide{'s' * (slides[name] > 1)} of {cases[name]} case{'s' * (cases[name] > 1)}"
        for name in cohort.classes
    )


def _check_splits_known(splits: Sequence[str], lines: Sequence[int], path: Path) -> None:
    for line, split in zip(lines, splits, strict=True):
        if split and split not in SPLITS:
            near = difflib.get_close_matches(split.lower(), SPLITS, n=1, cutoff=0.4)
            hint = f" Nearest: {near[0]!r}." if near else ""
            raise CohortError(f"split must be train, val or test, got {split!r} on line {line} ({path}).{hint}")


def name_lines(lines: Sequence[int]) -> str:
    """Write line numbers for an error, the first few of them.

    >>> name_lines([7]), name_lines([2, 3, 4, 5, 6, 7, 8])
    ('line 7', 'lines 2, 3, 4, 5, 6 and 2 more')
    """
    listed = ", ".join(map(str, lines[:_MAX_NAMED]))
    more = f" and {len(lines) - _MAX_NAMED} more" if len(lines) > _MAX_NAMED else ""
    return f"line{'s' if len(lines) > 1 else ''} {listed}{more}"
