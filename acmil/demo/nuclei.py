"""Nuclei: where they are in a piece of tissue, and a collection of single ones cut out of real tissue."""

from dataclasses import dataclass

import cv2
import numpy as np

from acmil.demo.stains import haematoxylin_amount
from acmil.demo.tissue_source import TissuePart

STAMP_PX = 41  # side of a cut-out; a nucleus of the source is 12 to 26 px long

_MIN_CONTRAST = 0.11  # haematoxylin of a nucleus above its surroundings
_MIN_RED_DENSITY = 0.5  # a nucleus is dark in red light; an eosin-red fibre is not
_MIN_DISTANCE_PX = 11
_AREA_PX = (90, 420)
_MIN_SOLIDITY = 0.86
_PIGMENT_RATIO = 0.93


@dataclass(frozen=True)
class NucleusStamps:
    """Nuclei cut out of one part of the source.

    Attributes:
        density: Optical density, float32 (M, side, side, 3).
        opacity: 1 inside the nucleus, softly 0 outside, float32 (M, side, side).
        surroundings: Mean density around each nucleus, float32 (M, 3).
    """

    density: np.ndarray
    opacity: np.ndarray
    surroundings: np.ndarray


def find_nuclei(density: np.ndarray) -> np.ndarray:
    """Find centres of nuclei: peaks of haematoxylin at their size.

    Args:
        density: Optical density, float32 (h, w, 3), at 0.5 µm/px.

    Returns:
        (x, y) in px, int64 (M, 2), in reading order.
    """
    haematoxylin = haematoxylin_amount(density)
    contrast = cv2.GaussianBlur(haematoxylin, (0, 0), 3.5) - cv2.GaussianBlur(haematoxylin, (0, 0), 12.0)
    peaks = contrast == cv2.dilate(contrast, np.ones((_MIN_DISTANCE_PX, _MIN_DISTANCE_PX), np.uint8))
    y, x = np.nonzero(peaks & (contrast > _MIN_CONTRAST))
    dark = density[y, x, 0] > _MIN_RED_DENSITY
    return np.stack([x[dark], y[dark]], axis=1)


def cut_stamps(part: TissuePart) -> NucleusStamps:
    """Cut out the part's nuclei that stand clear: of plausible area, convex, and whole."""
    half = STAMP_PX // 2
    haematoxylin = cv2.GaussianBlur(haematoxylin_amount(part.density), (0, 0), 1.2)
    surroundings = cv2.GaussianBlur(haematoxylin, (0, 0), 14.0)
    nuclear = (haematoxylin > surroundings + 0.12).astype(np.uint8)
    densities, opacities = [], []
    for x, y in find_nuclei(part.density):
        window = np.s_[y - half : y + half + 1, x - half : x + half + 1]
        if part.depth_px[y, x] < 2 * half:
            continue
        opacity = _whole_nucleus(nuclear[window])
        if opacity is not None and not _is_pigmented(part.density[window], opacity):
            densities.append(part.density[window])
            opacities.append(opacity)
    density, opacity = np.stack(densities), np.stack(opacities)
    around = 1.0 - opacity[..., None]
    return NucleusStamps(density, opacity, (density * around).sum(axis=(1, 2)) / around.sum(axis=(1, 2)))


def _is_pigmented(density: np.ndarray, opacity: np.ndarray) -> bool:
    """Tell melanin, which takes more blue light than red, from haematoxylin, which takes more red."""
    red, _, blue = (density * opacity[..., None]).sum(axis=(0, 1))
    return bool(blue > _PIGMENT_RATIO * red)


def _whole_nucleus(nuclear: np.ndarray) -> np.ndarray | None:
    """Opacity of the piece in the middle of a binary window; None where it is no single whole nucleus."""
    half = STAMP_PX // 2
    _, labels, stats, _ = cv2.connectedComponentsWithStats(nuclear, connectivity=4)
    label = labels[half, half]
    left, top, width, height, area = stats[label]
    framed = left > 2 and top > 2 and left + width < STAMP_PX - 2 and top + height < STAMP_PX - 2
    if label == 0 or not framed or not _AREA_PX[0] <= area <= _AREA_PX[1]:
        return None
    piece = (labels == label).astype(np.uint8)
    contours, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.contourArea(cv2.convexHull(contours[0]))
    if hull == 0 or cv2.contourArea(contours[0]) / hull < _MIN_SOLIDITY:
        return None
    cv2.drawContours(piece, contours, -1, 1, cv2.FILLED)
    return np.clip(1.6 * cv2.GaussianBlur(piece.astype(np.float32), (0, 0), 1.3) - 0.2, 0.0, 1.0)
