"""Feature files of other tools: what a file is, and its slides with as much geometry as it states."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from acmil.preprocessing import feature_file
from acmil.preprocessing.formats import acmil_reference, clam, stamp, trident
from acmil.preprocessing.formats.stored import FormatError, Geometry, StoredFeatures, open_hdf5

__all__ = ["SUFFIXES", "FormatError", "Geometry", "StoredFeatures", "detect_format", "read_slides"]

ACMIL = "acmil"
SUFFIXES = (".h5", ".hdf5", clam.SUFFIX_PT)

_LAYOUTS = (
    (ACMIL, lambda file: file.attrs.get("format") == feature_file.FORMAT),
    (trident.NAME, trident.matches),
    (clam.NAME, clam.matches),
    (stamp.NAME, stamp.matches),
    (acmil_reference.NAME, acmil_reference.matches),
)
_READERS = {trident.NAME: trident.read_trident, clam.NAME: clam.read_clam, stamp.NAME: stamp.read_stamp}


def detect_format(path: Path) -> str:
    """Tell the format of a feature file by what is in it.

    Returns:
        "acmil", "trident", "clam", "clam-pt", "stamp" or "acmil-reference".

    Raises:
        FormatError: If it is none of these, or damaged.
    """
    if path.suffix == clam.SUFFIX_PT:
        return clam.NAME_PT
    with open_hdf5(path) as file:
        for name, matches in _LAYOUTS:
            if matches(file):
                return name
        found = ", ".join(map(repr, file)) or "nothing"
        hint = " This is a file of tile coordinates: embed the tiles first." if list(file) == ["coords"] else ""
        known = ", ".join(name for name, _ in _LAYOUTS)
        raise FormatError(f"feature file must be of one of the formats {known}, found {found} in it ({path}).{hint}")


def read_slides(path: Path, *, check_values: bool = False) -> Iterator[StoredFeatures]:
    """Read the slides of a feature file of any format; most formats keep one a file.

    Args:
        path: The file.
        check_values: Also look for NaN and infinities, in files of our own format.

    Yields:
        Each slide; its features are read when asked for.

    Raises:
        FormatError: If the file is of no known format, or damaged.
        FeatureFileError: If it is of our own format and fails one of its checks.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"feature file must exist, found none ({path}).")
    name = detect_format(path)
    if name == clam.NAME_PT:
        yield clam.read_clam_pt(path)
    elif name == ACMIL:
        yield _read_acmil(path, check_values=check_values)
    else:
        with open_hdf5(path) as file:
            if name == acmil_reference.NAME:
                yield from acmil_reference.read_reference(path, file)
            else:
                yield _READERS[name](path, file)


def _read_acmil(path: Path, *, check_values: bool) -> StoredFeatures:
    file = feature_file.open_feature_file(path, check_values=check_values)
    meta = file.meta
    known = {item.name: getattr(meta, item.name) for item in fields(Geometry) if item.name not in meta.unknown}
    has_coords = file.has_coords()
    return StoredFeatures(
        path=path,
        format=ACMIL,
        slide_id=meta.slide_id,
        n_tiles=file.n_tiles,
        n_features=file.n_features,
        dtype=file.dtype,
        load=file.features,
        coords=file.coords() if has_coords else None,
        coords_unit="level0_px" if has_coords else "",
        geometry=Geometry(**known),
        encoder=meta.encoder,
        extras={"encoder_digest": meta.encoder_digest},
    )
