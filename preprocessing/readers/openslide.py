"""The OpenSlide reader (https://openslide.org), through its Python binding."""

import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide

from acmil.preprocessing.readers import Rectangle, SlideError, SlideFacts, whiten
from acmil.preprocessing.readers.description import described_mpp

# PIL's own errors on pixel data are OSError or ValueError; a path that cannot be read is an OSError.
_READ_ERRORS = (openslide.OpenSlideError, OSError, ValueError)


class OpenSlideReader:
    """Reads one slide file through one shared OpenSlide handle.

    OpenSlide is thread-safe: it decodes outside its locks and without Python's, so threads that share a handle scale
    like threads with a handle each, and share its cache of decoded blocks and its parsed index, so memory does not
    grow with the threads. Its errors are sticky, though: once a read has failed, every later call on that handle
    fails, in all threads. A failed handle is therefore dropped and the read tried once more on a fresh one, which
    tells a broken place in the file from an error caught from another thread.
    """

    def __init__(self, path: Path, *, slide_id: str) -> None:
        self._path = path
        self._slide_id = slide_id
        self._lock = threading.Lock()
        self._closed = False
        if not path.exists():
            raise SlideError(f"slide '{slide_id}': no such file: {path}")
        handle = self._open()
        self._handle: openslide.OpenSlide | None = handle
        self._facts = _facts(handle)

    @property
    def facts(self) -> SlideFacts:
        """What the file says of itself."""
        return self._facts

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        """Read a rectangle of one pyramid level as uint8 RGB (height_px, width_px, 3); see `SlideReader.read`."""
        region = (x_level0_px, y_level0_px), level, (width_px, height_px)
        handle = self._current()
        try:
            return whiten(np.asarray(handle.read_region(*region)))
        except _READ_ERRORS:
            self._drop(handle)
        fresh = self._open()
        try:
            pixels = whiten(np.asarray(fresh.read_region(*region)))
        except _READ_ERRORS as error:
            raise SlideError(
                f"slide '{self._slide_id}': cannot read {width_px} x {height_px} px of level {level} at level-0 px "
                f"({x_level0_px}, {y_level0_px}) of {self._path}: {error}. The file is damaged there; copy it anew."
            ) from error
        self._adopt(fresh)
        return pixels

    def close(self) -> None:
        """Let the file go; reading afterwards is an error."""
        # The native handle closes with its last reference, so a read that is still under way in another thread ends
        # well. Closing it by name here would free memory under that read.
        with self._lock:
            self._closed = True
            self._handle = None

    def _open(self) -> openslide.OpenSlide:
        """A fresh native handle."""
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            if self._path.is_dir() or not os.access(self._path, os.R_OK):
                why = "is a folder" if self._path.is_dir() else "permission denied"
                raise SlideError(f"slide '{self._slide_id}': cannot read {self._path}: {why}.") from error
            raise SlideError(
                f"slide '{self._slide_id}': not a slide format that OpenSlide reads: {self._path}. "
                "Check that the file is whole, or convert it to a pyramidal TIFF."
            ) from error
        except _READ_ERRORS as error:
            raise SlideError(f"slide '{self._slide_id}': cannot open {self._path}: {error}") from error

    def _current(self) -> openslide.OpenSlide:
        """The shared handle, opened anew where the last one was dropped."""
        with self._lock:
            if self._closed:
                raise SlideError(f"slide '{self._slide_id}': read after it was closed: {self._path}")
            if self._handle is None:
                self._handle = self._open()
            return self._handle

    def _drop(self, handle: openslide.OpenSlide) -> None:
        """Stop handing out `handle`, unless another thread has replaced it already."""
        with self._lock:
            if self._handle is handle:
                self._handle = None

    def _adopt(self, handle: openslide.OpenSlide) -> None:
        """Share a handle that is known to work, where none is shared."""
        with self._lock:
            if self._handle is None and not self._closed:
                self._handle = handle


def detected_format(path: Path) -> str | None:
    """Name of the format that OpenSlide takes a file for; None where it knows none or there is no file."""
    return openslide.OpenSlide.detect_format(path)


def _facts(handle: openslide.OpenSlide) -> SlideFacts:
    """Read what the file says of itself."""
    properties = handle.properties
    width, height = handle.dimensions
    bounds = [
        _number(properties.get(name))
        for name in (
            openslide.PROPERTY_NAME_BOUNDS_X,
            openslide.PROPERTY_NAME_BOUNDS_Y,
            openslide.PROPERTY_NAME_BOUNDS_WIDTH,
            openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
        )
    ]
    mpp_x, mpp_y = _mpp(properties, (width, height))
    return SlideFacts(
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        level_sizes=tuple(handle.level_dimensions),
        level_downsamples=tuple(handle.level_downsamples),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        magnification=_number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)),
        bounds=scanned_bounds(bounds, width=width, height=height),
    )


def _mpp(properties: Mapping[str, str], size: tuple[int, int]) -> tuple[float | None, float | None]:
    """The resolution that OpenSlide gives, else the one that ImageJ or OME state in the description of a TIFF."""
    names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    mpp_x, mpp_y = (_number(properties.get(name)) for name in names)
    if mpp_x is None and mpp_y is None:
        density_x, density_y = (_number(properties.get(f"tiff.{axis}Resolution")) or 0.0 for axis in "XY")
        description = properties.get("tiff.ImageDescription", "")
        stated = described_mpp(description, size=size, density=(density_x, density_y))
        mpp_x, mpp_y = (None, None) if stated is None else (_number(stated[0]), _number(stated[1]))
    return mpp_x, mpp_y


def scanned_bounds(stated: list[float | None], *, width: int, height: int) -> Rectangle:
    """The stated (x, y, width, height) cut to the level of `width` x `height` px; all of it where one is missing."""
    if any(value is None for value in stated):
        return Rectangle(0, 0, width, height)
    left, top, bounds_width, bounds_height = (int(value) for value in stated if value is not None)
    right, bottom = min(left + bounds_width, width), min(top + bounds_height, height)
    left, top = max(left, 0), max(top, 0)
    if right <= left or bottom <= top:
        return Rectangle(0, 0, width, height)
    return Rectangle(left, top, right - left, bottom - top)


def _number(text: str | float | None) -> float | None:
    """A property as a finite number, None where it is absent or no number."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
