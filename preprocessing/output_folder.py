"""The folder that a command writes to: made, or refused in one sentence that every command shares."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """A folder that results cannot be written to."""


def make_output_folder(path: Path) -> Path:
    """Make the folder of a command's `--out`, with the folders above it; one that is there is kept.

    Args:
        path: The folder.

    Returns:
        The same path.

    Raises:
        OutputError: If it, or a folder above it, is a file, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(place for place in (path, *path.parents) if place.exists())
        raise OutputError(
            f"out must be a folder, got a path where the file {there} is ({path}). "
            "Choose another --out, or move the file away."
        ) from error
    except OSError as error:
        raise OutputError(
            f"out must be a folder that can be written, it could not be made: {error.strerror} ({path}). "
            "Choose another --out."
        ) from error
    return path


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder to write to, as `make_output_folder` does; a new one that stays empty is removed at the end."""
    is_new = not path.is_dir()
    make_output_folder(path)
    try:
        yield path
    finally:
        if is_new and not any(path.iterdir()):
            path.rmdir()
