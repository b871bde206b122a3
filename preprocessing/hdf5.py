"""HDF5 files that are written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from acmil.preprocessing.atomic import write_bytes


@contextmanager
def writing_hdf5(path: Path, **options: Any) -> Iterator[h5py.File]:
    """Give an HDF5 file to fill; what it holds is put at `path` in one step at the end, as `write_bytes` does.

    It is made in memory: where HDF5 itself writes and the disk is full, closing the file fails again, and the process
    ends with a segmentation fault.

    Args:
        path: The file to write or replace. Its folder must exist.
        options: Of `h5py.File`.

    Yields:
        The file, open for writing.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False, **options) as file:
        yield file
        file.flush()
        content = file.id.get_file_image()
    write_bytes(path, content)
