"""The real tissue that the demo's slides are made of, divided into parts that share no pixel."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide

from acmil.demo.stains import haematoxylin_amount, optical_density

PAD_PX = 448  # empty frame around a part: a patch may hang over the edge of the tissue, never over that of the array
COARSE_PX = 16  # side of a cell of every coarse map; 224 px tiles are 14 cells

_HELD_OUT_ROWS = (0.62, 0.80)  # share of the height; rows of the test part: follicle, epidermis, dermis
_MARGIN_ROWS = 0.012  # share of the height on either side of a cut that no part uses
_TISSUE_SATURATION = 25
_KERATIN_LIGHT = 108  # mean blue light, 0-255, below which a stretch of tissue is horn
_KERATIN_SCALE_PX = 20.0
_PATCH_TISSUE = 0.8  # share of a tile around a patch's centre that must be tissue


@dataclass(frozen=True)
class TissuePart:
    """One part of the source tissue, ready to cut patches from.

    Attributes:
        density: Optical density, float32 (h, w, 3); 0 wherever `depth_px` is 0.
        depth_px: Distance to the nearest pixel that this part must not use, float32 (h, w); 0 on such pixels.
        centres: Patch centres (x, y) in px of these arrays, int64 (M, 2).
        cellularity: Rank of the haematoxylin around each centre among them, float64 (M,), 0 to 1.
    """

    density: np.ndarray
    depth_px: np.ndarray
    centres: np.ndarray
    cellularity: np.ndarray


@dataclass(frozen=True)
class TissueSource:
    """The source image, its tissue, and which rows make which part.

    Attributes:
        image: RGB uint8 (h, w, 3).
        tissue: Boolean (h, w).
        rows: Boolean (h,) for each part by name.
    """

    image: np.ndarray
    tissue: np.ndarray
    rows: dict[str, np.ndarray]

    def part_mask(self, name: str) -> np.ndarray:
        """Pixels that the part may use, boolean (h, w)."""
        return self.tissue & self.rows[name][:, None]

    def part(self, name: str) -> TissuePart:
        """Cut out a part; nothing outside its mask is in the result."""
        mask = self.part_mask(name)
        image = np.where(mask[..., None], self.image, 255).astype(np.uint8)
        density = _padded(optical_density(image, _glass(self.image, self.tissue)))
        depth_px = cv2.distanceTransform(_padded(mask.astype(np.uint8)), cv2.DIST_L2, 5)
        centres = _patch_centres(depth_px)
        coarse = cv2.resize(density, None, fx=1 / COARSE_PX, fy=1 / COARSE_PX, interpolation=cv2.INTER_AREA)
        haematoxylin = cv2.GaussianBlur(haematoxylin_amount(coarse), (0, 0), 60.0 / COARSE_PX)
        cells = centres // COARSE_PX
        order = np.argsort(haematoxylin[cells[:, 1], cells[:, 0]], kind="stable")
        rank = np.empty(len(order))
        rank[order] = np.linspace(0.0, 1.0, len(order))
        return TissuePart(density, depth_px, centres, rank)


def read_source(path: Path, *, held_out_rows: tuple[float, float] = _HELD_OUT_ROWS) -> TissueSource:
    """Read the source slide and divide its rows.

    Training and validation slides are made of the rows above and below a band, test slides of the band; a margin on
    either side of each cut belongs to neither.

    Args:
        path: The slide, small enough to be read whole.
        held_out_rows: Where the band of the test part begins and ends, as shares of the height.

    Returns:
        The source with parts `train` and `test`.
    """
    with openslide.OpenSlide(path) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    height = len(image)
    row = (np.arange(height) + 0.5) / height
    low, high = held_out_rows
    test = (row > low) & (row < high)
    train = (row < low - _MARGIN_ROWS) | (row > high + _MARGIN_ROWS)
    return TissueSource(image, _tissue_mask(image), {"train": train, "test": test})


def _tissue_mask(image: np.ndarray) -> np.ndarray:
    saturation = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1], (0, 0), 4.0)
    smooth = cv2.GaussianBlur(image, (0, 0), 3.0).astype(np.int16)
    dye = smooth[..., 1] > smooth[..., 0] + 4  # the green specks at the edges: no tissue is greener than red
    dye = cv2.dilate(dye.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    closed = cv2.morphologyEx((saturation > _TISSUE_SATURATION).astype(np.uint8), cv2.MORPH_CLOSE, _disc(9))
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, _disc(61))
    return (opened > 0) & ~dye & ~_keratin(image)


def _glass(image: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    return np.median(image[~tissue][::101], axis=0)


def _padded(array: np.ndarray) -> np.ndarray:
    return cv2.copyMakeBorder(array, PAD_PX, PAD_PX, PAD_PX, PAD_PX, cv2.BORDER_CONSTANT, value=0)


def _patch_centres(depth_px: np.ndarray) -> np.ndarray:
    share = cv2.blur((depth_px > 12.0).astype(np.float32), (224, 224))[
        COARSE_PX // 2 :: COARSE_PX, COARSE_PX // 2 :: COARSE_PX
    ]
    y, x = np.nonzero(share >= _PATCH_TISSUE)
    return np.stack([x, y], axis=1) * COARSE_PX + COARSE_PX // 2


def _keratin(image: np.ndarray) -> np.ndarray:
    """Horn, which is dark in blue light over wide stretches: it holds no nuclei, and lesions in it would not show."""
    blue = cv2.GaussianBlur(image[..., 2], (0, 0), _KERATIN_SCALE_PX)
    return cv2.dilate((blue < _KERATIN_LIGHT).astype(np.uint8), _disc(31)) > 0


def _disc(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
