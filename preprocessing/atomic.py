"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; put the file in its place once it is on the disk.

    Args:
        path: The file to write or replace. Its folder must exist.

    Yields:
        The temporary path, in the same folder, hidden (leading dot) and ending in `.tmp`. If the block raises, what
        was written there is removed and `path` is left as it was.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened to be flushed
        _flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
