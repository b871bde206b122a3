"""The job's table of slides, `slides.csv`: one row a slide, rewritten in one step as slides finish."""

import csv
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from acmil.preprocessing.atomic import write_text

Status = Literal["done", "empty", "failed", "pending"]
_REWRITE_INTERVAL_SECONDS = 1.0  # a job of 10,000 slides must not spend its time on its table


class LedgerError(ValueError):
    """A table of slides that cannot be read."""


@dataclass(frozen=True)
class Row:
    """One slide of the job.

    Attributes:
        slide_id: Its name.
        path: The slide file.
        status: done; empty: smaller than a tile, or without tissue; failed: `error` says why; pending.
        tiles: Number of tiles.
        mpp: Resolution of level 0 in µm/px, None where it is not known.
        seconds: Seconds of work, those of all threads added up.
        error: Why it failed.
    """

    slide_id: str
    path: str
    status: Status = "pending"
    tiles: int = 0
    mpp: float | None = None
    seconds: float = 0.0
    error: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


class Ledger:
    """The rows of `slides.csv` by slide_id, in the order in which the slides came to the job.

    Args:
        path: The table; rows already in it are read.

    Raises:
        LedgerError: If the file is there and is no such table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = {row.slide_id: row for row in _read(path)} if path.is_file() else {}
        self._written_at = -_REWRITE_INTERVAL_SECONDS

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, slide_id: str) -> Row | None:
        """Return a slide's row, None if the job has never seen it."""
        return self._rows.get(slide_id)

    def set(self, row: Row) -> None:
        """Put a slide's row in; the file follows within about a second, or at `write`."""
        self._rows[row.slide_id] = row
        if time.monotonic() - self._written_at >= _REWRITE_INTERVAL_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the table now."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(getattr(row, column)) for column in COLUMNS] for row in self)
        write_text(self._path, text.getvalue())
        self._written_at = time.monotonic()


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split("\n"))


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise LedgerError(
                f"slides.csv must have the columns {','.join(COLUMNS)}, got {reader.fieldnames} ({path}). "
                "Choose another --out, or remove the file: finished slides are found again by their feature files."
            )
        return [_row(cells, f"{path}, line {reader.line_num}") for cells in reader]


def _row(cells: dict[str, str], where: str) -> Row:
    try:
        if cells["status"] not in get_args(Status):
            raise ValueError(f"status {cells['status']!r}")
        return Row(
            slide_id=cells["slide_id"],
            path=cells["path"],
            status=cells["status"],  # type: ignore[arg-type]  # checked above
            tiles=int(cells["tiles"]),
            mpp=float(cells["mpp"]) if cells["mpp"] else None,
            seconds=float(cells["seconds"]),
            error=cells["error"],
        )
    except (ValueError, TypeError) as error:
        raise LedgerError(f"slides.csv must hold rows as they were written, got {error} ({where}).") from error
