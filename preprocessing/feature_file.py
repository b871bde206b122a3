"""The feature file: one HDF5 file a slide, a superset of TRIDENT's, written whole or not at all.

What is written where: datasets `features` (N, D), `coords` (N, 2), `tissue_fraction` (N,) and, where it was measured,
`quality` (N, 6), whose attribute `measures` names its columns; the other attributes are listed in `_ATTRIBUTES` below.
The datasets are contiguous and not compressed, so that `features` can be memory-mapped.

What is not known, in files converted from formats that state less: an attribute is left out and named in the file's
attribute `unknown`, as a reader would take any number for real; here it reads as -1 (pixels), NaN (µm/px) or "" (names
and digests). `coords` of which nothing is known are all -1, an unknown `tissue_fraction` is NaN.
"""

import errno
import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from acmil.preprocessing.hdf5 import writing_hdf5

FORMAT = "acmil-features"
FORMAT_VERSION = 1
SUFFIX = ".h5"
UNKNOWN_PX = -1  # a number of pixels, or a coordinate, that is not known
MEASURES = ("focus", "pen", "fold", "blood", "dark", "stain")  # the columns of `quality`, see `quality.py`

# What keeps a file from being read today and says nothing of it: locks, rights, a disk or file server that is away.
_FOR_NOW = {errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOLCK, errno.ESTALE, errno.EBUSY}
_BLOCK_VALUES = 1 << 22  # features are checked in blocks of this many numbers: 8 to 16 MB at a time
# What h5py raises on damaged files, depending on which part of the file is gone.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)
_MEND = "Delete the file and preprocess the slide again."


class FeatureFileError(ValueError):
    """A feature file that cannot be used: the message names the file and the check that failed."""


@dataclass(frozen=True)
class FeatureMeta:
    """Where the features of one slide come from.

    Attributes:
        slide_id: The slide's name.
        encoder: Name of the encoder.
        encoder_digest: sha256 of the encoder's weights.
        preprocessing_digest: sha256 of every option that changes the numbers.
        tile_px: Side of a tile in px at the target resolution.
        tile_level0_px: Side of a tile in level-0 px.
        overlap_px: Overlap of neighbouring tiles in px at the target resolution.
        level0_width: Width of the slide in level-0 px.
        level0_height: Height of the slide in level-0 px.
        level0_mpp: Resolution of level 0 in µm/px.
        tile_mpp: Measured resolution of the tiles, after resampling, in µm/px.
        level0_magnification: Objective power of level 0, None where the slide does not say.
        target_magnification: Objective power the tiles correspond to, None where level 0's is not known.
    """

    slide_id: str
    encoder: str
    encoder_digest: str
    preprocessing_digest: str
    tile_px: int
    tile_level0_px: int
    overlap_px: int
    level0_width: int
    level0_height: int
    level0_mpp: float
    tile_mpp: float
    level0_magnification: float | None = None
    target_magnification: float | None = None

    @property
    def unknown(self) -> tuple[str, ...]:
        """The fields of the slide's and the tiles' size and resolution that are not known."""
        return tuple(field for field, _, _ in _ATTRIBUTES if _is_unknown(getattr(self, field)))


# field of FeatureMeta, type, and where it is kept: (object, attribute). The first place is the one that is read.
_ATTRIBUTES: tuple[tuple[str, type, tuple[tuple[str, str], ...]], ...] = (
    ("slide_id", str, (("/", "slide_id"), ("features", "name"), ("coords", "name"))),
    ("encoder", str, (("/", "encoder"), ("features", "encoder"))),
    ("encoder_digest", str, (("/", "encoder_digest"),)),
    ("preprocessing_digest", str, (("/", "preprocessing_digest"),)),
    ("tile_px", int, (("coords", "patch_size"),)),
    ("tile_level0_px", int, (("coords", "patch_size_level0"),)),
    ("overlap_px", int, (("coords", "overlap"),)),
    ("level0_width", int, (("coords", "level0_width"),)),
    ("level0_height", int, (("coords", "level0_height"),)),
    ("level0_mpp", float, (("/", "level0_mpp"),)),
    ("tile_mpp", float, (("/", "tile_mpp"),)),
    ("level0_magnification", float, (("coords", "level0_magnification"),)),
    ("target_magnification", float, (("coords", "target_magnification"),)),
)
_OPTIONAL = {"level0_magnification", "target_magnification"}
_UNKNOWN = {int: UNKNOWN_PX, float: math.nan}


def _is_unknown(value: str | float | None) -> bool:
    return not isinstance(value, str) and value is not None and not value >= 0  # NaN compares false


