"""Pure arithmetic of resolutions, pyramid levels and tile grids.

Lengths on the slide are µm, pitches µm/px (mpp), positions level-0 pixels. Nominal magnifications (20x, 40x) play no
part: scanners disagree on them by 10 % and more (0.2275 and 0.2525 µm/px are both sold as 40x).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from acmil.preprocessing.readers import Rectangle, SlideError

RESOLUTION_TOLERANCE = 0.05  # Relative error of a pitch below which two pitches count as the same.
MPP_RANGE_UM_PER_PX = (0.05, 20.0)  # Finer than light resolves, coarser than any cell: metadata outside it is wrong.


@dataclass(frozen=True)
class LevelChoice:
    """A pyramid level to read, its level-0 pixels per pixel, and the factor to shrink by after reading."""

    index: int
    downsample: float
    shrink: float


def select_level(
    level_downsamples: Sequence[float], *, downsample: float, tolerance: float = RESOLUTION_TOLERANCE
) -> LevelChoice:
    """Choose the coarsest pyramid level that is not coarser than asked.

    A level that is coarser by less than `tolerance` counts: level sizes are floored to whole pixels, so a stated
    downsample of 2.0005 is a true 2.

    Args:
        level_downsamples: Level-0 pixels per pixel of each level, finest first.
        downsample: Level-0 pixels per pixel wanted, > 0.
        tolerance: Relative error under which a level counts as exact, in [0, 1).

    Returns:
        The level and the factor to shrink by after reading it; a factor just under 1 is within `tolerance`.

    Raises:
        SlideError: If `downsample` is finer than every level beyond `tolerance`: pixels would have to be made up.
    """
    usable = [i for i, level in enumerate(level_downsamples) if level <= downsample * (1 + tolerance)]
    if not usable:
        raise SlideError(
            f"asked for {downsample:.4g} level-0 px per px, finer than the slide's finest level "
            f"({min(level_downsamples):.4g}) by more than {tolerance:.0%}. Ask for a coarser resolution."
        )
    index = max(usable, key=lambda i: level_downsamples[i])
    return LevelChoice(index, level_downsamples[index], downsample / level_downsamples[index])


def tile_side_level0_px(*, tile_px: int, tile_mpp: float, slide_mpp: float) -> int:
    """Round the side of a tile of `tile_px` at `tile_mpp` µm/px to whole level-0 pixels, at least 1."""
    return max(1, round(tile_px * tile_mpp / slide_mpp))


def measured_mpp(*, tile_level0_px: int, tile_px: int, slide_mpp: float) -> float:
    """Pitch in µm/px that a tile has once `tile_level0_px` level-0 pixels are resampled to `tile_px`."""
    return tile_level0_px * slide_mpp / tile_px


def tile_step_level0_px(*, tile_px: int, overlap_px: int, tile_level0_px: int) -> int:
    """Round the distance between neighbouring tiles to whole level-0 pixels, at least 1."""
    return max(1, round((tile_px - overlap_px) * tile_level0_px / tile_px))


def grid_coords(area: Rectangle, *, side_level0_px: int, step_level0_px: int) -> np.ndarray:
    """Top-left corners of all whole squares in `area`, from its top-left corner on.

    Args:
        area: Where the squares must lie, level-0 pixels.
        side_level0_px: Side of a square in level-0 pixels.
        step_level0_px: Distance between neighbours in level-0 pixels.

    Returns:
        int64 (N, 2) of (x, y) in level-0 pixels, sorted by y, then x; N = 0 where no square fits.
    """
    x = np.arange(area.x, area.x + area.width - side_level0_px + 1, step_level0_px, dtype=np.int64)  # (columns,)
    y = np.arange(area.y, area.y + area.height - side_level0_px + 1, step_level0_px, dtype=np.int64)  # (rows,)
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)  # (N, 2)


def thumbnail_side_px(side_level0_px: int, downsample: float) -> int:
    """Pixels that a side needs at `downsample` so that its last level-0 pixel is inside, at least 1."""
    return max(1, math.ceil(side_level0_px / downsample - 1e-6))  # 1e-6: 2000.0000001 px is 2000, not 2001.


def check_mpp(mpp: float, *, source: str, slide_id: str) -> float:
    """Return `mpp` if it can be a slide's pixel pitch in µm/px; SlideError naming the range otherwise."""
    low, high = MPP_RANGE_UM_PER_PX
    if not low <= mpp <= high:  # False for NaN as well.
        raise SlideError(
            f"slide '{slide_id}': resolution must be within {low} to {high:g} µm/px, got {mpp:.6g} ({source}). "
            f"State the true one with --mpp-override or in the mpp column of the slide list."
        )
    return mpp
