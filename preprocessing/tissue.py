"""Finding tissue on an H&E thumbnail: saturation, a guarded Otsu threshold, morphology, outlines."""

from dataclasses import dataclass

import cv2
import numpy as np

from acmil.preprocessing.readers import Rectangle
from acmil.preprocessing.slide import Slide

# Otsu's threshold splits whatever it is given in two: on bare glass it splits the noise, on a slide full of tissue it
# splits nuclei from stroma. So it only decides between these. Glass with its JPEG noise stays under a saturation of
# about 10/255; the palest stroma and fat begin at about 30/255.
SATURATION_FLOOR = 15
SATURATION_CEILING = 30
# Saturation is (max - min) / max, which is noise where max is near zero: black glass edges, unlit background.
DARKEST_TISSUE = 32


@dataclass(frozen=True)
class Polygon:
    """An outline in level-0 pixels.

    Attributes:
        exterior: float64 (M, 2) of (x, y), not closed: the last point is not the first again.
        holes: The same for each hole.
    """

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Tissue:
    """Where a slide has tissue.

    Attributes:
        mask: bool (h, w); its pixel (row, column) begins at level-0 (column, row) * `downsample`.
        downsample: Level-0 pixels per mask pixel.
        polygons: The mask's outlines in level-0 pixels, simplified to half a mask pixel.
        fraction: Share of the scanned area that is tissue, in [0, 1].
    """

    mask: np.ndarray
    downsample: float
    polygons: tuple[Polygon, ...]
    fraction: float

    def to_geojson(self) -> dict[str, object]:
        """The outlines as a GeoJSON FeatureCollection of QuPath annotations, in level-0 pixels."""
        return {"type": "FeatureCollection", "features": [_feature(polygon) for polygon in self.polygons]}


def find_tissue(
    slide: Slide,
    *,
    mpp: float = 8.0,
    min_area_um2: float = 4096.0,
    max_hole_um2: float = 4096.0,
    close_um: float = 32.0,
) -> Tissue:
    """Find the tissue of an H&E slide from its colour.

    Stained tissue is saturated, glass is not: the HSV saturation of a thumbnail, median-filtered, is cut at Otsu's
    threshold, kept within [SATURATION_FLOOR, SATURATION_CEILING]; small gaps are closed, specks removed, small holes
    filled.

    Args:
        slide: The slide; needs a resolution.
        mpp: Pixel pitch of the thumbnail in µm/px.
        min_area_um2: Smaller pieces are dropped, µm²; the default is a quarter of a tile of 256 px at 0.5 µm/px.
        max_hole_um2: Smaller holes are filled, µm²; the default is the same.
        close_um: Gaps narrower than about this are closed, µm.

    Returns:
        The mask and its outlines; an empty mask where the slide has no tissue.

    Raises:
        SlideError: If the slide has no usable resolution or cannot be read.

    Reference:
        N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979).
    """
    thumbnail = slide.thumbnail(mpp)
    pitch_um = thumbnail.downsample * slide.mpp  # µm per thumbnail pixel, coarser than asked on a coarse slide.
    mask = tissue_mask(thumbnail.image)
    mask = _close(mask, radius_px=round(close_um / 2 / pitch_um))
    mask = _without_small(mask, min_area_px=min_area_um2 / pitch_um**2, connectivity=8)
    mask = ~_without_small(~mask, min_area_px=max_hole_um2 / pitch_um**2, connectivity=4, keep_border=True)
    return Tissue(
        mask=mask,
        downsample=thumbnail.downsample,
        polygons=_outlines(mask, thumbnail.downsample),
        fraction=_fraction_of(slide.bounds, mask, thumbnail.downsample),
    )


