"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acmil.preprocessing.process_name import has_ended, is_process_name, process_name

TEMPORARY_SUFFIX = ".tmp"
_OLD_SECONDS = 3600.0  # no file here takes that long to write


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; put the file in its place once it is on the disk.

    A folder can be made under that name as well: it takes the place of nothing, and its files are not flushed.

    Args:
        path: The file to write or replace. Its folder must exist.

    Yields:
        The temporary path, in the same folder, hidden (leading dot) and ending in `.tmp`. If the block raises, what
        was written there is removed and `path` is left as it was.
    """
    temporary = path.parent / f".{path.name}.{process_name()}{TEMPORARY_SUFFIX}"
    try:
        yield temporary
        if os.name == "posix" or not temporary.is_dir():  # elsewhere a folder cannot be opened to be flushed
            _flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # writing to an open file does not say which
        raise
    if os.name == "posix":
        _flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is gone already is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`; others may be writing theirs there now.

    What is not named as `replacing` names its files is somebody else's, and stays.
    """
    leftovers = [path for path in folder.glob(f".*{TEMPORARY_SUFFIX}") if is_process_name(_writer(path))]
    if not leftovers:
        return
    probe = folder / f".clock.{process_name()}{TEMPORARY_SUFFIX}"
    probe.touch()
    now_seconds = probe.stat().st_mtime  # by the clock of the file system, which may be another machine's
    probe.unlink()
    for leftover in leftovers:
        if has_ended(_writer(leftover)) or _is_old(leftover, now_seconds):
            remove(leftover)


def _writer(temporary: Path) -> str:
    return temporary.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]


def _is_old(path: Path, now_seconds: float) -> bool:
    try:
        return now_seconds - path.stat().st_mtime > _OLD_SECONDS
    except FileNotFoundError:
        return False


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
