"""The job's table of slides, `slides.csv`: one row a slide, rewritten in one step as slides finish.

Several processes may work on a job, so that the table is put together from what is on the disk: each slide's row is a
small file of its own in `rows/`, written by who holds the slide. Whoever writes the table looks again afterwards, and
writes anew if a row has come meanwhile: the last one to finish leaves it whole, without any lock.
"""

import csv
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from acmil.preprocessing.atomic import write_text

Status = Literal["done", "empty", "failed", "pending"]
_ROW_SUFFIX = ".json"
_REWRITE_INTERVAL_SECONDS = 1.0  # a job of 10,000 slides must not spend its time on its table


class LedgerError(ValueError):
    """A table of slides that cannot be read."""


@dataclass(frozen=True)
class Row:
    """One slide of the job.

    Attributes:
        slide_id: Its name.
        path: The slide file.
        status: done; empty: without a tile, `alarms` says why; failed: `error` says why; pending.
        tiles: Number of tiles with features.
        mpp: Resolution of level 0 in µm/px, None where it is not known.
        seconds: Seconds of work, those of all threads added up.
        error: Why it failed.
        ink_removed: Share of the tissue that was pen ink and was taken out, in [0, 1].
        alarms: What someone should look at, "; " between.
        tiles_dropped: Number of tiles beyond the limits of quality, which were read and have no features; None where it
            is not known.
        focus_median: Median focus of all tiles read, those dropped too; see `quality.py`. This and the following are
            None where quality was not measured or is not known.
        pen_mean: Mean share of a tile that is pen ink, in [0, 1].
        fold_mean: Mean share that is folded, in [0, 1].
        blood_mean: Mean share that is red cells, in [0, 1].
        dark_mean: Mean share that is dark, in [0, 1].
        stain_mean: Mean optical density of the tissue.
        file_bytes: Size of the slide file, by which another slide of its name is told from the same one at another
            place; None where it is not known.
        mpp_given: Whether `mpp` was stated by the user, in place of what the slide says; None where it is not known.
    """

    slide_id: str
    path: str
    status: Status = "pending"
    tiles: int = 0
    mpp: float | None = None
    seconds: float = 0.0
    error: str = ""
    ink_removed: float = 0.0
    alarms: str = ""
    tiles_dropped: int | None = None
    focus_median: float | None = None
    pen_mean: float | None = None
    fold_mean: float | None = None
    blood_mean: float | None = None
    dark_mean: float | None = None
    stain_mean: float | None = None
    file_bytes: int | None = None
    mpp_given: bool | None = None


COLUMNS = tuple(field.name for field in fields(Row))


class Ledger:
    """The rows of `slides.csv` by slide_id, in the order in which the slides came to the job.

    Args:
        path: The table; rows already in it are read.
        rows: Folder of the files of single rows, which win over the table; it must exist.

    Raises:
        LedgerError: If the file is there and is no such table.
    """

    def __init__(self, path: Path, *, rows: Path) -> None:
        self._path = path
        self._folder = rows
        self._rows = {row.slide_id: row for row in _read(path)} if path.is_file() else {}
        self._read_at: dict[str, tuple[int, int]] = {}  # file name: time of change and inode when it was last read
        self._written_at = -_REWRITE_INTERVAL_SECONDS
        self._refresh()

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self._rows.values()))

    def get(self, slide_id: str) -> Row | None:
        """Return a slide's row, None if the job has never seen it."""
        return self._rows.get(slide_id)

    def set(self, row: Row) -> None:
        """Put a slide's row in, for the table alone; the file follows within about a second, or at `write`."""
        self._rows[row.slide_id] = row
        if time.monotonic() - self._written_at >= _REWRITE_INTERVAL_SECONDS:
            self._write()

    def record(self, row: Row) -> None:
        """Put a slide's row on the disk, for every process of the job. The slide must be held."""
        path = self._folder / f"{row.slide_id}{_ROW_SUFFIX}"
        write_text(path, json.dumps(asdict(row)))
        self._read_at[path.name] = _stamp(path.stat())
        self._rows[row.slide_id] = row

    def forget(self, slide_id: str) -> None:
        """Remove a slide's row from the disk, as it is about to be done anew. The slide must be held."""
        (self._folder / f"{slide_id}{_ROW_SUFFIX}").unlink(missing_ok=True)

    def news(self, slide_id: str) -> Row | None:
        """Return a slide's row if another process has recorded it since this one last looked."""
        path = self._folder / f"{slide_id}{_ROW_SUFFIX}"
        try:
            stamp = _stamp(path.stat())
        except FileNotFoundError:
            return None
        return self._read_row(path, stamp) if self._read_at.get(path.name) != stamp else None

    def write(self) -> None:
        """Write the table now, with all that other processes have recorded."""
        self._refresh()
        self._write()
        while self._refresh():
            self._write()

    def _refresh(self) -> bool:
        """Read the rows that others have recorded; whether there were any."""
        with os.scandir(self._folder) as entries:
            found = {entry.name: _stamp(entry.stat()) for entry in entries if entry.name.endswith(_ROW_SUFFIX)}
        changed = [name for name in sorted(found) if self._read_at.get(name) != found[name]]
        for name in changed:
            self._read_row(self._folder / name, found[name])
        return bool(changed)

    def _read_row(self, path: Path, stamp: tuple[int, int]) -> Row:
        try:
            row = Row(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise LedgerError(f"a row must be as it was written, got {error} ({path}). Remove the file.") from error
        self._rows[row.slide_id] = row
        self._read_at[path.name] = stamp
        return row

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(getattr(row, column)) for column in COLUMNS] for row in self)
        write_text(self._path, text.getvalue())
        self._written_at = time.monotonic()


def _stamp(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_mtime_ns, facts.st_ino


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
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
            mpp=_float(cells["mpp"]),
            seconds=float(cells["seconds"]),
            error=cells["error"],
            ink_removed=float(cells["ink_removed"]),
            alarms=cells["alarms"],
            tiles_dropped=int(cells["tiles_dropped"]) if cells["tiles_dropped"] else None,
            focus_median=_float(cells["focus_median"]),
            pen_mean=_float(cells["pen_mean"]),
            fold_mean=_float(cells["fold_mean"]),
            blood_mean=_float(cells["blood_mean"]),
            dark_mean=_float(cells["dark_mean"]),
            stain_mean=_float(cells["stain_mean"]),
            file_bytes=int(cells["file_bytes"]) if cells["file_bytes"] else None,
            mpp_given=cells["mpp_given"] == "true" if cells["mpp_given"] else None,
        )
    except (ValueError, TypeError) as error:
        raise LedgerError(f"slides.csv must hold rows as they were written, got {error} ({where}).") from error


def _float(cell: str) -> float | None:
    return float(cell) if cell else None
