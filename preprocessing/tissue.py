"""Finding tissue on a thumbnail: a guarded Otsu threshold, pen ink taken out, morphology, outlines."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from acmil.preprocessing.geometry import thumbnail_side_px
from acmil.preprocessing.ink import brightest_channel, pen_ink
from acmil.preprocessing.readers import Rectangle
from acmil.preprocessing.slide import Slide, Thumbnail
from acmil.preprocessing.tissue_outlines import Polygon, fill, read_tissue_outlines, to_feature, trace

TissuePreset = Literal["brightfield", "dark"]

# Otsu's threshold splits whatever it is given in two: on bare glass it splits the noise, on a slide full of tissue it
# splits nuclei from stroma. So it only decides between these. Glass with its JPEG noise stays under a saturation of
# about 10/255; the palest stroma and fat begin at about 30/255.
SATURATION_FLOOR = 15
SATURATION_CEILING = 30
# Saturation is (max - min) / max, which is noise where max is near zero: black glass edges, unlit background.
DARKEST_TISSUE = 32
# The dark preset's guard: so much brighter than the background, of 255. Otsu alone keeps only the brightest nuclei.
GLOW_FLOOR, GLOW_CEILING = 6, 12
# A thumbnail that is mostly under this is no brightfield slide: stained tissue is at 100 and more.
DARK_THUMBNAIL = 60

LEAST_TISSUE, MOST_TISSUE = 0.01, 0.95  # Shares of the slide outside which someone should look.
MOST_REMOVED = 1 / 3
FULLEST_SHAPE, LEAST_RECTANGLE_UM2 = 0.97, 1e6  # of its upright rectangle; 1 mm²


@dataclass(frozen=True)
class Tissue:
    """Where a slide has tissue.

    Attributes:
        mask: bool (h, w); its pixel (row, column) begins at level-0 (column, row) * `downsample`.
        downsample: Level-0 pixels per mask pixel.
        polygons: The mask's outlines in level-0 pixels, simplified to half a mask pixel.
        fraction: Share of the scanned area that is tissue, in [0, 1].
        ink_fraction: Share of the thumbnail that is pen ink, in [0, 1].
        ink_removed: Share of what has the colour of tissue that was ink and was taken out, in [0, 1].
        alarms: What someone should look at before trusting this, one sentence each.
    """

    mask: np.ndarray
    downsample: float
    polygons: tuple[Polygon, ...]
    fraction: float
    ink_fraction: float = 0.0
    ink_removed: float = 0.0
    alarms: tuple[str, ...] = ()

    def to_geojson(self) -> dict[str, object]:
        """The outlines as a GeoJSON FeatureCollection of QuPath annotations, in level-0 pixels."""
        return {"type": "FeatureCollection", "features": [to_feature(polygon) for polygon in self.polygons]}


def find_tissue(
    slide: Slide,
    *,
    mpp: float = 8.0,
    preset: TissuePreset = "brightfield",
    remove_ink: bool = True,
    min_area_um2: float = 4096.0,
    max_hole_um2: float = 4096.0,
    close_um: float = 32.0,
) -> Tissue:
    """Find the tissue of a slide from its colour, or from its light.

    Brightfield: stained tissue is saturated, glass is not. The HSV saturation of a thumbnail, median-filtered, is cut
    at Otsu's threshold, kept within [SATURATION_FLOOR, SATURATION_CEILING], and pen ink is taken out. Dark: tissue is
    brighter than the background, see `glow_mask`. Then small gaps are closed, specks removed, small holes filled.

    Args:
        slide: The slide; needs a resolution.
        mpp: Pixel pitch of the thumbnail in µm/px.
        preset: "brightfield", or "dark" for fluorescence.
        remove_ink: Take pen ink out; only in brightfield.
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
    is_dark = _is_dark(slide.bounds, thumbnail)
    candidates = tissue_mask(thumbnail.image) if preset == "brightfield" else glow_mask(thumbnail.image)
    ink = np.zeros_like(candidates)
    if preset == "brightfield" and remove_ink and not is_dark:
        ink = pen_ink(thumbnail.image, pitch_um=pitch_um)
    closed = _close(candidates & ~ink, radius_px=round(close_um / 2 / pitch_um)) & ~ink
    large = _without_small(closed, min_area_px=min_area_um2 / pitch_um**2, connectivity=8)
    # A hole that ink left is none to fill.
    mask = ~_without_small(~large, min_area_px=max_hole_um2 / pitch_um**2, connectivity=4, keep_border=True) & ~ink
    fraction, ink_removed = _fraction_of(slide.bounds, mask, thumbnail.downsample), _share(ink, of=candidates)
    alarms = (
        *_preset_alarms(preset, is_dark=is_dark),
        *_removal_alarms(ink=ink_removed, specks=_share(~large, of=closed), holes=_share(~large, of=mask)),
        *_fraction_alarms(fraction),
        *_rectangle_alarms(mask, pitch_um=pitch_um),
    )
    return Tissue(
        mask=mask,
        downsample=thumbnail.downsample,
        polygons=trace(mask, thumbnail.downsample),
        fraction=fraction,
        ink_fraction=float(ink.mean()),
        ink_removed=ink_removed,
        alarms=alarms,
    )


