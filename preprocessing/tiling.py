"""Tissue and geometry to tile coordinates, always in the same order."""

from dataclasses import dataclass

import numpy as np

from acmil.preprocessing.geometry import (
    RESOLUTION_TOLERANCE,
    grid_coords,
    measured_mpp,
    tile_side_level0_px,
    tile_step_level0_px,
)
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.tissue import Tissue, area_fraction


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one slide.

    Attributes:
        coords: int64 (N, 2) of the tiles' top-left corners (x, y) in level-0 pixels, sorted by y, then x.
        tissue_fraction: float32 (N,), share of each tile that is tissue, in [0, 1].
        tile_px: Side of a tile in its own pixels.
        tile_level0_px: Side of a tile in level-0 pixels, a whole number.
        tile_mpp: Pitch of a tile's own pixels in µm/px as measured: tile_level0_px * slide mpp / tile_px.
        overlap_px: Pixels of a tile that its neighbour repeats.
    """

    coords: np.ndarray
    tissue_fraction: np.ndarray
    tile_px: int
    tile_level0_px: int
    tile_mpp: float
    overlap_px: int

    def __len__(self) -> int:
        return len(self.coords)


def tile_grid(
    slide: Slide,
    tissue: Tissue,
    *,
    tile_px: int,
    tile_mpp: float,
    overlap_px: int = 0,
    min_tissue: float = 0.25,
) -> TileGrid:
    """Lay a regular grid over the scanned area and keep the tiles with enough tissue.

    The grid begins at the top-left corner of the scanned area (level-0 (0, 0) in most formats) and holds whole tiles
    only.

    Args:
        slide: The slide; needs a resolution.
        tissue: Its tissue.
        tile_px: Side of a tile in its own pixels.
        tile_mpp: Pitch of a tile's own pixels in µm/px.
        overlap_px: Pixels of a tile that its neighbour repeats, in [0, tile_px).
        min_tissue: Smallest share of tissue that a tile must have, in [0, 1]; 0 keeps every tile.

    Returns:
        The tiles; none where the slide is smaller than a tile or has no tissue.

    Raises:
        SlideError: If the slide has no usable resolution, or `tile_mpp` is finer than it by more than 5 %.
        ValueError: If an option is out of its range.
    """
    _check_options(tile_px=tile_px, tile_mpp=tile_mpp, overlap_px=overlap_px, min_tissue=min_tissue)
    if slide.mpp > tile_mpp * (1 + RESOLUTION_TOLERANCE):
        raise SlideError(
            f"slide '{slide.slide_id}': tile_mpp must be at least level 0's {slide.mpp:.4g} µm/px (less "
            f"{RESOLUTION_TOLERANCE:.0%}), got {tile_mpp:.4g} ({slide.path}). Tiles are never made up by upsampling: "
            "ask for a coarser tile_mpp, or leave this slide out."
        )
    side = tile_side_level0_px(tile_px=tile_px, tile_mpp=tile_mpp, slide_mpp=slide.mpp)
    step = tile_step_level0_px(tile_px=tile_px, overlap_px=overlap_px, tile_level0_px=side)
    coords = grid_coords(slide.bounds, side_level0_px=side, step_level0_px=step)  # (M, 2)
    fraction = area_fraction(tissue.mask, np.hstack([coords, coords + side]) / tissue.downsample)  # (M,)
    keep = fraction >= min_tissue - 1e-9  # A tile that is all tissue may come out a rounding error under 1.
    return TileGrid(
        coords=coords[keep],
        tissue_fraction=fraction[keep].astype(np.float32),
        tile_px=tile_px,
        tile_level0_px=side,
        tile_mpp=measured_mpp(tile_level0_px=side, tile_px=tile_px, slide_mpp=slide.mpp),
        overlap_px=overlap_px,
    )


def _check_options(*, tile_px: int, tile_mpp: float, overlap_px: int, min_tissue: float) -> None:
    """Refuse options that make no grid."""
    if tile_px < 1:
        raise ValueError(f"tile_px must be at least 1, got {tile_px}. Typical values: 224, 256, 512.")
    if not tile_mpp > 0:
        raise ValueError(f"tile_mpp must be > 0 µm/px, got {tile_mpp}. Typical values: 0.25, 0.5, 1.")
    if not 0 <= overlap_px < tile_px:
        raise ValueError(f"overlap_px must be within 0 to tile_px - 1 = {tile_px - 1}, got {overlap_px}.")
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue must be within 0 to 1, got {min_tissue}. It is a share of the tile's area.")