@dataclass(frozen=True)
class FeatureFile:
    """A feature file that passed its checks; the arrays are read when asked for.

    Attributes:
        path: The file.
        meta: Where the features come from.
        n_tiles: N, at least 1.
        n_features: D.
        dtype: Type of the features on disk, float16 or float32.
    """

    path: Path
    meta: FeatureMeta
    n_tiles: int
    n_features: int
    dtype: np.dtype

    def features(self) -> np.ndarray:
        """Return the features (N, D), memory-mapped read-only; a chunked file (not written here) is read instead."""
        with h5py.File(self.path, "r") as file:
            dataset = file["features"]
            offset_bytes = dataset.id.get_offset()  # None unless contiguous
            if offset_bytes is None:
                return dataset[...]
            shape, dtype = dataset.shape, dataset.dtype
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset_bytes, shape=shape)

    def coords(self) -> np.ndarray:
        """Return the tiles' top-left corners (N, 2), int64, (x, y) in level-0 px; all -1 where they are not known."""
        with h5py.File(self.path, "r") as file:
            return file["coords"][...].astype(np.int64, copy=False)

    def has_coords(self) -> bool:
        """Whether it is known where the tiles lie."""
        return bool((self.coords() != UNKNOWN_PX).any())

    def tissue_fraction(self) -> np.ndarray:
        """Return the share of each tile that is tissue, (N,) float32 in [0, 1]; NaN where it is not known."""
        with h5py.File(self.path, "r") as file:
            return file["tissue_fraction"][...].astype(np.float32, copy=False)

    def quality(self) -> np.ndarray | None:
        """Return the tiles' quality (N, 6), float32, columns as in `MEASURES`; None where it was not measured."""
        with h5py.File(self.path, "r") as file:
            dataset = file.get("quality")
            return dataset[...].astype(np.float32, copy=False) if isinstance(dataset, h5py.Dataset) else None


def write_feature_file(
    path: Path,
    *,
    features: np.ndarray,
    coords: np.ndarray,
    tissue_fraction: np.ndarray,
    meta: FeatureMeta,
    quality: np.ndarray | None = None,
) -> None:
    """Write one slide's features; the file appears under its name only when it is whole and on the disk.

    Args:
        path: The file to write; its folder must exist.
        features: (N, D) float16 or float32, finite.
        coords: (N, 2) integer, (x, y) of each tile's top-left corner in level-0 px.
        tissue_fraction: (N,) float, share of each tile that is tissue.
        meta: Where the features come from.
        quality: (N, 6) float, finite, columns as in `MEASURES`; None where it was not measured.

    Raises:
        FeatureFileError: If there is no tile, shapes disagree, the type is another, or a value is NaN or infinite.
    """
    path = Path(path)
    _check_shapes(path, features.shape, coords.shape, tissue_fraction.shape)
    _check_types(path, features.dtype, coords.dtype, tissue_fraction.dtype)
    if quality is not None:
        _check_quality(path, quality, MEASURES, n_tiles=len(features))
        _check_finite_quality(path, quality)
    _check_finite(path, features, mend="float16 holds up to 65504: try feature_dtype float32, or precision fp32.")
    # Alignment: a memory-mapped array must start at a multiple of its item size.
    alignment = {"alignment_threshold": 1, "alignment_interval": 8}
    with writing_hdf5(path, **alignment) as file:
        file.create_dataset("features", data=features)
        file.create_dataset("coords", data=coords.astype(np.int64, copy=False))
        file.create_dataset("tissue_fraction", data=tissue_fraction.astype(np.float32, copy=False))
        if quality is not None:
            file.create_dataset("quality", data=quality.astype(np.float32, copy=False))
            file["quality"].attrs["measures"] = MEASURES
        _write_attributes(file, meta)
        file.attrs["complete"] = True


def is_for_now(error: BaseException | None) -> bool:
    """Whether an error says nothing of a file: a lock, rights, a disk or a file server that is away."""
    return isinstance(error, OSError) and error.errno in _FOR_NOW


