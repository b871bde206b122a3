"""The cuCIM reader (https://docs.rapids.ai/api/cucim), an optional extra for Linux machines with an NVIDIA GPU."""

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acmil.preprocessing.readers import Rectangle, SlideError, SlideFacts, whiten, within

_LENGTHS_UM = {"micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "inch": 25_400.0}


class CucimReader:
    """Reads one slide file through cuCIM, on the CPU, as the tiles are resampled there.

    Written to cuCIM's documentation and tested against a stand-in of its documented API; it has not been run with
    cuCIM itself yet. cuCIM reads Aperio SVS and generic tiled TIFF; it does not say which part was scanned, so `bounds`
    is all of level 0.

    Args:
        path: The file.
        slide_id: Name of the slide in messages.

    Raises:
        SlideError: If cuCIM is not installed, or the file is missing or cannot be opened.
    """

    def __init__(self, path: Path, *, slide_id: str) -> None:
        self._path = path
        self._slide_id = slide_id
        self._lock = threading.Lock()
        if not path.exists():
            raise SlideError(f"slide '{slide_id}': no such file: {path}")
        try:
            from cucim import CuImage
        except ImportError as error:
            raise SlideError(
                f"slide '{slide_id}': the reader 'cucim' needs the package cucim, found none. "
                'Install it with pip install "acmil[cucim]" (for CUDA 12: cucim-cu12), or choose another reader.'
            ) from error
        try:
            self._image: Any = CuImage(str(path))
            self._facts = _facts(self._image)
        except (RuntimeError, ValueError, OSError, LookupError) as error:
            raise SlideError(
                f"slide '{slide_id}': cuCIM cannot open {path}: {error}. Choose the reader openslide or auto."
            ) from error

    @property
    def facts(self) -> SlideFacts:
        """What the file says of itself."""
        return self._facts

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        """Read a rectangle of one pyramid level as uint8 RGB (height_px, width_px, 3); see `SlideReader.read`."""
        downsample = self._facts.level_downsamples[level]
        left, top = math.floor(x_level0_px / downsample), math.floor(y_level0_px / downsample)
        pixels = np.full((height_px, width_px, 3), 255, np.uint8)
        inside = within(left, top, width_px, height_px, size=self._facts.level_sizes[level])
        if inside is None:
            return pixels
        # Whatever cuCIM does beyond the edge, it is never asked for it. It takes places in level-0 pixels, so one that
        # is inside is passed as it was given.
        x = x_level0_px if inside.x == left else 0
        y = y_level0_px if inside.y == top else 0
        part = self._region(level, (x, y), (inside.width, inside.height))
        row, column = inside.y - top, inside.x - left
        pixels[row : row + inside.height, column : column + inside.width] = part
        return pixels

    def close(self) -> None:
        """Let the file go; reading afterwards is an error."""
        with self._lock:  # The handle closes with its last reference, after the reads that are under way.
            self._image = None

    def _region(self, level: int, place: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        with self._lock:
            image = self._image
        if image is None:
            raise SlideError(f"slide '{self._slide_id}': read after it was closed: {self._path}")
        try:
            part = np.asarray(image.read_region(location=place, size=size, level=level))  # (h, w, 3 or 4)
        except (RuntimeError, ValueError, OSError) as error:
            raise SlideError(
                f"slide '{self._slide_id}': cannot read {size[0]} x {size[1]} px of level {level} at level-0 px "
                f"{place} of {self._path}: {error}. The file is damaged there; copy it anew."
            ) from error
        if part.dtype != np.uint8 or part.ndim != 3 or part.shape[2] not in (3, 4):
            raise SlideError(
                f"slide '{self._slide_id}': pixels must be 8-bit RGB or RGBA, got {part.dtype} {part.shape} "
                f"({self._path}). Choose the reader openslide or auto."
            )
        return whiten(part) if part.shape[2] == 4 else part


def _facts(image: Any) -> SlideFacts:
    """Read what the file says of itself."""
    levels = image.resolutions
    sizes = tuple((int(width), int(height)) for width, height in levels["level_dimensions"])
    mpp_x, mpp_y = _mpp(image)
    metadata = image.metadata
    aperio = metadata.get("aperio", {}) if isinstance(metadata, Mapping) else {}
    return SlideFacts(
        vendor="aperio" if aperio else "tiff",
        level_sizes=sizes,
        level_downsamples=tuple(float(value) for value in levels["level_downsamples"]),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        magnification=float(aperio["AppMag"]) if "AppMag" in aperio else None,
        bounds=Rectangle(0, 0, *sizes[0]),
    )


def _mpp(image: Any) -> tuple[float | None, float | None]:
    """Pitch along x and y in µm/px; None where cuCIM gives it in no unit of length."""
    spacing, units = image.spacing("XY"), image.spacing_units("XY")
    found = [
        float(value) * _LENGTHS_UM[unit] if unit in _LENGTHS_UM else None
        for value, unit in zip(spacing, units, strict=True)
    ]
    return found[0], found[1]
