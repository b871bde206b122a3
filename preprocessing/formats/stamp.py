"""STAMP's tile features: one HDF5 file a slide, coordinates in µm.

| dataset | shape | dtype | |
|---|---|---|---|
| `coords` | (N, 2) | float32 | (x, y) in µm |
| `feats` | (N, D) | float16 | |

Attributes of the file: `stamp_version`, `extractor`, `unit` = "um", `tile_size_um`, `tile_size_px`, `code_hash`,
`feat_type` = "tile". What its reader takes, and so does this one: version 2.0 had `tile_size` in place of
`tile_size_um`; historic files have neither, and a smallest step of 224 between coordinates, which then count
256/224 µm. Anything else leaves the unit of the coordinates unknown. The slide's own size and µm/px are not kept.

Reference:
    https://github.com/KatherLab/STAMP, files `src/stamp/preprocessing/__init__.py` (writer) and
    `src/stamp/modeling/data.py` (reader). El Nahhas et al., Nature Protocols 2024.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from acmil.preprocessing.formats.stored import (
    CoordsUnit,
    FormatError,
    Geometry,
    StoredFeatures,
    cast,
    features_shape,
    number,
    read_coords,
    read_dataset,
    require,
    text,
    whole,
)
from acmil.preprocessing.hdf5 import writing_hdf5

NAME = "stamp"

_LAYOUT_VERSION = "2.1.0"  # the oldest STAMP that reads this layout; its reader refuses files newer than itself
_HISTORIC_STEP_PX = 224
_HISTORIC_TILE_UM = 256.0


class _Coords(NamedTuple):
    values: np.ndarray | None
    unit: CoordsUnit
    geometry: Geometry
    remarks: tuple[str, ...] = ()


def matches(file: h5py.File) -> bool:
    """Whether an HDF5 file has this layout."""
    return isinstance(file.get("feats"), h5py.Dataset)


def read_stamp(path: Path, file: h5py.File) -> StoredFeatures:
    """Read one slide; what is not in the file stays unknown.

    Raises:
        FormatError: If the features are not those of tiles, or shapes or types are wrong.
    """
    kind = text(file.attrs, "feat_type") or "tile"
    if kind != "tile":
        raise FormatError(f"feat_type must be 'tile', got {kind!r} ({path}). These are features of a whole {kind}.")
    n_tiles, n_features = features_shape(file["feats"], path)
    coords = _coords(read_coords(file, n_tiles, path), file.attrs)
    return StoredFeatures(
        path=path,
        format=NAME,
        slide_id=path.stem,
        n_tiles=n_tiles,
        n_features=n_features,
        dtype=file["feats"].dtype,
        load=partial(read_dataset, path, "feats"),
        coords=coords.values,
        coords_unit=coords.unit,
        geometry=coords.geometry,
        encoder=text(file.attrs, "extractor"),
        remarks=coords.remarks,
    )


def _coords(coords: np.ndarray | None, attributes: h5py.AttributeManager) -> _Coords:
    """Coordinates in µm where the unit can be told, with what is said of the tiles' size."""
    tile_px = whole(attributes, "tile_size_px")
    tile_um = number(attributes, "tile_size_um")
    if tile_um is None and text(attributes, "unit") == "um":
        tile_um = number(attributes, "tile_size")
    if tile_um is not None:
        tile_mpp = tile_um / tile_px if tile_px else None
        return _Coords(coords, "" if coords is None else "um", Geometry(tile_px=tile_px, tile_mpp=tile_mpp))
    step = number(attributes, "tile_size") or _smallest_step(coords)
    if coords is not None and step is not None and round(step) == _HISTORIC_STEP_PX:
        tile_mpp = _HISTORIC_TILE_UM / _HISTORIC_STEP_PX
        geometry = Geometry(tile_px=_HISTORIC_STEP_PX, tile_mpp=tile_mpp)
        return _Coords(coords * tile_mpp, "um", geometry, ("historic STAMP: coords count 256/224 µm",))
    return _Coords(coords, "", Geometry(tile_px=tile_px))


def _smallest_step(coords: np.ndarray | None) -> float | None:
    """The smallest distance between different values in one column."""
    if coords is None:
        return None
    steps = np.concatenate([np.diff(np.unique(column)) for column in coords.T])
    return float(steps.min()) if len(steps) else None


def write_stamp(
    path: Path,
    *,
    slide_id: str,
    features: np.ndarray,
    coords: np.ndarray | None,
    geometry: Geometry,
    encoder: str,
) -> None:
    """Write one slide: features as float16, coordinates from level-0 px to µm as float32.

    `code_hash`, the digest of the code that embedded the tiles, is written empty: that code was not STAMP's.

    Args:
        path: The file; its folder must exist.
        slide_id: Not kept: the file's name says it.
        features: (N, D).
        coords: (N, 2) int (x, y) in level-0 px.
        geometry: Must state `level0_mpp`, `tile_px` and `tile_mpp`.
        encoder: Name of the encoder, as STAMP spells it where STAMP is to encode slides from it.

    Raises:
        FormatError: If something of this is not known, or a feature does not fit into float16.
    """
    tile_px, tile_mpp, level0_mpp = geometry.tile_px, geometry.tile_mpp, geometry.level0_mpp
    require(path, NAME, coords=coords, tile_px=tile_px, tile_mpp=tile_mpp, level0_mpp=level0_mpp)
    attributes = {
        "stamp_version": _LAYOUT_VERSION,
        "extractor": encoder,
        "unit": "um",
        "tile_size_um": float(tile_px * tile_mpp),  # type: ignore[operator]  # checked above
        "tile_size_px": tile_px,
        "code_hash": "",
        "feat_type": "tile",
    }
    with writing_hdf5(path) as file:
        coords_um = np.asarray(coords, np.float64) * level0_mpp  # type: ignore[operator]  # checked above
        file["coords"] = coords_um.astype(np.float32)
        file["feats"] = cast(features, np.float16, path)
        file.attrs.update(attributes)
