"""A picture of what will be read from a slide: thumbnail, tissue outline, tiles."""

import cv2
import numpy as np

from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import TileGrid
from acmil.preprocessing.tissue import Tissue

OUTLINE_RGB = (0, 130, 60)  # Greens and blues stand out against the pinks and purples of H&E.
TILE_RGB = (0, 70, 190)
_TILE_OPACITY = 0.55


def preview_image(
    slide: Slide, tissue: Tissue, grid: TileGrid, *, min_side_px: int = 1000, max_side_px: int = 2000
) -> np.ndarray:
    """Draw the tissue outline and the tiles over a thumbnail.

    The thumbnail has the resolution at which the tissue was found, held so that its longer side is within
    `min_side_px` (less where level 0 is smaller) and `max_side_px`.

    Args:
        slide: The slide.
        tissue: Its tissue.
        grid: Its tiles; may be empty.
        min_side_px: Longer side of the picture of a small slide, in pixels.
        max_side_px: Longer side of the picture of a large slide, in pixels.

    Returns:
        uint8 RGB (h, w, 3).

    Raises:
        SlideError: If the slide cannot be read.
    """
    side_px = min(max(*tissue.mask.shape, min_side_px), max_side_px)
    thumbnail = slide.thumbnail_within(side_px)
    width = max(1, round(max(thumbnail.image.shape) / 1000))  # Of the outline, px.
    picture = _with_tiles(thumbnail.image, grid, downsample=thumbnail.downsample)
    rings = [ring for polygon in tissue.polygons for ring in (polygon.exterior, *polygon.holes)]
    points = [np.rint(ring / thumbnail.downsample).astype(np.int32) for ring in rings]  # (M, 2) each
    return cv2.polylines(picture, points, isClosed=True, color=OUTLINE_RGB, thickness=2 * width, lineType=cv2.LINE_AA)


def _with_tiles(image: np.ndarray, grid: TileGrid, *, downsample: float) -> np.ndarray:
    """Outline the tiles, half transparent so that the tissue under a dense grid can still be seen."""
    drawn = image.copy()
    corners = np.rint(np.hstack([grid.coords, grid.coords + grid.tile_level0_px]) / downsample).astype(int)  # (N, 4)
    for left, top, right, bottom in corners.tolist():
        cv2.rectangle(drawn, (left, top), (right, bottom), TILE_RGB, 1)
    return cv2.addWeighted(drawn, _TILE_OPACITY, image, 1 - _TILE_OPACITY, 0)
