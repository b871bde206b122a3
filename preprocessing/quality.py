"""Quality of tiles, measured on their pixels alone: focus, pen, fold, blood, dark, stain.

Dye weakens light by a factor, so all but focus is said in the channels' optical densities d = -ln((I + 1) / 256), of
the tile at a quarter of its size (fold: a sixteenth). The rules are for H&E in brightfield. A measure depends on the
tile's pixels and on nothing else: neither on the slide's other tiles, nor on how many are measured at a time. All but
stain depend on the tile's µm/px: values of jobs with another `tile_mpp` do not compare. How the thresholds were set,
and what is known not to work: `docs/experiments.md`.

| measure | range | what it is |
|---|---|---|
| focus | 0 to about 2 at 0.5 µm/px | fine detail against coarse on tissue, higher is sharper; 0 without tissue |
| pen | share of the tile, 0 to 1 | colour of dense marker ink: blue, green, red, black |
| fold | share of the tile, 0 to 1 | as dense as two layers of tissue, in the colour of H&E |
| blood | share of the tile, 0 to 1 | colour of red cells |
| dark | share of the tile, 0 to 1 | dark and not in the colour of H&E: black ink, pigment, coal, unlit edges |
| stain | 0 to 5.5 | mean density of the tissue; 0 without tissue |

Reference:
    focus, as a ratio of energies in two bands: S. Pertuz, D. Puig, M. Garcia, "Analysis of focus measure operators for
    shape-from-focus", Pattern Recognit. 46 (2013). A table of such measures for each slide: A. Janowczyk et al.,
    "HistoQC: an open-source quality control tool for digital pathology slides", JCO Clin. Cancer Inform. 3 (2019).
"""

from collections.abc import Mapping
from typing import TypedDict

import cv2
import numpy as np

from acmil.preprocessing.feature_file import MEASURES
from acmil.preprocessing.ink import brightest_channel, ink_coloured

_TISSUE = 0.12  # least mean density; glass has 0.05
_LEAST_PX = 16  # a quarter of a quarter of this is one pixel
_MOST_PX = 1 << 20  # pixels that are measured at a time
_LEAST_CONTRAST = 4.0  # grey levels: the noise of even tissue is no detail
_ROUNDING = 20 / 12  # mean square of the Laplacian (4 * 1 + 16) of errors of mean square 1 / 12, those of whole numbers
_TWO_LAYERS = 0.95  # mean density; single layers of the slides it was set on mostly have 0.4 to 0.7
_DARK, _BLACK = 100, 40  # intensities of the brightest channel
_DENSITIES = -np.log((np.arange(256) + 1.0) / 256).astype(np.float32)  # (256,) of each intensity
_MEAN = np.full((1, 3), 1 / 3, np.float32)


