"""A slide seen whole, with its outlines, and sheets of its tiles."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from acmil.figures.style import caption, draw_scale_bar, length_text, new_figure, plain

_TILE_IN = 1.5
_OUTLINE_COLOUR = "#008a3c"  # stands out against the pinks and purples of H&E


def slide_figure(
    images: Sequence[np.ndarray],
    *,
    titles: Sequence[str],
    um_per_px: float,
    outlines: Sequence[np.ndarray] = (),
    panel_in: float = 5.0,
    note: str = "",
) -> Figure:
    """Show pictures of one slide side by side, the last one with outlines, each with a scale bar.

    Args:
        images: RGB, uint8, all of one shape (h, w, 3).
        titles: One a picture.
        um_per_px: Size of a pixel of the pictures in µm.
        outlines: Rings (M, 2) of (x, y) in pixels of the pictures.
        panel_in: Longer side of a picture in inches.
        note: Small print under the figure.

    Returns:
        The figure.
    """
    height, width = images[0].shape[:2]
    panel = panel_in / max(width, height)
    figure = new_figure(len(images) * max(width * panel, 2.2) + 0.4, height * panel + 0.8)
    panels = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, image, title in zip(panels, images, titles, strict=True):
        axes.imshow(image)
        axes.set_title(plain(title), fontsize=10)
        axes.set_axis_off()
        draw_scale_bar(axes, um_per_px=um_per_px, width_px=width, height_px=height)
    for ring in outlines:
        x, y = np.vstack([ring, ring[:1]]).T - 0.5  # imshow puts pixel centres at whole numbers
        panels[-1].plot(x, y, color=_OUTLINE_COLOUR, lw=1.6)
    for axes in panels:
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if note:
        caption(figure, note)
    return figure


def tile_sheet_figure(
    rows: Sequence[Sequence[np.ndarray]], *, row_titles: Sequence[str], tile_um: float, note: str = ""
) -> Figure:
    """Show rows of tiles, a title before each row.

    Args:
        rows: RGB images, uint8, each (S, S, 3); rows may differ in length.
        row_titles: One a row, "" for none.
        tile_um: Side of a tile in µm.
        note: Small print under the figure, after the size of the tiles.

    Returns:
        The figure.
    """
    columns = max(len(row) for row in rows)
    figure = new_figure(max(_TILE_IN * columns + 1.0, 4.0), _TILE_IN * len(rows) + 0.5)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for places, row, title in zip(grid, rows, row_titles, strict=True):
        for axes, tile in zip(places, row, strict=False):
            axes.imshow(tile)
            _without_ticks(axes)
        for axes in places[len(row) :]:
            axes.set_axis_off()
        places[0].set_ylabel(title, fontsize=9)
    caption(figure, f"Each tile is {length_text(round(tile_um, 1))} wide. {note}".strip())
    return figure


def _without_ticks(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
