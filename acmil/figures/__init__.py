"""Figures: arrays in, matplotlib `Figure` out; saving is the caller's."""

from acmil.figures.embedding import umap_figure, umap_slide_figure
from acmil.figures.heatmap import heatmap_figure, top_tiles_figure
from acmil.figures.performance import concentration_figure, roc_figure, training_curves_figure
from acmil.figures.slide import slide_figure, tile_sheet_figure

__all__ = [
    "concentration_figure",
    "heatmap_figure",
    "roc_figure",
    "slide_figure",
    "tile_sheet_figure",
    "top_tiles_figure",
    "training_curves_figure",
    "umap_figure",
    "umap_slide_figure",
]