def tile_quality(tiles: np.ndarray) -> np.ndarray:
    """Measure tiles.

    Args:
        tiles: (n, h, w, 3) uint8 RGB, sides of at least 16 px; what is over a multiple of 16, at the right and at the
            bottom, is left out.

    Returns:
        (n, 6) float32, the columns in the order of `MEASURES`.
    """
    height, width = (side // _LEAST_PX * _LEAST_PX for side in tiles.shape[1:3])
    step = max(1, _MOST_PX // (height * width))
    parts = [_quality(tiles[i : i + step, :height, :width]) for i in range(0, len(tiles), step)]
    return np.concatenate(parts) if parts else np.empty((0, len(MEASURES)), np.float32)


def _quality(tiles: np.ndarray) -> np.ndarray:
    """Measure tiles (n, h, w, 3), whose sides are multiples of 16.

    They lie one below the other in one picture, and no step looks over their edges: few calls into OpenCV, so that many
    threads may measure tiles without waiting for Python's lock.
    """
    n_tiles, _, width, _ = tiles.shape
    image = tiles.reshape(-1, width, 3)  # (n h, w, 3)
    small = _quartered(image)  # (n h / 4, w / 4, 3)
    smallest = _quartered(small)  # (n h / 16, w / 16, 3)
    density = cv2.LUT(small, _DENSITIES)
    mean_density = cv2.transform(density, _MEAN)  # (n h / 4, w / 4)
    is_tissue = mean_density >= _TISSUE
    columns = {
        "focus": _focus(image, small, smallest, is_tissue, n_tiles),
        "pen": _shares(ink_coloured(small), n_tiles),
        "fold": _shares(_is_fold(cv2.LUT(smallest, _DENSITIES)), n_tiles),
        "blood": _shares(_is_blood(density), n_tiles),
        "dark": _shares(_is_dark(small, density), n_tiles),
        "stain": _means(mean_density, is_tissue, n_tiles),
    }
    return np.stack([columns[measure] for measure in MEASURES], axis=1).astype(np.float32)


def within_limits(quality: np.ndarray, limits: Mapping[str, float]) -> np.ndarray:
    """Say which tiles are within limits such as `{"min_focus": 0.3, "max_pen": 0.1}`.

    Args:
        quality: (n, 6), columns as in `MEASURES`.
        limits: By "min_" or "max_" and a measure; a tile that is at its limit is within it.

    Returns:
        bool (n,).
    """
    is_within = np.ones(len(quality), bool)
    for name, limit in limits.items():
        end, measure = name.split("_")
        values = quality[:, MEASURES.index(measure)]
        is_within &= values >= limit if end == "min" else values <= limit
    return is_within


class QualitySummary(TypedDict):
    """The quality of a slide's tiles in columns of `slides.csv`; None where none was measured."""

    focus_median: float | None
    pen_mean: float | None
    fold_mean: float | None
    blood_mean: float | None
    dark_mean: float | None
    stain_mean: float | None


def quality_summary(quality: np.ndarray | None) -> QualitySummary:
    """Sum up the quality (N, 6) of a slide's tiles: the median focus, the means of the rest."""
    values: list[float | None] = [None] * len(MEASURES)
    if quality is not None and len(quality):
        means = quality.mean(axis=0, dtype=np.float64).tolist()
        values = [round(value, 4) for value in (float(np.median(quality[:, 0])), *means[1:])]
    focus, pen, fold, blood, dark, stain = values
    return QualitySummary(
        focus_median=focus, pen_mean=pen, fold_mean=fold, blood_mean=blood, dark_mean=dark, stain_mean=stain
    )


def _focus(
    image: np.ndarray, small: np.ndarray, smallest: np.ndarray, is_tissue: np.ndarray, n_tiles: int
) -> np.ndarray:
    """Fine detail against coarse on tissue, in grey levels: rms(Laplacian) / sqrt(ms(coarse) + 4^2), (n,).

    Coarse is the picture at a quarter less its means over 4 x 4 px: structure of about 4 to 16 px. Blur takes the fine
    away first; a faint stain takes as much from both. It depends on the scanner's sharpening and compression.
    """
    inner = is_tissue.copy()
    inner.reshape(n_tiles, -1, is_tissue.shape[1])[:, [0, -1]] = False  # there the Laplacian sees the tile beside
    fine = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_16S)  # (n h, w)
    fine_energy = _quartered(cv2.multiply(fine, fine, dtype=cv2.CV_32F))  # (n h / 4, w / 4)
    grey, mean = (cv2.cvtColor(part, cv2.COLOR_RGB2GRAY) for part in (small, smallest))
    mean = cv2.resize(mean, grey.shape[::-1], interpolation=cv2.INTER_NEAREST)
    coarse = cv2.subtract(grey, mean, dtype=cv2.CV_32F)
    fine_ms = np.maximum(_means(fine_energy, inner, n_tiles) - _ROUNDING, 0.0)
    return np.sqrt(fine_ms / (_means(coarse * coarse, inner, n_tiles) + _LEAST_CONTRAST**2))


def _is_fold(density: np.ndarray) -> np.ndarray:
    """As dense as two layers, of both dyes: crowded nuclei take out more red, red ink less, blood more blue."""
    red, green, blue = cv2.split(density)
    is_mixed = (red > 0.15 * green) & (red < 0.55 * green) & (blue < 0.75 * green)
    return is_mixed & (red + green + blue >= 3 * _TWO_LAYERS)


def _is_blood(density: np.ndarray) -> np.ndarray:
    """Haemoglobin takes almost as much out of blue as out of green, eosin half; red ink takes less out of red."""
    red, green, blue = cv2.split(density)
    return (green > 0.7) & (red > 0.12 * green) & (red < 0.4 * green) & (blue > 0.7 * green)


def _is_dark(image: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Dark in all channels and not in H&E's colour, of which green is taken out most; or too dark to have a colour."""
    brightest = brightest_channel(image)
    red, green, blue = cv2.split(density)
    return (brightest < _BLACK) | ((brightest < _DARK) & (green < 1.05 * cv2.max(red, blue)))


def _shares(mask: np.ndarray, n_tiles: int) -> np.ndarray:
    """The share of each tile that is True, (n,)."""
    return _counts(mask, n_tiles) * (n_tiles / mask.size)


def _means(values: np.ndarray, where: np.ndarray, n_tiles: int) -> np.ndarray:
    """The mean of each tile's values where `where` is True, (n,); 0 where it nowhere is."""
    sums = (values * where).reshape(n_tiles, -1).sum(axis=1)
    return sums / np.maximum(_counts(where, n_tiles), 1)


def _counts(mask: np.ndarray, n_tiles: int) -> np.ndarray:
    return np.array([np.count_nonzero(part) for part in mask.reshape(n_tiles, -1)])


def _quartered(image: np.ndarray) -> np.ndarray:
    """Means of 4 x 4 px, in two steps of 2 x 2, which OpenCV does in a third of the time."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    halved = cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_AREA)
    return cv2.resize(halved, (width, height), interpolation=cv2.INTER_AREA)
