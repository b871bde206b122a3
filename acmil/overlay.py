"""Colours over tissue: fixed colour scales for attention, and laying them over a thumbnail."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

RELATIVE_LIMIT = 10.0
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class ColourScale:
    """How scores become colours, the same for every slide.

    Attributes:
        label: What the colours mean, for the colour bar.
        caption: The same in a sentence or two, for readers of the figure.
        low: Score of the first colour; lower ones get it too.
        high: Score of the last colour; higher ones get it too.
        log: Whether colours follow the logarithm of the score.
        colormap: Name of a matplotlib colour map.
        ticks: Scores marked on the colour bar.
        tick_labels: Their names.
    """

    label: str
    caption: str
    low: float
    high: float
    log: bool
    colormap: str
    ticks: tuple[float, ...]
    tick_labels: tuple[str, ...]

    @cached_property
    def norm(self) -> "Normalize":
        """The matplotlib norm of this scale."""
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high, clip=True)

    @cached_property
    def cmap(self) -> "Colormap":
        """The matplotlib colour map of this scale."""
        from matplotlib import colormaps

        return colormaps[self.colormap]

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Colour of each score; NaN becomes black.

        Args:
            values: Scores, any shape.

        Returns:
            RGB, uint8, shape (..., 3).
        """
        values = np.asarray(values, dtype=np.float64)
        missing = np.isnan(values)
        filled = np.clip(np.where(missing, self.low, values), self.low, self.high)
        rgb = np.asarray(self.cmap(self.norm(filled), bytes=True))[..., :3]  # a tuple for a single score
        return np.where(missing[..., None], np.uint8(0), rgb)


def relative_scale(limit: float = RELATIVE_LIMIT) -> ColourScale:
    """Attention relative to uniform on a logarithmic scale from 1/limit to limit, 1 in the middle.

    Fixed limits make maps of different slides comparable: where the model prefers nothing the map is pale all over.

    Args:
        limit: Multiple of the uniform share at which the colours end, > 1.
    """
    root = float(np.sqrt(limit))
    ticks = (1 / limit, 1 / root, 1.0, root, limit)
    return ColourScale(
        label="attention relative to uniform (×, log scale)",
        caption=(
            "1× is the attention each tile would get if the model preferred none; red gets more, blue less. "
            "The same limits on every slide; values beyond them have the end colours. "
            "Attention is what the model weighs, not the probability of a lesion."
        ),
        low=1 / limit,
        high=limit,
        log=True,
        colormap="RdYlBu_r",
        ticks=ticks,
        tick_labels=(f"≤ {1 / limit:.2g}×", f"{1 / root:.2g}×", "1×", f"{root:.2g}×", f"≥ {limit:g}×"),
    )


def percentile_scale() -> ColourScale:
    """Percentile of attention within the slide, 0 to 100."""
    return ColourScale(
        label="percentile of attention within this slide",
        caption=(
            "Rank within this slide alone: every slide has tiles near 100, also one on which the model prefers "
            "nothing. Do not compare between slides. "
            "Attention is what the model weighs, not the probability of a lesion."
        ),
        low=0.0,
        high=100.0,
        log=False,
        colormap="viridis",
        ticks=(0.0, 25.0, 50.0, 75.0, 100.0),
        tick_labels=("0", "25", "50", "75", "100"),
    )


def blend(thumbnail: np.ndarray, colours: np.ndarray, covered: np.ndarray, *, opacity: float) -> np.ndarray:
    """Lay colours over the covered part of a thumbnail and leave every other pixel as it is.

    Under the colours the tissue is shown in grey: stain and score would otherwise mix into hues of neither.

    Args:
        thumbnail: RGB, uint8, shape (h, w, 3).
        colours: RGB, uint8, shape (h, w, 3).
        covered: True where a tile lies, shape (h, w).
        opacity: Weight of the colours, in [0, 1].

    Returns:
        RGB, uint8, shape (h, w, 3); equal to `thumbnail` wherever `covered` is False.
    """
    out = thumbnail.copy()
    grey = thumbnail[covered].astype(np.float32) @ _LUMINANCE  # (covered,)
    mixed = (1 - opacity) * grey[:, None] + opacity * colours[covered].astype(np.float32)
    out[covered] = np.rint(mixed).clip(0, 255).astype(np.uint8)
    return out
