"""TRIDENT's patch features: one HDF5 file a slide, of which our own format is a superset.

| dataset | shape | dtype | attributes |
|---|---|---|---|
| `features` | (N, D) | float32 or float16, as the encoder gave them | `name`, `savetodir`, since 2025 `encoder` |
| `coords` | (N, 2) | int64 | (x, y) in level-0 px; the attributes read below, `name`, `savetodir` |

`patch_size` and `overlap` count px at the target magnification, `patch_size_level0` level-0 px; `level0_width` and
`level0_height` are absent in older files. A missing value is written as the text "None". There is no µm/px: the
magnifications are nominal. The files lie in a folder `features_<encoder>`. Storage (chunks) has no part in the format.

Reference:
    https://github.com/mahmoodlab/TRIDENT, files `trident/IO.py` and `trident/wsi_objects/WSI.py` (facts only).
"""

from functools import partial
from pathlib import Path

import h5py
import numpy as np

from acmil.preprocessing.formats.stored import (
    Geometry,
    StoredFeatures,
    features_shape,
    number,
    read_coords,
    read_dataset,
    require,
    text,
    whole,
)
from acmil.preprocessing.hdf5 import writing_hdf5

NAME = "trident"
FOLDER_PREFIX = "features_"

_MARKS = {"patch_size_level0", "level0_magnification", "target_magnification"}


def matches(file: h5py.File) -> bool:
    """Whether an HDF5 file has this layout."""
    return "features" in file and "coords" in file and not _MARKS.isdisjoint(file["coords"].attrs)


def read_trident(path: Path, file: h5py.File) -> StoredFeatures:
    """Read one slide; what is not in the file stays unknown.

    Raises:
        FormatError: If shapes or types are wrong.
    """
    n_tiles, n_features = features_shape(file["features"], path)
    encoder = text(file["features"].attrs, "encoder")
    remarks: tuple[str, ...] = ()
    if not encoder and path.parent.name.startswith(FOLDER_PREFIX):
        encoder = path.parent.name.removeprefix(FOLDER_PREFIX)
        remarks = ("encoder is the folder's name",)
    return StoredFeatures(
        path=path,
        format=NAME,
        slide_id=path.stem,
        n_tiles=n_tiles,
        n_features=n_features,
        dtype=file["features"].dtype,
        load=partial(read_dataset, path, "features"),
        coords=read_coords(file, n_tiles, path),
        coords_unit="level0_px",
        geometry=_geometry(file["coords"].attrs),
        encoder=encoder,
        remarks=remarks,
    )


def _geometry(attributes: h5py.AttributeManager) -> Geometry:
    tile_px, tile_level0_px = whole(attributes, "patch_size"), whole(attributes, "patch_size_level0")
    scanned, target = number(attributes, "level0_magnification"), number(attributes, "target_magnification")
    if tile_level0_px is None and tile_px and scanned and target:
        tile_level0_px = int(tile_px * scanned // target)  # as the tool defines it
    return Geometry(
        tile_px=tile_px,
        tile_level0_px=tile_level0_px,
        overlap_px=whole(attributes, "overlap"),
        level0_width=whole(attributes, "level0_width"),
        level0_height=whole(attributes, "level0_height"),
        level0_magnification=scanned,
        target_magnification=target,
    )


def write_trident(
    path: Path,
    *,
    slide_id: str,
    features: np.ndarray,
    coords: np.ndarray | None,
    geometry: Geometry,
    encoder: str,
) -> None:
    """Write one slide; magnifications, overlap and slide size are left out where they are not known.

    Args:
        path: The file; its folder must exist.
        slide_id: The slide's name.
        features: (N, D) float16 or float32.
        coords: (N, 2) int (x, y) in level-0 px.
        geometry: Must state both sides of a tile.
        encoder: Name of the encoder, "" where it is not known.

    Raises:
        FormatError: If coordinates or the tiles' size are not known.
    """
    size = {"tile_px": geometry.tile_px, "tile_level0_px": geometry.tile_level0_px}
    require(path, NAME, coords=coords, **size)
    folder = str(path.parent)
    attributes = {
        "patch_size": geometry.tile_px,
        "patch_size_level0": geometry.tile_level0_px,
        "level0_magnification": _tidy(geometry.level0_magnification),
        "target_magnification": _tidy(geometry.target_magnification),
        "overlap": geometry.overlap_px,
        "name": slide_id,
        "savetodir": folder,
        "level0_width": geometry.level0_width,
        "level0_height": geometry.level0_height,
    }
    with writing_hdf5(path) as file:
        file.create_dataset("features", data=features)
        file["features"].attrs.update({"name": slide_id, "savetodir": folder, "encoder": encoder or "None"})
        file.create_dataset("coords", data=coords, dtype=np.int64)
        file["coords"].attrs.update({name: value for name, value in attributes.items() if value is not None})


def _tidy(magnification: float | None) -> int | float | None:
    """Write 20.0 as 20, as the tool does."""
    return int(magnification) if magnification is not None and magnification % 1 == 0 else magnification
