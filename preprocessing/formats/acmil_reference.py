"""The ACMIL reference implementation's features: one HDF5 file a data set, one group a slide.

The file is called `patch_feats_pretrain_<NAME>.h5`, NAME being what it calls the encoder's pre-training.

| in group `<slide_id>` | shape | dtype | |
|---|---|---|---|
| `feat` | (N, D) | float16 | |
| `coords` | (N, 2) | that of the patch file | (x, y) in level-0 px, from CLAM's patching |
| attribute `label` | | of the list of slides | its loaders use it as the index of the class |

Sizes of tiles and slides and µm/px are not kept.

Reference:
    https://github.com/dazhangyu123/ACMIL, files `Step2_feature_extract.py` (writer), `datasets/datasets.py` (reader).
    Zhang et al., Attention-Challenging Multiple Instance Learning, ECCV 2024, arXiv 2311.07125.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from acmil.preprocessing.formats.stored import (
    StoredFeatures,
    cast,
    features_shape,
    read_coords,
    read_dataset,
    require,
)
from acmil.preprocessing.hdf5 import writing_hdf5

NAME = "acmil-reference"
FILE_PREFIX = "patch_feats_pretrain_"


class ReferenceSlide(NamedTuple):
    """One slide to write.

    Attributes:
        slide_id: The slide's name.
        features: (N, D).
        coords: (N, 2) int (x, y) in level-0 px.
        attributes: Attributes of the group.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray | None
    attributes: Mapping[str, Any]


def matches(file: h5py.File) -> bool:
    """Whether an HDF5 file has this layout."""
    return any(isinstance(item, h5py.Group) and "feat" in item for item in file.values())


def read_reference(path: Path, file: h5py.File) -> Iterator[StoredFeatures]:
    """Read the slides one after the other; the attributes of their groups are in `extras`.

    Raises:
        FormatError: If shapes or types are wrong.
    """
    for slide_id, group in file.items():
        if not isinstance(group, h5py.Group) or "feat" not in group:
            continue
        where = path / slide_id
        n_tiles, n_features = features_shape(group["feat"], where)
        coords = read_coords(group, n_tiles, where)
        yield StoredFeatures(
            path=path,
            format=NAME,
            slide_id=slide_id,
            n_tiles=n_tiles,
            n_features=n_features,
            dtype=group["feat"].dtype,
            load=partial(read_dataset, path, f"{slide_id}/feat"),
            coords=coords,
            coords_unit="" if coords is None else "level0_px",
            encoder=path.stem.removeprefix(FILE_PREFIX) if path.stem.startswith(FILE_PREFIX) else "",
            extras=dict(group.attrs),
        )


def write_reference(path: Path, slides: Iterable[ReferenceSlide]) -> int:
    """Write the slides of a data set, features as float16.

    Args:
        path: The file; its folder must exist.
        slides: The slides; asked for one at a time.

    Returns:
        The number of slides.

    Raises:
        FormatError: If coordinates are not known, or a feature does not fit into float16.
    """
    count = 0
    with writing_hdf5(path) as file:
        for slide in slides:
            require(path / slide.slide_id, NAME, coords=slide.coords)
            group = file.create_group(slide.slide_id)
            group.create_dataset("feat", data=cast(slide.features, np.float16, path / slide.slide_id))
            group.create_dataset("coords", data=slide.coords, dtype=np.int64)
            group.attrs.update(slide.attributes)
            count += 1
    return count
