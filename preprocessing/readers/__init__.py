"""What `Slide` asks of a library that reads slide files: one module a library, all behind one protocol."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


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
