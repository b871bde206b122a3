"""What the notebook of one slide calls: a slide to try, what is known of it, its tissue, its tiles, its features."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from acmil.figures import slide_figure, tile_sheet_figure
from acmil.preprocessing.feature_file import FeatureFile
from acmil.preprocessing.previews import preview_image
from acmil.preprocessing.readers import open_reader
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.stain import estimate_stain_map
from acmil.preprocessing.tiling import TileGrid
from acmil.preprocessing.tissue import Tissue
from acmil.samples import fetch_sample

SLIDE_VARIABLE, WEIGHTS_VARIABLE = "ACMIL_SLIDE", "ACMIL_WEIGHTS"
_THUMBNAIL_PX = 800
_COLUMNS = 6
_PURPOSES = {
    "features": "features, coordinates and measures of the tiles",
    "previews": "picture of tissue and tiles",
    "tissue": "tissue outlines, for QuPath",
    "tiles": "the tiles as pictures",
    "config.yaml": "options in force, versions",
    "slides.csv": "one row a slide: what came of it",
    "rows": "the slide's row, for processes that share the job",
}


def slide_path() -> Path:
    """The slide to walk through: the environment variable ACMIL_SLIDE, or else a sample, fetched once.

    Raises:
        SampleError: If there is no network and the sample is not in the cache.
    """
    given = os.environ.get(SLIDE_VARIABLE)
    return Path(given) if given else fetch_sample("cmu-1-small-region")


def weights_path() -> Path:
    """Weights of EfficientNet-Lite0: the environment variable ACMIL_WEIGHTS, or else a sample, fetched once.

    Raises:
        SampleError: If there is no network and the sample is not in the cache.
    """
    given = os.environ.get(WEIGHTS_VARIABLE)
    return Path(given) if given else fetch_sample("efficientnet-lite0")


def slide_facts(slide: Slide) -> pd.Series:
    """What the file says of itself: format, size, resolution, pyramid levels."""
    reader = open_reader(slide.path, slide_id=slide.slide_id)
    levels = [f"{width:,} x {height:,}" for width, height in reader.facts.level_sizes]
    factors = [f"{downsample:.4g}" for downsample in reader.facts.level_downsamples]
    reader.close()
    width_mm, height_mm = slide.width * slide.mpp / 1000, slide.height * slide.mpp / 1000
    facts = {
        "file": slide.path.name,
        "size in MB": round(slide.path.stat().st_size / 1e6, 1),
        "format": slide.vendor,
        "level 0 in px": levels[0],
        "on the glass in mm": f"{width_mm:.2f} x {height_mm:.2f}",
        "resolution in µm/px": round(slide.mpp, 4),
        "objective, nominal": "not stated" if slide.magnification is None else f"{slide.magnification:g}x",
        "pyramid levels in px": "; ".join(levels),
        "their downsampling": ", ".join(factors),
    }
    return pd.Series(facts, name=slide.slide_id)


def tissue_figure(slide: Slide, tissue: Tissue) -> Figure:
    """A thumbnail, and the same with the outlines of the tissue."""
    thumbnail = slide.thumbnail_within(_THUMBNAIL_PX)
    rings = [ring / thumbnail.downsample for polygon in tissue.polygons for ring in polygon.rings]
    return slide_figure(
        [thumbnail.image, thumbnail.image],
        titles=["thumbnail", f"tissue, {tissue.fraction:.0%} of the slide"],
        um_per_px=slide.mpp * thumbnail.downsample,
        outlines=rings,
        note="; ".join(tissue.alarms),
    )


def grid_figure(slide: Slide, tissue: Tissue, grid: TileGrid) -> Figure:
    """The tiles over the tissue, as a job's preview shows them."""
    picture = preview_image(slide, tissue, grid)
    um_per_px = slide.mpp * max(slide.width, slide.height) / max(picture.shape)
    return slide_figure([picture], titles=[f"{len(grid):,} tiles"], um_per_px=um_per_px, panel_in=9.0)


def tiles_figure(slide: Slide, grid: TileGrid, *, count: int = 12) -> Figure:
    """Evenly spaced tiles of the grid, in its order, as an encoder gets them."""
    tiles = _some_tiles(slide, grid, count)
    rows = [list(tiles[start : start + _COLUMNS]) for start in range(0, len(tiles), _COLUMNS)]
    note = f"{grid.tile_px} x {grid.tile_px} px at {grid.tile_mpp:.3g} µm/px."
    return tile_sheet_figure(rows, row_titles=[""] * len(rows), tile_um=grid.tile_px * grid.tile_mpp, note=note)


def stains_figure(slide: Slide, grid: TileGrid, *, count: int = _COLUMNS) -> Figure:
    """Tiles as they were scanned, and with each way of stain normalisation.

    Raises:
        SlideError: If the slide's stains cannot be estimated.
    """
    tiles = _some_tiles(slide, grid, count)
    normalised = [estimate_stain_map(slide, grid, method)(tiles) for method in ("macenko", "reinhard")]
    return tile_sheet_figure(
        [list(row) for row in (tiles, *normalised)],
        row_titles=["as scanned", "macenko", "reinhard"],
        tile_um=grid.tile_px * grid.tile_mpp,
        note="Colours are estimated once for the whole slide.",
    )


def files_table(job: Path) -> pd.DataFrame:
    """The files of a job folder with their sizes and what they are for."""
    paths = sorted(path for path in job.rglob("*") if path.is_file())
    names = [path.relative_to(job) for path in paths]
    return pd.DataFrame(
        {
            "file": [name.as_posix() for name in names],
            "kB": [round(path.stat().st_size / 1000, 1) for path in paths],
            "what it is": [_PURPOSES.get(name.parts[0], "") for name in names],
        }
    )


def feature_facts(file: FeatureFile) -> pd.Series:
    """What a feature file holds and where it comes from."""
    meta = file.meta
    facts = {
        "tiles (N)": file.n_tiles,
        "features of a tile (D)": file.n_features,
        "type on the disk": str(file.dtype),
        "encoder": meta.encoder,
        "sha256 of its weights": f"{meta.encoder_digest[:12]}…",
        "tile in px": meta.tile_px,
        "tile in level-0 px": meta.tile_level0_px,
        "tile resolution in µm/px": round(meta.tile_mpp, 4),
        "share of tissue, least and most": "{:.2f}, {:.2f}".format(*np.percentile(file.tissue_fraction(), [0, 100])),
    }
    return pd.Series(facts, name=meta.slide_id)


def _some_tiles(slide: Slide, grid: TileGrid, count: int) -> np.ndarray:
    """Evenly spaced tiles (count, tile_px, tile_px, 3)."""
    chosen = np.linspace(0, len(grid) - 1, min(count, len(grid))).round().astype(int)
    side, tile_px = grid.tile_level0_px, grid.tile_px
    return np.stack(
        [slide.read_tile(x, y, size_level0_px=side, out_px=tile_px) for x, y in grid.coords[chosen].tolist()]
    )