def tissue_mask(image: np.ndarray) -> np.ndarray:
    """Mark the stained pixels of uint8 RGB (h, w, 3) in a bool (h, w), before any morphology."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    lit = hsv[..., 2] >= DARKEST_TISSUE
    # The median takes away the colour fringes of single dirt grains.
    saturation = cv2.medianBlur(np.where(lit, hsv[..., 1], 0).astype(np.uint8), 5)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return saturation > np.clip(otsu, SATURATION_FLOOR, SATURATION_CEILING)


def area_fraction(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of each box that the mask covers, exact also where the box's edges cut through mask pixels.

    The integral image of a mask that is constant within each pixel is bilinear between pixel corners, so reading it at
    fractional corners with bilinear interpolation gives the exact area.

    Args:
        mask: bool (h, w).
        boxes: float (N, 4) of (left, top, right, bottom) in mask pixels; what lies over the mask's edge is no tissue.

    Returns:
        float64 (N,) in [0, 1]; 0 for a box without area.
    """
    integral = cv2.integral(mask.astype(np.uint8))  # int32 (h + 1, w + 1)
    left, top, right, bottom = np.asarray(boxes, np.float64).reshape(-1, 4).T  # (N,) each
    covered = (
        _bilinear(integral, right, bottom)
        - _bilinear(integral, left, bottom)
        - _bilinear(integral, right, top)
        + _bilinear(integral, left, top)
    )
    area = (right - left) * (bottom - top)
    return np.clip(np.divide(covered, area, out=np.zeros_like(covered), where=area > 0), 0.0, 1.0)


def _bilinear(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Read `values` (h, w) at fractional (x, y), both (N,), held at its edges."""
    x, y = np.clip(x, 0, values.shape[1] - 1), np.clip(y, 0, values.shape[0] - 1)
    column, row = np.minimum(x.astype(int), values.shape[1] - 2), np.minimum(y.astype(int), values.shape[0] - 2)
    right, down = x - column, y - row
    upper = values[row, column] * (1 - right) + values[row, column + 1] * right
    lower = values[row + 1, column] * (1 - right) + values[row + 1, column + 1] * right
    return upper * (1 - down) + lower * down


def _fraction_of(bounds: Rectangle, mask: np.ndarray, downsample: float) -> float:
    """Share of the scanned area that is tissue."""
    box = np.array([bounds.x, bounds.y, bounds.x + bounds.width, bounds.y + bounds.height]) / downsample
    return float(area_fraction(mask, box)[0])


def _close(mask: np.ndarray, *, radius_px: int) -> np.ndarray:
    """Morphological closing with a disc; pieces at the picture's edge do not grow along it."""
    if radius_px < 1:
        return mask
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))
    padded = np.pad(mask, radius_px).astype(np.uint8)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)
    return closed[radius_px:-radius_px, radius_px:-radius_px].astype(bool)


def _without_small(mask: np.ndarray, *, min_area_px: float, connectivity: int, keep_border: bool = False) -> np.ndarray:
    """Drop the pieces under `min_area_px`; with `keep_border` those at the picture's edge stay, being no holes."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px  # (pieces + 1,)
    if keep_border:
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        keep[np.unique(edge)] = True
    keep[0] = False  # Label 0 is what the mask leaves out.
    return keep[labels]


def _outlines(mask: np.ndarray, downsample: float) -> tuple[Polygon, ...]:
    """Trace the mask; OpenCV gives two levels of contours: exteriors, and the holes in them."""
    # OpenCV joins the centres of edge pixels. On the doubled mask they lie a quarter of a mask pixel inside the edge,
    # and a piece one pixel wide still encloses an area.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0] for contour in contours]  # (M, 2) each
    rings = [(ring + 0.5) / 2 * downsample for ring in simple]
    holes: dict[int, list[np.ndarray]] = {}
    for ring, (_, _, _, parent) in zip(rings, hierarchy[0] if contours else (), strict=True):
        if parent >= 0 and len(ring) >= 3:
            holes.setdefault(parent, []).append(ring)
    exteriors = [i for i in range(len(rings)) if hierarchy[0][i][3] < 0 and len(rings[i]) >= 3]
    return tuple(Polygon(rings[i], tuple(holes.get(i, ()))) for i in exteriors)


def _feature(polygon: Polygon) -> dict[str, object]:
    """One outline as a GeoJSON feature with the properties that QuPath reads."""
    rings = [np.vstack([ring, ring[:1]]).round(2).tolist() for ring in (polygon.exterior, *polygon.holes)]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {"objectType": "annotation", "classification": {"name": "Tissue"}},
    }
