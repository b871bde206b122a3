"""What `Slide` asks of a library that reads slide files: one module a library, all behind one protocol."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

ReaderName = Literal["auto", "openslide", "pillow", "cucim"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # What "auto" tries as a plain image.


class SlideError(ValueError):
    """A slide cannot be opened, read or measured; the message names the slide and what was being done."""


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of level-0 pixels, (x, y) its top-left corner."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class SlideFacts:
    """What a slide file says of itself.

    Attributes:
        vendor: The file format's name, as the reading library gives it.
        level_sizes: (width, height) of each pyramid level in its own pixels, finest first.
        level_downsamples: Level-0 pixels per pixel of each level; 1.0 first, not always whole numbers.
        mpp_x: Width of a level-0 pixel in µm, None where the file does not say.
        mpp_y: Height of a level-0 pixel in µm, None where the file does not say.
        magnification: Nominal magnification of the objective, None where the file does not say.
        bounds: The scanned part of level 0; the whole of it where the file does not say.
    """

    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp_x: float | None
    mpp_y: float | None
    magnification: float | None
    bounds: Rectangle


class SlideReader(Protocol):
    """Reads rectangles of one slide; safe to call from several threads."""

    @property
    def facts(self) -> SlideFacts:
        """What the file says of itself."""

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        """Read a rectangle of one pyramid level.

        Args:
            level: Index of the level, 0 the finest.
            x_level0_px: Left edge in level-0 pixels.
            y_level0_px: Top edge in level-0 pixels.
            width_px: Width in the level's own pixels.
            height_px: Height in the level's own pixels.

        Returns:
            uint8 RGB (height_px, width_px, 3); white where the slide is transparent or has ended.

        Raises:
            SlideError: If the file is broken there. Other places can still be read afterwards.
        """

    def close(self) -> None:
        """Let the file go; reading afterwards is an error."""


def open_reader(path: Path, *, slide_id: str, reader: ReaderName = "auto") -> SlideReader:
    """Open a slide file with the reader asked for.

    "auto" takes OpenSlide for every format that it knows, with the JPEG tiles of Aperio's slides and of generic
    pyramids decoded directly (`tiff.py`), and Pillow for PNG, JPEG, BMP and the TIFFs that OpenSlide knows not or, of
    no vendor's format, cannot open. The file's ending must be an image's for that: MIRAX slides are JPEG files too,
    whose picture is an overview.

    Raises:
        SlideError: If the file is missing or cannot be opened.
    """
    # Here, as each of them pulls its library in.
    from acmil.preprocessing.readers.openslide import OpenSlideReader, detected_format
    from acmil.preprocessing.readers.pillow import PillowReader
    from acmil.preprocessing.readers.tiff import VENDORS, TiffReader

    if reader == "cucim":
        from acmil.preprocessing.readers.cucim import CucimReader

        return CucimReader(path, slide_id=slide_id)
    if reader == "pillow":
        return PillowReader(path, slide_id=slide_id)
    is_image = reader == "auto" and path.suffix.lower() in IMAGE_SUFFIXES
    if is_image and detected_format(path) is None:
        return PillowReader(path, slide_id=slide_id)
    try:
        opened = OpenSlideReader(path, slide_id=slide_id)
    except SlideError as error:
        if not is_image or detected_format(path) != "generic-tiff":
            raise
        try:
            return PillowReader(path, slide_id=slide_id)
        except SlideError as second:
            raise error from second
    is_direct = reader == "auto" and opened.facts.vendor in VENDORS and hasattr(os, "pread")
    return TiffReader(opened, path=path) if is_direct else opened


def within(left: int, top: int, width: int, height: int, *, size: tuple[int, int]) -> Rectangle | None:
    """The part of a rectangle that lies inside an image of `size` (width, height); None where there is none."""
    right, bottom = min(left + width, size[0]), min(top + height, size[1])
    left, top = max(left, 0), max(top, 0)
    return Rectangle(left, top, right - left, bottom - top) if right > left and bottom > top else None


def whiten(rgba: np.ndarray) -> np.ndarray:
    """Lay uint8 RGBA (h, w, 4) on white: gaps in the scan (MRXS) and what lies over the edge are transparent."""
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if alpha.min() < 255:
        share = alpha[..., None].astype(np.float32) / 255
        rgb = np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)
    return rgb
