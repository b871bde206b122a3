"""CLAM's features: the same numbers twice, as HDF5 with coordinates and as a bare PyTorch tensor.

| file | holds | dtype | attributes |
|---|---|---|---|
| `h5_files/<slide>.h5` | `features` (N, D) | float32 | none |
| | `coords` (N, 2), (x, y) in level-0 px | int32 | none in the files of the feature step |
| `pt_files/<slide>.pt` | the tensor (N, D) | float32 | |

The size of the tiles is kept in the files of the patching step, as attributes of `coords`: `patch_size` in px of the
pyramid level `patch_level`, whose size and `downsample` from level 0 (in x and y) stand in `level_dim` and
`downsample`. Some derived tools copy them to the features, so they are read where they are. No µm/px, no encoder.
A tensor may hold a leading axis of length 1. Storage (chunks) has no part in the format.

Reference:
    https://github.com/mahmoodlab/CLAM, files `extract_features_fp.py`, `utils/file_utils.py`,
    `dataset_modules/dataset_h5.py`, `wsi_core/WholeSlideImage.py` (facts only).
"""

from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from acmil.preprocessing.atomic import replacing
from acmil.preprocessing.formats.stored import (
    FormatError,
    Geometry,
    StoredFeatures,
    cast,
    features_shape,
    number,
    read_coords,
    read_dataset,
    require,
    whole,
)
from acmil.preprocessing.hdf5 import writing_hdf5

NAME, NAME_PT = "clam", "clam-pt"
SUFFIX_PT = ".pt"


def matches(file: h5py.File) -> bool:
    """Whether an HDF5 file has this layout; ours and TRIDENT's have it too, ask for those first."""
    return "features" in file


def read_clam(path: Path, file: h5py.File) -> StoredFeatures:
    """Read one slide from HDF5; what is not in the file stays unknown.

    Raises:
        FormatError: If shapes or types are wrong.
    """
    n_tiles, n_features = features_shape(file["features"], path)
    coords = read_coords(file, n_tiles, path)
    geometry, remarks = (Geometry(), ()) if coords is None else _geometry(file["coords"].attrs)
    return StoredFeatures(
        path=path,
        format=NAME,
        slide_id=path.stem,
        n_tiles=n_tiles,
        n_features=n_features,
        dtype=file["features"].dtype,
        load=partial(read_dataset, path, "features"),
        coords=coords,
        coords_unit="" if coords is None else "level0_px",
        geometry=geometry,
        remarks=remarks,
    )


def _geometry(attributes: h5py.AttributeManager) -> tuple[Geometry, tuple[str, ...]]:
    tile_px, level = whole(attributes, "patch_size"), whole(attributes, "patch_level")
    if (number(attributes, "custom_downsample") or 1) != 1:
        return Geometry(), ("tiles were resampled by custom_downsample, their size is not taken from the file",)
    downsample = 1.0 if level == 0 else number(attributes, "downsample")
    level_size = np.ravel(attributes.get("level_dim", ())) if level == 0 else ()
    width, height = (int(side) for side in level_size) if len(level_size) == 2 else (None, None)
    geometry = Geometry(
        tile_px=tile_px,
        tile_level0_px=round(tile_px * downsample) if tile_px and downsample else None,
        level0_width=width,
        level0_height=height,
    )
    return geometry, ()


def read_clam_pt(path: Path) -> StoredFeatures:
    """Read one slide from a tensor file, as data only: no code in it is run.

    Raises:
        FormatError: If it is no whole file of one tensor (N, D) of floating-point numbers.
    """
    shape, dtype = _load_pt(path, shape_only=True)
    return StoredFeatures(
        path=path,
        format=NAME_PT,
        slide_id=path.stem,
        n_tiles=shape[0],
        n_features=shape[1],
        dtype=dtype,
        load=lambda: _load_pt(path)[0],
    )


def _load_pt(path: Path, *, shape_only: bool = False) -> tuple[Any, np.dtype]:
    """The tensor's numbers, or its shape where that is enough, and its type; bfloat16 is read as float32."""
    import pickle
    import zipfile

    import torch

    try:
        # Mapped rather than read: the shape is found without reading the numbers. Files of before 2020 are no zip.
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"{SUFFIX_PT} file must hold one tensor and be whole, this one is truncated, damaged or holds something "
            f"else: {reason} ({path})."
        ) from error
    if not isinstance(tensor, torch.Tensor):
        raise FormatError(f"{SUFFIX_PT} file must hold one tensor, got {type(tensor).__name__} ({path}).")
    tensor = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise FormatError(
            f"features must be (N, D) floating-point numbers with N and D at least 1, got shape {tuple(tensor.shape)} "
            f"of {tensor.dtype} ({path})."
        )
    tensor = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    values = tensor.numpy()
    return (values.shape if shape_only else values.copy()), values.dtype


def write_clam(
    path: Path,
    *,
    slide_id: str,
    features: np.ndarray,
    coords: np.ndarray | None,
    geometry: Geometry,
    encoder: str,
) -> None:
    """Write the HDF5 file of one slide. The format has no place for geometry, encoder and the slide's name.

    Args:
        path: The file; its folder must exist.
        slide_id: The slide's name.
        features: (N, D).
        coords: (N, 2) int (x, y) in level-0 px.
        geometry: Not kept.
        encoder: Not kept.

    Raises:
        FormatError: If coordinates are not known.
    """
    require(path, NAME, coords=coords)
    with writing_hdf5(path) as file:
        file.create_dataset("features", data=cast(features, np.float32, path))
        file.create_dataset("coords", data=coords, dtype=np.int32)


def write_clam_pt(path: Path, *, features: np.ndarray) -> None:
    """Write the tensor file of one slide: features (N, D) as float32."""
    import torch

    tensor = torch.from_numpy(np.array(cast(features, np.float32, path)))  # a copy, as mapped features are read-only
    with replacing(path) as temporary:
        torch.save(tensor, temporary)
