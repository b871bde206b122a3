"""Pixel size from a TIFF's ImageDescription, where ImageJ and OME state it in µm, as no TIFF tag has that unit."""

import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree

_MICRONS = ("um", "\u00b5m", "\u03bcm", "\\u00b5m", "\\u03bcm", "micron", "microns", "micrometer", "micrometre")
_UNIT_UM = {**dict.fromkeys(_MICRONS, 1.0), "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_IMAGEJ_UNIT = re.compile(r"^unit=(.*)$", re.MULTILINE)
_NOT_STATED = (math.nan, math.nan)


def described_mpp(
    description: str, *, size: tuple[int, int], density: tuple[float, float]
) -> tuple[float, float] | None:
    """Read the pixel size that the description of a TIFF states.

    Args:
        description: The tag ImageDescription of the file's first page.
        size: (width, height) of the page that is read, in its pixels.
        density: The tags XResolution and YResolution of that page: pixels per unit, of which ImageJ keeps the unit in
            the description.

    Returns:
        Pitch in µm/px along x and y, NaN where the description states none for that page; None where it is not
        ImageJ's with a unit of length, nor OME's, so that the page's own tags count.
    """
    if description.startswith("ImageJ="):
        unit = _IMAGEJ_UNIT.search(description)
        unit_um = _UNIT_UM.get(unit[1].strip().lower()) if unit else None
        if unit_um is None:  # ImageJ writes inches and pixels too
            return None
        x, y = (unit_um / value if value > 0 else math.nan for value in density)
        return x, y
    return _ome_mpp(description, size) if "<OME" in description[:2000] or ":OME" in description[:2000] else None


def _ome_mpp(description: str, size: tuple[int, int]) -> tuple[float, float] | None:
    """The pixel size of the one image of the OME-XML that has the page's size."""
    try:
        root = ElementTree.fromstring(description)
    except ElementTree.ParseError:
        return None
    stated = {
        (_length_um(pixels.attrib, "PhysicalSizeX"), _length_um(pixels.attrib, "PhysicalSizeY"))
        for pixels in root.iter()
        if pixels.tag.rpartition("}")[2] == "Pixels" and _size(pixels.attrib) == size
    }
    return stated.pop() if len(stated) == 1 else _NOT_STATED


def _size(attributes: Mapping[str, str]) -> tuple[int, int] | None:
    try:
        return int(attributes["SizeX"]), int(attributes["SizeY"])
    except (KeyError, ValueError):
        return None


def _length_um(attributes: Mapping[str, str], name: str) -> float:
    """One physical size in µm, the unit where none is given; NaN where there is none, or in another unit."""
    try:
        return float(attributes[name]) * _UNIT_UM[attributes.get(f"{name}Unit", "um").lower()]
    except (KeyError, ValueError):
        return math.nan
