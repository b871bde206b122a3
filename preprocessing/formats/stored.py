"""What the readers of all formats give: the features of one slide, and only as much geometry as the file states."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from acmil.preprocessing.feature_file import HDF5_ERRORS, FeatureFileError

CoordsUnit = Literal["level0_px", "um", ""]

_TOLERANCE = 0.01  # resolutions that differ by less than this share agree
_NOT_STATED = {"", "None", "NA"}  # how some tools write that a value is missing


class FormatError(ValueError):
    """A feature file that is not of a known format, is damaged, or states too little for what is asked."""


@dataclass(frozen=True)
class Geometry:
    """Sizes and resolutions of a slide and its tiles; None is what is not stated.

    Attributes:
        tile_px: Side of a tile in px at the target resolution.
        tile_level0_px: Side of a tile in level-0 px.
        overlap_px: Overlap of neighbouring tiles in px at the target resolution.
        level0_width: Width of the slide in level-0 px.
        level0_height: Height of the slide in level-0 px.
        level0_mpp: Resolution of level 0 in µm/px.
        tile_mpp: Resolution of the tiles in µm/px.
        level0_magnification: Objective power of level 0.
        target_magnification: Objective power the tiles correspond to.
    """

    tile_px: int | None = None
    tile_level0_px: int | None = None
    overlap_px: int | None = None
    level0_width: int | None = None
    level0_height: int | None = None
    level0_mpp: float | None = None
    tile_mpp: float | None = None
    level0_magnification: float | None = None
    target_magnification: float | None = None

    def missing(self) -> tuple[str, ...]:
        """Names of what is not known, magnifications aside: those are nominal, and many slides state none."""
        names = [item.name for item in fields(self) if not item.name.endswith("magnification")]
        return tuple(name for name in names if getattr(self, name) is None)

    def completed(self, stated: "Geometry", *, where: str) -> "Geometry":
        """Fill in what is missing from what somebody states, then what follows from both.

        The tiles' resolution follows from their two sides, `tile_mpp = tile_level0_px * level0_mpp / tile_px`, and the
        side in level-0 px from the same relation.

        Args:
            stated: What to take where this geometry has a gap.
            where: The file, for the error.

        Returns:
            The geometry, with as few gaps as possible.

        Raises:
            FormatError: If something stated contradicts what is known.
        """
        for item in fields(self):
            ours, theirs = getattr(self, item.name), getattr(stated, item.name)
            if ours is not None and theirs is not None and not _agree(ours, theirs):
                raise FormatError(
                    f"{item.name} must be what the file says, {ours:g}, got {theirs:g} ({where}). Leave the option out."
                )
        gaps = {item.name: getattr(stated, item.name) for item in fields(self) if getattr(self, item.name) is None}
        return replace(self, **gaps)._derived()

    def _derived(self) -> "Geometry":
        if self.tile_px is None or self.level0_mpp is None:
            return self
        if self.tile_level0_px is not None and self.tile_mpp is not None:
            follows = self.tile_level0_px * self.level0_mpp / self.tile_px
            if abs(self.tile_mpp - follows) > _TOLERANCE * follows:
                raise FormatError(
                    f"tile_mpp must be tile_level0_px * level0_mpp / tile_px, {self.tile_level0_px} * "
                    f"{self.level0_mpp:g} / {self.tile_px} = {follows:.4g}, got {self.tile_mpp:g}. Leave it out: it "
                    "follows from the others."
                )
        if self.tile_level0_px is None and self.tile_mpp is not None:
            return replace(self, tile_level0_px=round(self.tile_px * self.tile_mpp / self.level0_mpp))
        if self.tile_mpp is None and self.tile_level0_px is not None:
            return replace(self, tile_mpp=self.tile_level0_px * self.level0_mpp / self.tile_px)
        return self


def _agree(ours: float, theirs: float) -> bool:
    if isinstance(ours, int):
        return ours == theirs
    return abs(theirs - ours) <= _TOLERANCE * ours


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The features of one slide as a file of any format holds them; the features are read when asked for.

    Attributes:
        path: The file.
        format: Name of the format.
        slide_id: The slide's name.
        n_tiles: N.
        n_features: D.
        dtype: Type of the features on disk.
        load: Reads the features.
        coords: (N, 2) top-left corners (x, y) of the tiles as stored, None where the format keeps none.
        coords_unit: What `coords` counts: level-0 px, µm, or "" where the file does not say.
        geometry: What the file states.
        encoder: Name of the encoder, "" where the file does not say.
        extras: Attributes that have no place here, such as a label; passed on as they are.
        remarks: What a person should know of this file.
    """

    path: Path
    format: str
    slide_id: str
    n_tiles: int
    n_features: int
    dtype: np.dtype
    load: Callable[[], np.ndarray] = field(repr=False)
    coords: np.ndarray | None = None
    coords_unit: CoordsUnit = ""
    geometry: Geometry = Geometry()
    encoder: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def features(self) -> np.ndarray:
        """Read the features (N, D), in the type on disk."""
        return self.load()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is missing or doubtful, in words."""
        notes = list(self.remarks)
        if self.coords is None:
            notes.append("no coordinates")
        elif not self.coords_unit:
            notes.append("unit of coords not stated")
        if self.geometry == Geometry():
            notes.append("no geometry stated")
        elif missing := self.geometry.missing():
            notes.append(f"not stated: {', '.join(missing)}")
        if not self.encoder:
            notes.append("encoder not stated")
        return tuple(notes)

    def level0_coords(self, geometry: Geometry, *, coords_mpp: float | None = None) -> np.ndarray | None:
        """Express the coordinates in level-0 px.

        Args:
            geometry: Geometry of the slide, completed.
            coords_mpp: µm per unit of the coordinates, for files that do not state the unit.

        Returns:
            (N, 2) int64 (x, y), or None where the file does not tell enough.
        """
        if self.coords is None:
            return None
        if self.coords_unit == "level0_px":
            return self.coords.astype(np.int64)
        um_per_unit = 1.0 if self.coords_unit == "um" else coords_mpp
        if um_per_unit is None or geometry.level0_mpp is None:
            return None
        return np.rint(self.coords.astype(np.float64) * (um_per_unit / geometry.level0_mpp)).astype(np.int64)


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file to read; damage is a FormatError that names the file."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (FormatError, FeatureFileError):
        raise
    except HDF5_ERRORS as error:
        raise FormatError(
            "feature file must be whole HDF5, this one is truncated, damaged or another kind of file: "
            f"{error} ({path})."
        ) from error


def read_dataset(path: Path, name: str) -> np.ndarray:
    """Read features (N, D) from a dataset; a leading axis of length 1 is dropped."""
    with open_hdf5(path) as file:
        values = file[name][...]
    return values[0] if values.ndim == 3 else values


def features_shape(dataset: h5py.Dataset, path: Path) -> tuple[int, int]:
    """Return (N, D) of a dataset of features (N, D) or (1, N, D), checked to hold at least one number.

    Raises:
        FormatError: If it has another shape, is empty, or does not hold floating-point numbers.
    """
    shape = dataset.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or 0 in shape or dataset.dtype.kind != "f":
        raise FormatError(
            f"features must be (N, D) floating-point numbers with N and D at least 1, got shape {dataset.shape} of "
            f"{dataset.dtype} in {dataset.name!r} ({path})."
        )
    return shape


def read_coords(group: h5py.Group, n_tiles: int, path: Path) -> np.ndarray | None:
    """Read the dataset `coords` (N, 2) of a group, None where there is none; a leading axis of length 1 is dropped.

    Raises:
        FormatError: If it does not go with `n_tiles` tiles.
    """
    if not isinstance(group.get("coords"), h5py.Dataset):
        return None
    coords = group["coords"][...]
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    if coords.shape != (n_tiles, 2) or coords.dtype.kind not in "iuf":
        raise FormatError(
            f"coords must be numbers ({n_tiles}, 2), one row a tile, got {coords.dtype} {coords.shape} ({path})."
        )
    if coords.dtype.kind == "f" and not np.isfinite(coords).all():
        raise FormatError(f"coords must be finite, got NaN or infinity ({path}).")
    return coords


def text(attributes: h5py.AttributeManager, name: str) -> str:
    """Read a text attribute; "" where it is absent or says that it is missing."""
    value = attributes.get(name, "")
    value = value.decode() if isinstance(value, bytes) else str(value)
    return "" if value in _NOT_STATED else value


def number(attributes: h5py.AttributeManager, name: str) -> float | None:
    """Read a number; None where it is absent or says that it is missing."""
    value = attributes.get(name)
    if value is None or (isinstance(value, (str, bytes)) and text(attributes, name) == ""):
        return None
    return float(np.asarray(value, dtype=np.float64).ravel()[0])


def whole(attributes: h5py.AttributeManager, name: str) -> int | None:
    """Read a number of pixels; None where it is absent or says that it is missing."""
    value = number(attributes, name)
    return None if value is None else round(value)


def cast(features: np.ndarray, dtype: type[np.floating], path: Path) -> np.ndarray:
    """Return features as `dtype`.

    Raises:
        FormatError: If a number that was finite does not fit.
    """
    with np.errstate(over="ignore"):
        narrowed = features.astype(dtype, copy=False)
    if not np.isfinite(narrowed).all():
        raise FormatError(
            f"features must be finite in {np.dtype(dtype)}, the type of this format, largest is "
            f"{np.abs(features).max():g} ({path})."
        )
    return narrowed


def require(path: Path, format_name: str, **values: Any) -> None:
    """Check that what a format must state is known.

    Raises:
        FormatError: If one of the values is None.
    """
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise FormatError(f"{format_name} must state {', '.join(missing)}, not known here ({path}).")
