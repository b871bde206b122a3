"""Bags in one `.npz` archive: `features` (n, d), `bag_ids` (n,) and `bag_labels` (bags,)."""

import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from acmil.preprocessing.formats import FormatError, StoredFeatures

NAME = "npz"
SUFFIX = ".npz"

_ARRAYS = ("features", "bag_ids", "bag_labels")


def read_bag_archive(path: Path) -> Iterator[StoredFeatures]:
    """Read the bags of an archive, called `bag_0000`, `bag_0001`, … after their ids; no code in the file is run.

    Args:
        path: The archive; `bag_ids` are positions in `bag_labels`, and a bag's rows need not follow each other.

    Yields:
        Each bag, without coordinates and geometry; its label, as text, is in `extras`.

    Raises:
        FormatError: If an array is missing or of another shape or type, an id has no label, or a bag has no row.
    """
    arrays = _load(path)
    features, ids, labels = (arrays[name] for name in _ARRAYS)
    _check(features, ids, labels, path)
    digits = max(4, len(str(len(labels) - 1)))
    order = np.argsort(ids, kind="stable")
    ends = np.cumsum(np.bincount(ids, minlength=len(labels)))[:-1]
    for bag, rows in enumerate(np.split(order, ends)):
        yield StoredFeatures(
            path=path,
            format=NAME,
            slide_id=f"bag_{bag:0{digits}d}",
            n_tiles=len(rows),
            n_features=features.shape[1],
            dtype=features.dtype,
            load=partial(features.__getitem__, rows),
            extras={"label": str(labels[bag])},
        )


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in _ARRAYS if name not in archive]
            if not missing:
                return {name: archive[name] for name in _ARRAYS}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"bags must be a whole .npz archive of plain arrays, this one is truncated, damaged or another kind of "
            f"file: {error} ({path})."
        ) from error
    raise FormatError(f"bags must hold the arrays {', '.join(_ARRAYS)}, without {', '.join(missing)} ({path}).")


def _check(features: np.ndarray, ids: np.ndarray, labels: np.ndarray, path: Path) -> None:
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise FormatError(
            f"features must be (n, d) floating-point numbers, got {features.dtype} {features.shape} ({path})."
        )
    if ids.shape != features.shape[:1] or ids.dtype.kind not in "iu" or labels.ndim != 1:
        raise FormatError(
            f"bag_ids must be whole numbers ({len(features)},) and bag_labels (bags,), got {ids.dtype} {ids.shape} and "
            f"{labels.shape} ({path})."
        )
    if ids.min() < 0 or ids.max() >= len(labels):
        raise FormatError(
            f"bag_ids must be from 0 to {len(labels) - 1}, as there are {len(labels)} bag_labels, got {ids.min()} to "
            f"{ids.max()} ({path})."
        )
    empty = np.setdiff1d(np.arange(len(labels)), ids)
    if len(empty):
        raise FormatError(f"every bag must have a row, bag {empty[0]} has none ({path}).")
