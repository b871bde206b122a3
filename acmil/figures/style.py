"""What all figures share: palette, sizes, scale bars, wrapped captions."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito, "Color Universal Design": eight colours told apart with any colour vision; yellow last, faint on white.
CATEGORY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
GREY = "#666666"
_CHARACTERS_PER_INCH = 16.0  # of 8-point text, measured generously
_ROUND = (1.0, 2.0, 2.5, 5.0)


def new_figure(width_in: float, height_in: float) -> Figure:
    """Make an empty figure that keeps its texts apart, independent of pyplot's global state."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def category_colours(names: list[str]) -> Mapping[str, str]:
    """Colour of each name, in order; colours repeat after eight."""
    return {name: CATEGORY_COLOURS[i % len(CATEGORY_COLOURS)] for i, name in enumerate(names)}


def plain(text: str) -> str:
    """A text that is shown as it is, whatever names it holds.

    Dollar signs would make a formula of it, and a legend leaves out what begins with an underscore.
    """
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def caption(figure: Figure, text: str) -> None:
    """Put a wrapped small-print line under a figure."""
    columns = max(int(figure.get_figwidth() * _CHARACTERS_PER_INCH), 20)
    figure.supxlabel(plain(textwrap.fill(text, columns)), fontsize=8, color=GREY, x=0.02, ha="left")


def quiet_axes(axes: Axes, **labels: Any) -> None:
    """Take away the upper and right border and set labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(**labels)


def round_length_um(limit_um: float) -> float:
    """Largest length of 1, 2, 2.5 or 5 times a power of ten that does not exceed `limit_um`."""
    power = 10.0 ** np.floor(np.log10(limit_um))
    return float(max(step * power for step in _ROUND if step * power <= limit_um * (1 + 1e-9)))


def length_text(length_um: float) -> str:
    """A length in µm, or in mm from 1 mm."""
    return f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"


def draw_scale_bar(axes: Axes, *, um_per_px: float, width_px: int, height_px: int) -> float:
    """Draw a scale bar into the lower left corner of an image.

    Args:
        axes: Axes that show an image in its own pixels.
        um_per_px: Size of one image pixel in µm.
        width_px: Width of the image.
        height_px: Height of the image.

    Returns:
        The length that the bar stands for, in µm.
    """
    length_um = round_length_um(um_per_px * width_px / 4)
    length_px, margin = length_um / um_per_px, 0.03 * max(width_px, height_px)
    x, y = margin, height_px - margin
    axes.plot([x - 0.5, x + length_px - 0.5], [y, y], color="black", lw=3, solid_capstyle="butt", gid="scale-bar")
    axes.annotate(
        length_text(length_um),
        (x + length_px / 2, y),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )
    return length_um
