"""The attention map of a slide beside its plain thumbnail, and its most attended tiles."""

from collections.abc import Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from acmil.figures.style import caption, draw_scale_bar, length_text, new_figure, plain
from acmil.overlay import ColourScale, blend, relative_scale

_PANEL_IN = 6.0
_OUTLINE_COLOUR = "black"


def heatmap_figure(
    thumbnail: np.ndarray,
    raster: np.ndarray,
    *,
    downsample: float,
    mpp: float,
    title: str,
    prediction: str = "",
    scale: ColourScale | None = None,
    opacity: float = 0.5,
    outlines: Sequence[Sequence[np.ndarray]] = (),
    outline_label: str = "outline",
    note: str = "",
) -> Figure:
    """Show a slide twice, plain and under its attention map, with colour bar, scale bar and what the colours mean.

    Args:
        thumbnail: RGB, uint8, shape (h, w, 3).
        raster: Scores over the thumbnail, shape (h, w), NaN = no tile.
        downsample: Level-0 px per thumbnail px.
        mpp: Level-0 resolution in µm/px.
        title: First line, usually the slide's name.
        prediction: Second line: what the model says of the slide.
        scale: Colours of the scores; by default attention relative to uniform.
        opacity: Weight of the colours over the tissue, in [0, 1].
        outlines: Polygons to draw, each a sequence of rings (M, 2) in level-0 px.
        outline_label: What the outlines are, for the legend.
        note: A sentence to put before the explanation of the colours.

    Returns:
        The figure; saving is the caller's.
    """
    scale = scale or relative_scale()
    height, width = raster.shape
    figure = new_figure(*_figure_size(width, height))
    left, right = figure.subplots(1, 2)
    overlay = blend(thumbnail, scale.colours(raster), ~np.isnan(raster), opacity=opacity)
    for axes, image, name in ((left, thumbnail, "tissue"), (right, overlay, "attention")):
        axes.imshow(image)
        axes.set_title(plain(name), fontsize=10)
        axes.set_axis_off()
        draw_scale_bar(axes, um_per_px=mpp * downsample, width_px=width, height_px=height)
        _draw_outlines(axes, outlines, downsample, outline_label)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    _colour_bar(figure, right, scale)
    figure.suptitle(plain(f"{title}\n{prediction}" if prediction else title), fontsize=12)
    caption(figure, f"{note} {scale.caption}".strip())
    return figure


def _figure_size(width_px: int, height_px: int) -> tuple[float, float]:
    panel = _PANEL_IN / max(width_px, height_px)
    return max(2 * width_px * panel + 1.8, 6.5), max(height_px * panel + 1.6, 4.2)


def _colour_bar(figure: Figure, axes: Axes, scale: ColourScale) -> None:
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.cmap), ax=axes, fraction=0.06, pad=0.03)
    bar.set_ticks(list(scale.ticks), labels=list(scale.tick_labels))
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(scale.label, fontsize=9)


def _draw_outlines(axes: Axes, outlines: Sequence[Sequence[np.ndarray]], downsample: float, label: str) -> None:
    halo = [patheffects.withStroke(linewidth=3.2, foreground="white")]  # seen on any colour
    for ring in (ring for polygon in outlines for ring in polygon):
        x, y = np.vstack([ring, ring[:1]]).T / downsample - 0.5  # imshow puts pixel centres at whole numbers
        axes.plot(x, y, color=_OUTLINE_COLOUR, lw=1.4, path_effects=halo)
    if outlines:
        handle = Line2D([], [], color=_OUTLINE_COLOUR, lw=1.4, label=plain(label))
        axes.legend(handles=[handle], loc="upper right", fontsize=8, framealpha=0.9)


def top_tiles_figure(
    tiles: Sequence[np.ndarray],
    values: np.ndarray,
    *,
    tile_um: float,
    labels: Sequence[str] | None = None,
    title: str = "",
    scale: ColourScale | None = None,
    columns: int = 6,
) -> Figure:
    """Show tiles side by side, each framed in the colour of its score.

    Args:
        tiles: RGB images, uint8, each (S, S, 3).
        values: Score of each tile, shape (T,).
        tile_um: Side of a tile in µm.
        labels: Text over each tile; by default its rank and score.
        title: Title of the figure.
        scale: Colours of the scores; by default attention relative to uniform.
        columns: Tiles in a row.

    Returns:
        The figure.
    """
    scale = scale or relative_scale()
    labels = labels if labels is not None else [f"#{i}   {_times(v)}" for i, v in enumerate(values, start=1)]
    columns = min(columns, max(len(tiles), 1))
    rows = -(-max(len(tiles), 1) // columns)
    figure = new_figure(max(1.6 * columns, 4.0), 1.85 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = scale.colours(np.asarray(values)) / 255
    for axes, tile, colour, label in zip(grid, tiles, colours, labels, strict=False):
        axes.imshow(tile)
        axes.set_title(plain(label), fontsize=9)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=5)
    for axes in grid[len(tiles) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(plain(title), fontsize=11)
    caption(figure, f"Each tile is {length_text(round(tile_um, 1))} wide. Frames: {scale.label}.")
    return figure


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.2g}×"