def open_feature_file(path: Path, *, check_values: bool = True) -> FeatureFile:
    """Open a feature file and check that it can be trusted.

    Args:
        path: The file.
        check_values: Also look for NaN and infinities, which reads the features once, block by block.

    Returns:
        The file's metadata and shape; its arrays are read when asked for.

    Raises:
        FeatureFileError: If the file is missing, truncated, of another format, not complete, holds no tile, its
            shapes or types disagree with the format, or a feature is NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatureFileError(f"feature file must exist, found none ({path}). Preprocess the slide first.")
    try:
        with h5py.File(path, "r") as file:
            return _checked(path, file, check_values=check_values)
    except FeatureFileError:
        raise
    except HDF5_ERRORS as error:
        if is_for_now(error):
            raise FeatureFileError(f"feature file cannot be read now: {error} ({path}).") from error
        raise FeatureFileError(
            "feature file must be whole HDF5, this one is truncated, damaged or another kind of file: "
            f"{error} ({path}). {_MEND}"
        ) from error


def _checked(path: Path, file: h5py.File, *, check_values: bool) -> FeatureFile:
    _check_format(path, file)
    names = ("features", "coords", "tissue_fraction")
    missing = [name for name in names if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise FeatureFileError(f"feature file must hold the datasets {', '.join(names)}, without {missing} ({path}).")
    features, coords, tissue_fraction = (file[name] for name in names)
    _check_shapes(path, features.shape, coords.shape, tissue_fraction.shape)
    _check_types(path, features.dtype, coords.dtype, tissue_fraction.dtype)
    if isinstance(quality := file.get("quality"), h5py.Dataset):
        _check_quality(path, quality, tuple(quality.attrs.get("measures", ())), n_tiles=features.shape[0])
        if check_values:
            _check_finite_quality(path, quality[...])
    if check_values:
        _check_finite(path, features, mend="Preprocess the slide again, with precision fp32.")
    n_tiles, n_features = features.shape
    return FeatureFile(path, _read_attributes(path, file), n_tiles, n_features, features.dtype)


def _check_format(path: Path, file: h5py.File) -> None:
    found = file.attrs.get("format")
    if found != FORMAT:
        raise FeatureFileError(
            f"attribute 'format' must be {FORMAT!r}, got {found!r} ({path}). This is another kind of HDF5 file: "
            "'acmil features convert' makes those of TRIDENT, CLAM, STAMP and ACMIL's reference code usable."
        )
    version = int(file.attrs.get("format_version", 0))
    if version != FORMAT_VERSION:
        raise FeatureFileError(
            f"attribute 'format_version' must be {FORMAT_VERSION}, got {version} ({path}). Update acmil to read it."
        )
    if not bool(file.attrs.get("complete", False)):
        raise FeatureFileError(f"attribute 'complete' must be true, the file was not finished ({path}). {_MEND}")


def _check_shapes(
    path: Path, features: tuple[int, ...], coords: tuple[int, ...], tissue_fraction: tuple[int, ...]
) -> None:
    if len(features) != 2 or coords != (features[0], 2) or tissue_fraction != features[:1]:
        raise FeatureFileError(
            "shapes must be features (N, D), coords (N, 2), tissue_fraction (N,), "
            f"got {features}, {coords}, {tissue_fraction} ({path})."
        )
    if 0 in features:
        raise FeatureFileError(
            f"a feature file must hold at least 1 tile and 1 feature, got shape {features} ({path}). "
            "A slide without tissue has no feature file."
        )


def _check_types(path: Path, features: np.dtype, coords: np.dtype, tissue_fraction: np.dtype) -> None:
    is_right = features in (np.float16, np.float32) and coords.kind in "iu" and tissue_fraction.kind == "f"
    if not is_right:
        raise FeatureFileError(
            "types must be features float16 or float32, coords int64, tissue_fraction float32, "
            f"got {features}, {coords}, {tissue_fraction} ({path})."
        )


def _check_quality(path: Path, quality: np.ndarray | h5py.Dataset, measures: tuple[str, ...], *, n_tiles: int) -> None:
    allowed = n_tiles, len(MEASURES)
    if quality.shape != allowed or quality.dtype.kind != "f" or measures != MEASURES:
        raise FeatureFileError(
            f"quality must be float, {allowed}, of the measures {', '.join(MEASURES)}, "
            f"got {quality.dtype}, {quality.shape}, {', '.join(map(str, measures)) or 'not named'} ({path})."
        )


def _check_finite_quality(path: Path, quality: np.ndarray) -> None:
    if not np.isfinite(quality).all():
        raise FeatureFileError(f"quality must be finite, got NaN or infinity ({path}). {_MEND}")


def _check_finite(path: Path, features: np.ndarray | h5py.Dataset, *, mend: str) -> None:
    block_tiles = max(1, _BLOCK_VALUES // features.shape[1])
    for start in range(0, features.shape[0], block_tiles):
        is_bad = ~np.isfinite(features[start : start + block_tiles]).all(axis=1)
        if is_bad.any():
            tile = start + int(is_bad.argmax())
            raise FeatureFileError(f"features must be finite, got NaN or infinity in tile {tile} ({path}). {mend}")


def _write_attributes(file: h5py.File, meta: FeatureMeta) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    if meta.unknown:
        file.attrs["unknown"] = ", ".join(meta.unknown)
    for field, kind, places in _ATTRIBUTES:
        value = getattr(meta, field)
        if (value is None and field in _OPTIONAL) or field in meta.unknown:
            continue  # not known: left out, as a reader would take any number for real
        for owner, attribute in places:
            file[owner].attrs[attribute] = kind(value)


def _read_attributes(path: Path, file: h5py.File) -> FeatureMeta:
    values: dict[str, str | int | float | None] = {}
    unknown = str(file.attrs.get("unknown", "")).split(", ")
    for field, kind, ((owner, attribute), *_) in _ATTRIBUTES:
        found = file[owner].attrs.get(attribute)
        if found is None and field in unknown:
            values[field] = _UNKNOWN[kind]
            continue
        if found is None and field not in _OPTIONAL:
            raise FeatureFileError(f"attribute {attribute!r} of {owner!r} must be there, found none ({path}). {_MEND}")
        values[field] = None if found is None else kind(found)
    return FeatureMeta(**values)  # type: ignore[arg-type]  # the types are those of _ATTRIBUTES
