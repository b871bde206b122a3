"""Figures of merit: ROC curves, training curves, attention concentration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from acmil.figures.style import CATEGORY_COLOURS, GREY, caption, new_figure, plain, quiet_axes

_PANELS_IN_ROW = 3
_LINES = ("-", "--", "-.", ":")


def roc_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "ROC", note: str = "") -> Figure:
    """Draw ROC curves.

    Args:
        curves: For each legend text (name, AUROC and its interval) the false and the true positive rates, each (T,).
        title: Title of the figure.
        note: Small print under it: what the slides and the intervals are.

    Returns:
        The figure.
    """
    figure = new_figure(5.4, 5.2 + 0.22 * len(curves))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="chance")
    for i, (name, (false_positive, true_positive)) in enumerate(curves.items()):
        axes.plot(false_positive, true_positive, label=plain(name), lw=2, **_line(i))
    quiet_axes(axes, xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (sensitivity)")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_title(plain(title), fontsize=11)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    if note:
        axes.set_xlabel(f"{axes.get_xlabel()}\n{note}", fontsize=9)
    return figure


def _line(i: int) -> dict[str, Any]:
    return {"color": CATEGORY_COLOURS[i % 7], "ls": _LINES[(i // 7) % 4]}  # yellow is too faint for a line


_PANELS = (
    ("loss", "loss"),
    ("validation metric", ""),
    ("attention entropy (1 = even)", "entropy"),
    ("attention on the top 10 tiles", "mass"),
    ("learning rate", "learning_rate"),
)


def training_curves_figure(
    history: Mapping[str, Sequence[float] | np.ndarray], *, selected_epoch: int | None = None, title: str = "training"
) -> Figure:
    """Draw the columns of a run's history against the epoch: losses, metrics, attention, learning rate.

    Args:
        history: Column name to one value an epoch (a data frame of `history.csv` will do). Columns are sorted into
            panels by what their names contain: loss, entropy, mass, learning_rate; the others are metrics.
        selected_epoch: Epoch whose weights the run keeps.
        title: Title of the figure.

    Returns:
        The figure; a panel without columns is left out.
    """
    columns = {name: np.asarray(values, dtype=float) for name, values in history.items() if _is_curve(name, values)}
    epochs = np.asarray(history["epoch"]) if "epoch" in history else np.arange(len(next(iter(columns.values()), ())))
    groups: dict[str, list[str]] = {name: [] for name, _ in _PANELS}
    for column in columns:
        groups[_panel_of(column)].append(column)
    shown = [name for name, _ in _PANELS if groups[name]]
    rows = -(-len(shown) // _PANELS_IN_ROW)
    figure = new_figure(4.2 * _PANELS_IN_ROW, 3.3 * rows + 0.4)
    grid = figure.subplots(rows, _PANELS_IN_ROW, squeeze=False).ravel()
    for axes, name in zip(grid, shown, strict=False):
        _curves_panel(axes, epochs, {column: columns[column] for column in groups[name]}, name, selected_epoch)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(plain(title), fontsize=12)
    if selected_epoch is not None:
        caption(figure, f"Dotted line: epoch {selected_epoch}, whose weights the run keeps.")
    return figure


def _is_curve(name: str, values: Sequence[float] | np.ndarray) -> bool:
    kind = np.asarray(values).dtype.kind
    return name not in ("epoch", "seconds", "step") and kind in "fiu" and bool(np.isfinite(values).any())


def _panel_of(column: str) -> str:
    return next((name for name, key in _PANELS if key and key in column), "validation metric")


def _curves_panel(
    axes: Axes, epochs: np.ndarray, curves: Mapping[str, np.ndarray], name: str, selected_epoch: int | None
) -> None:
    for i, (column, values) in enumerate(curves.items()):
        axes.plot(epochs, values, label=column.replace("_", " "), lw=1.6, **_line(i))
    if selected_epoch is not None:
        axes.axvline(selected_epoch, color=GREY, ls=":", lw=1.2)
    quiet_axes(axes, xlabel="epoch")
    axes.set_title(name, fontsize=10)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if len(curves) > 1:
        axes.margins(y=0.08)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def concentration_figure(
    curves: Mapping[str, Sequence[np.ndarray]], *, title: str = "attention concentration"
) -> Figure:
    """Compare how models spread attention: share of the k most attended tiles, median and quartiles over slides.

    Args:
        curves: For each model, the concentration curve of every slide, each of shape (N,), rising to 1.
        title: Title of the figure.

    Returns:
        The figure.

    Reference:
        Zhang et al., Attention-Challenging Multiple Instance Learning, ECCV 2024, arXiv 2311.07125.
    """
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    longest = max((len(curve) for group in curves.values() for curve in group), default=1)
    k = np.unique(np.rint(np.geomspace(1, longest, 80)).astype(int))
    for i, (name, group) in enumerate(curves.items()):
        shares = np.stack([curve[np.minimum(k, len(curve)) - 1] for curve in group])  # (slides, len(k))
        low, middle, high = np.percentile(shares, [25, 50, 75], axis=0)
        axes.fill_between(k, low, high, color=_line(i)["color"], alpha=0.15, lw=0)
        axes.plot(k, middle, label=plain(f"{name} ({len(group)} slides)"), lw=2, **_line(i))
    axes.set(xscale="log", xlim=(1, max(longest, 2)), ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25, lw=0.6)
    quiet_axes(axes, xlabel="k, tiles in falling order of attention", ylabel="share of attention on the top k tiles")
    axes.set_title(plain(title), fontsize=11)
    axes.legend(fontsize=8, loc="lower right")
    caption(figure, "Line: median over slides; band: quartiles. A steeper rise: the model rests on fewer tiles.")
    return figure
