"""One slide from its file to its tiles' coordinates: open, find tissue, lay the grid."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acmil.preprocessing.previews import preview_image
from acmil.preprocessing.readers import ReaderName
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.stain import StainMap, StainMethod, estimate_stain_map
from acmil.preprocessing.tiling import TileGrid, tile_grid
from acmil.preprocessing.tissue import Tissue, TissuePreset, find_tissue, given_tissue


@dataclass(frozen=True, eq=False)
class PreparedSlide:
    """A slide with its tiles laid out.

    Attributes:
        source: The slide that was asked for.
        slide: The slide, open until its last tile has been read.
        tissue: Its tissue.
        grid: Its tiles; may be empty.
        preview: Picture of tissue and tiles, uint8 RGB (h, w, 3), or None.
        seconds: The time this took.
        stain_map: Turns the slide's colours into the reference's, or None.
    """

    source: SlideSource
    slide: Slide
    tissue: Tissue
    grid: TileGrid
    preview: np.ndarray | None
    seconds: float
    stain_map: StainMap | None = None


def prepare_slide(
    source: SlideSource,
    *,
    tile_px: int,
    tile_mpp: float,
    overlap_px: int,
    min_tissue: float,
    tissue_mpp: float,
    previews: bool,
    reader: ReaderName = "auto",
    tissue: TissuePreset = "brightfield",
    remove_ink: bool = True,
    tissue_from: Path | None = None,
    stain_normalisation: StainMethod = "none",
) -> PreparedSlide:
    """Open a slide, find its tissue and lay its tiles; options as in `PreprocessConfig`.

    Raises:
        SlideError: If the slide cannot be opened or read, or has no usable resolution, or no usable outlines are given,
            or its stains cannot be estimated.
    """
    start = time.perf_counter()
    slide = Slide.open(source.path, slide_id=source.slide_id, mpp=source.mpp, reader=reader)
    try:
        if tissue_from is None:
            found = find_tissue(slide, mpp=tissue_mpp, preset=tissue, remove_ink=remove_ink)
        else:
            found = given_tissue(slide, tissue_from, mpp=tissue_mpp)
        grid = tile_grid(slide, found, tile_px=tile_px, tile_mpp=tile_mpp, overlap_px=overlap_px, min_tissue=min_tissue)
        preview = preview_image(slide, found, grid) if previews else None
        stain_map = None
        if stain_normalisation != "none" and len(grid):
            stain_map = estimate_stain_map(slide, grid, stain_normalisation)
    except BaseException:
        slide.close()
        raise
    return PreparedSlide(source, slide, found, grid, preview, time.perf_counter() - start, stain_map)
