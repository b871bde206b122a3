"""The map of instance features: one point a tile, coloured by attention, label, slide and branch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from acmil.figures.style import CATEGORY_COLOURS, caption, category_colours, new_figure, plain
from acmil.overlay import ColourScale, relative_scale

LEGEND_LIMIT = len(CATEGORY_COLOURS)  # beyond it two names would have one colour
_PANEL_IN = 4.4
_FACE = "#F2F2F2"
_ATTENTION_FACE = "#BFBFBF"  # dark enough for the pale middle of the attention colours
_OTHER_TILES = "#A0A0A0"


def umap_figure(
    embedding: np.ndarray,
    *,
    relative_attention: np.ndarray,
    slides: Sequence[str],
    labels: Sequence[str] | None = None,
    branches: np.ndarray | None = None,
    truth: Sequence[str] | None = None,
    scale: ColourScale | None = None,
    title: str = "",
    note: str = "",
) -> Figure:
    """Show one embedding several times, each panel coloured by another property of the tiles.

    Args:
        embedding: Position of each tile, shape (M, 2).
        relative_attention: Attention × N of each tile within its slide, shape (M,).
        slides: Slide of each tile, length M.
        labels: Label of each tile's slide, length M.
        branches: Branch that attends most to each tile, shape (M,).
        truth: What is known of each tile itself (inside a lesion or not), length M.
        scale: Colours of attention.
        title: Title of the figure.
        note: A sentence to add under the figure: how the tiles were chosen.

    Returns:
        The figure, one panel a property given.
    """
    scale = scale or relative_scale()
    categories: list[tuple[str, list[str]]] = []
    if labels is not None:
        categories.append(("label of the slide", list(labels)))
    if truth is not None:
        categories.append(("known of the tile", list(truth)))
    categories.append(("slide", list(slides)))
    if branches is not None:
        categories.append(("branch that attends most", [f"branch {k}" for k in branches]))
    panels = 1 + len(categories)
    columns = panels if panels <= 3 else 2
    rows = -(-panels // columns)
    figure = new_figure(_PANEL_IN * columns + 0.6, _PANEL_IN * rows + 1.0)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    _attention_panel(figure, grid[0], embedding, relative_attention, scale)
    for axes, (name, values) in zip(grid[1:], categories, strict=False):
        _category_panel(axes, embedding, values, name)
    for axes in grid[panels:]:
        axes.set_axis_off()
    figure.suptitle(plain(title or "UMAP of the instance features"), fontsize=12)
    text = (
        f"{len(embedding):,} tiles of {len(set(slides))} slides. Near points have like features; axes and distances "
        "between groups have no unit. 1× is the attention of each tile if the model preferred none in its slide."
    )
    caption(figure, f"{text} {note}".strip())
    return figure


def umap_slide_figure(
    embedding: np.ndarray,
    *,
    relative_attention: np.ndarray,
    in_slide: np.ndarray,
    attended: np.ndarray,
    title: str,
    scale: ColourScale | None = None,
) -> Figure:
    """Show where the tiles of one slide lie among those of all slides, the attended ones ringed.

    Args:
        embedding: Position of each tile of the cohort's sample, shape (M, 2).
        relative_attention: Attention × N of each tile, shape (M,).
        in_slide: True for the tiles of the slide, shape (M,).
        attended: True for tiles to ring (counted only inside the slide), shape (M,).
        title: Title of the figure.
        scale: Colours of attention.

    Returns:
        The figure.
    """
    scale = scale or relative_scale()
    figure = new_figure(6.4, 5.6)
    axes = figure.subplots()
    _prepare(axes, embedding, face=_ATTENTION_FACE)
    _small_points(axes, embedding, ~in_slide, _OTHER_TILES)
    order = np.flatnonzero(in_slide)[np.argsort(relative_attention[in_slide])]
    ringed = attended[order]
    axes.scatter(
        embedding[order, 0],
        embedding[order, 1],
        s=36,
        c=scale.colours(relative_attention[order]) / 255,
        edgecolors=np.where(ringed, "black", "none").tolist(),
        linewidths=1.2,
    )
    handles = [_dot(_OTHER_TILES, "tiles of other slides"), _dot("white", "attended above the threshold", edge="black")]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=2, fontsize=8, frameon=False)
    _attention_bar(figure, axes, scale)
    axes.set_title(plain(title), fontsize=11)
    return figure


def _attention_panel(figure: Figure, axes: Axes, embedding: np.ndarray, values: np.ndarray, scale: ColourScale) -> None:
    order = np.argsort(values, kind="stable")  # the few attended tiles on top of the many others
    _prepare(axes, embedding, face=_ATTENTION_FACE)
    _small_points(axes, embedding, order, scale.colours(np.asarray(values)[order]) / 255)
    axes.set_title("attention", fontsize=10)
    _attention_bar(figure, axes, scale)


def _attention_bar(figure: Figure, axes: Axes, scale: ColourScale) -> None:
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.cmap), ax=axes, fraction=0.05, pad=0.02)
    bar.set_ticks(list(scale.ticks), labels=list(scale.tick_labels))
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label(scale.label, fontsize=8)


def _category_panel(axes: Axes, embedding: np.ndarray, values: list[str], name: str) -> None:
    names = sorted(set(values), key=_natural_key)
    colours = category_colours(names)
    order = np.random.default_rng(0).permutation(len(values))  # no category is drawn over the others
    _prepare(axes, embedding)
    points = [colours[values[i]] for i in order]
    _small_points(axes, embedding, order, points)
    if len(names) > LEGEND_LIMIT:
        axes.set_title(plain(f"{name} ({len(names)}; colours repeat)"), fontsize=10)
        return
    axes.set_title(plain(name), fontsize=10)
    handles = [_dot(colours[n], n) for n in names]
    columns = min(len(names), 3 if max(map(len, names)) <= 14 else 2)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=columns, fontsize=8, frameon=False
    )


def _natural_key(name: str) -> tuple[int, str]:
    return (len(name), name) if name.rstrip("0123456789") != name else (0, name)


def _dot(colour: str, label: str, *, edge: str = "none") -> Line2D:
    return Line2D([], [], ls="", marker="o", color=colour, markeredgecolor=edge, markersize=6, label=plain(label))


def _prepare(axes: Axes, embedding: np.ndarray, *, face: str = _FACE) -> None:
    low, high = embedding.min(axis=0), embedding.max(axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    axes.set(xticks=[], yticks=[], facecolor=face)
    axes.spines[:].set_visible(False)


def _small_points(axes: Axes, embedding: np.ndarray, rows: np.ndarray, colours: Any) -> None:
    size = float(np.clip(20000 / max(len(embedding), 1), 3.0, 25.0))
    axes.scatter(embedding[rows, 0], embedding[rows, 1], s=size, c=colours, lw=0, rasterized=True)