def given_tissue(slide: Slide, folder: Path, *, mpp: float = 8.0) -> Tissue:
    """Take the tissue of a slide from outlines that someone has drawn or edited.

    Args:
        slide: The slide; needs a resolution.
        folder: It holds `<slide_id>.geojson`, see `read_tissue_outlines`.
        mpp: Pixel pitch of the mask in µm/px.

    Returns:
        The outlines as they are, and a mask of the pixels whose centres they enclose.

    Raises:
        SlideError: If the slide has no usable resolution, or there are no usable outlines of it.
    """
    downsample = max(1.0, mpp / slide.mpp)
    height, width = thumbnail_side_px(slide.height, downsample), thumbnail_side_px(slide.width, downsample)
    polygons = read_tissue_outlines(folder, slide.slide_id)
    mask = fill(polygons, height=height, width=width, downsample=downsample)
    fraction = _fraction_of(slide.bounds, mask, downsample)
    return Tissue(mask, downsample, polygons, fraction, alarms=_fraction_alarms(fraction))


def tissue_mask(image: np.ndarray) -> np.ndarray:
    """Mark the stained pixels of uint8 RGB (h, w, 3) in a bool (h, w), before any morphology."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    lit = hsv[..., 2] >= DARKEST_TISSUE
    # The median takes away the colour fringes of single dirt grains.
    saturation = cv2.medianBlur(np.where(lit, hsv[..., 1], 0).astype(np.uint8), 5)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return saturation > np.clip(otsu, SATURATION_FLOOR, SATURATION_CEILING)


def glow_mask(image: np.ndarray) -> np.ndarray:
    """Mark what is brighter than a dark background in uint8 RGB (h, w, 3), as bool (h, w), before any morphology.

    The brightest channel, median-filtered, is cut at Otsu's threshold, kept within GLOW_FLOOR to GLOW_CEILING over the
    background, which is the level of the darkest hundredth, or black where even that is bright.
    """
    glow = cv2.medianBlur(brightest_channel(image), 5)
    otsu, _ = cv2.threshold(glow, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    background = float(np.percentile(glow, 1))
    background = background if background < DARK_THUMBNAIL else 0.0
    return glow > np.clip(otsu, background + GLOW_FLOOR, background + GLOW_CEILING)


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


def _share(part: np.ndarray, *, of: np.ndarray) -> float:
    """Share of the True pixels of `of` that are in `part`."""
    return float((part & of).sum() / max(1, of.sum()))


def _is_dark(bounds: Rectangle, thumbnail: Thumbnail) -> bool:
    """Whether the scanned area is mostly dark."""
    left, top = int(bounds.x / thumbnail.downsample), int(bounds.y / thumbnail.downsample)
    right = math.ceil((bounds.x + bounds.width) / thumbnail.downsample)
    bottom = math.ceil((bounds.y + bounds.height) / thumbnail.downsample)
    brightest = brightest_channel(thumbnail.image[top:bottom, left:right])
    return 2 * int(np.count_nonzero(brightest < DARK_THUMBNAIL)) > brightest.size


def _preset_alarms(preset: TissuePreset, *, is_dark: bool) -> tuple[str, ...]:
    if preset == "brightfield" and is_dark:
        return ("the slide is dark: if it is fluorescence, use --tissue dark",)
    if preset == "dark" and not is_dark:
        return ("the slide is bright: if it is brightfield, use --tissue brightfield",)
    return ()


def _removal_alarms(*, ink: float, specks: float, holes: float) -> tuple[str, ...]:
    """Tell of steps that changed much; all three are shares."""
    shares = (
        (ink, "{:.0%} of the tissue was taken out as pen ink: if it is stain, use --no-remove-ink"),
        (specks, "{:.0%} of the tissue was taken out as specks"),
        (holes, "{:.0%} of the tissue is filled holes"),
    )
    return tuple(text.format(share) for share, text in shares if share > MOST_REMOVED)


def _rectangle_alarms(mask: np.ndarray, *, pitch_um: float) -> tuple[str, ...]:
    """Tell of pieces that fill a rectangle, as no tissue does: tinted glass where only a part was scanned."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    widths, heights, areas = (stats[1:, column] for column in (cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_AREA))
    is_whole = (widths == mask.shape[1]) & (heights == mask.shape[0])  # a picture cut out of tissue
    is_large = areas * pitch_um**2 > LEAST_RECTANGLE_UM2
    count = int((is_large & ~is_whole & (areas > FULLEST_SHAPE * widths * heights)).sum())
    if not count:
        return ()
    return (f"{count} of the pieces of tissue fill a rectangle: look at the preview, they may be tinted glass",)


def _fraction_alarms(fraction: float) -> tuple[str, ...]:
    if fraction < LEAST_TISSUE:
        return (f"only {fraction:.2%} of the slide is tissue",)
    return (f"{fraction:.1%} of the slide is tissue",) if fraction > MOST_TISSUE else ()
