"""Planted lesions: smooth areas whose nuclei are larger and more crowded, and whose mean colour is unchanged.

A lesion and a null lesion (on slides without disease) run through the same steps and the same random numbers: the area
is resampled along a faint random warp, and nuclei of the same tissue are pasted into it. In a null lesion they replace
nuclei that are there, at their natural size; in a lesion a share of them lands between the others, and all nuclei are
magnified. `severity` is that share and that magnification; at 0 the two are equal pixel for pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from acmil.demo.canvas import Outline, smooth_noise, tile_shares
from acmil.demo.nuclei import STAMP_PX, NucleusStamps, find_nuclei
from acmil.demo.stains import haematoxylin_amount
from acmil.demo.tissue_source import COARSE_PX

LESION_TILE_SHARES = (0.04, 0.06)  # lesion tiles among tissue tiles; one more or less is still within 3 to 10 %
LESION_TILE_FRACTION = 0.5  # a tile counts as lesion when the lesions cover at least half of it

_MAX_LESIONS = 3
_MIN_LESION_TILES = 1.3  # area of the smallest lesion, in tiles
_SITE_PREFERENCE = 6.0  # log odds of the site with least haematoxylin against that with most
_SITE_SCALE_PX = 96.0
_MAX_MAGNIFICATION = 0.6  # relative growth of nuclei at severity 1
_STAMPS_PER_PX2 = 1 / 520
_CANDIDATES = 6  # stamps to choose from, for each place the one that comes from the most similar tissue
_TISSUE_DENSITY = 0.4  # mean density in green light below which there is more gap than tissue
_WARP_PX = 1.0
_REACH_PX = 13.0  # how far around its centre a nucleus is magnified
_COLOUR_SCALE_PX = 40.0  # mean colour is kept at this scale and above
_SOFT_EDGE_PX = 24.0
_FRAME_PX = 160  # tissue around a lesion that is worked on with it


@dataclass(frozen=True)
class LesionPlan:
    """Where a slide's lesions lie.

    Attributes:
        depth_px: Signed distance to the lesions' edge in level-0 px, positive inside, float32 on cells of `COARSE_PX`.
    """

    depth_px: np.ndarray


def plan_lesions(outline: Outline, density: np.ndarray, rng: np.random.Generator) -> LesionPlan:
    """Draw one to three lesions inside the outline that make up 3 to 10 % of its tissue tiles.

    Args:
        outline: Where the tissue lies.
        density: Optical density of the filled canvas, float32 (h, w, 3): lesions lie by preference where there is
            little haematoxylin, in dermis rather than in epidermis.
        rng: Draws number, size, shape and place.
    """
    coarse = cv2.resize(density, outline.depth_px.shape[::-1], interpolation=cv2.INTER_AREA)
    haematoxylin = cv2.GaussianBlur(haematoxylin_amount(coarse), (0, 0), _SITE_SCALE_PX / COARSE_PX)
    n_tiles = int(outline.tissue_tiles.sum())
    low, high = (share * n_tiles for share in LESION_TILE_SHARES)
    while True:
        n_lesion_tiles = int(rng.integers(np.ceil(low), np.floor(high) + 1))
        n_lesions = int(rng.integers(1, 1 + min(_MAX_LESIONS, max(1, int(n_lesion_tiles / _MIN_LESION_TILES)))))
        areas = _MIN_LESION_TILES + (n_lesion_tiles * 1.1 - _MIN_LESION_TILES * n_lesions) * rng.dirichlet(
            np.full(n_lesions, 3.0)
        )
        depth_px = _place(outline, haematoxylin, np.maximum(areas, _MIN_LESION_TILES), rng)
        if depth_px is not None and lesion_tiles(depth_px, outline).sum() == n_lesion_tiles:
            return LesionPlan(depth_px)


def lesion_tiles(depth_px: np.ndarray, outline: Outline) -> np.ndarray:
    """Tissue tiles that lesions cover by at least half, boolean (rows, columns)."""
    return (tile_shares(depth_px > 0) >= LESION_TILE_FRACTION) & outline.tissue_tiles


def _place(
    outline: Outline, haematoxylin: np.ndarray, areas_tiles: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    shape = outline.depth_px.shape
    room = outline.depth_px.copy()
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    inside = np.zeros(shape, bool)
    for area in areas_tiles:
        radius_px = float(np.sqrt(area * 224**2 / np.pi))
        candidates = np.argwhere(room > 0.9 * radius_px)
        if len(candidates) == 0:
            return None
        rank = haematoxylin[candidates[:, 0], candidates[:, 1]].argsort(kind="stable").argsort() / len(candidates)
        weight = np.exp(-_SITE_PREFERENCE * rank)
        row, column = candidates[rng.choice(len(candidates), p=weight / weight.sum())]
        stretch, angle = float(np.exp(rng.uniform(-0.2, 0.2))), rng.uniform(0, np.pi)
        dx, dy = (x - column) * COARSE_PX, (y - row) * COARSE_PX
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        waves = 0.22 * radius_px * smooth_noise(rng, shape, 5.0)
        blob = radius_px - np.hypot(along * stretch, across / stretch) + waves
        drawn = (blob > 0) & (outline.depth_px > 0)  # no lesion on glass
        _, pieces = cv2.connectedComponents(drawn.astype(np.uint8), connectivity=4)
        inside |= (pieces == pieces[row, column]) & drawn  # the noise and the outline may leave islands
        room = np.minimum(room, np.hypot(dx, dy) - 1.6 * radius_px - 32.0)
    return _signed_depth(inside)


def _signed_depth(inside: np.ndarray) -> np.ndarray:
    mask = inside.astype(np.uint8)
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)
    return cv2.GaussianBlur(distance, (0, 0), 1.5) * COARSE_PX


def draw_lesions(
    density: np.ndarray, plan: LesionPlan, stamps: NucleusStamps, *, severity: float, rng: np.random.Generator
) -> None:
    """Draw the planned lesions into a canvas, in place.

    Args:
        density: Optical density of the whole canvas, float32 (h, w, 3).
        plan: Where the lesions lie.
        stamps: Nuclei of the same part of the source.
        severity: 0 (null lesion) to 1.
        rng: Draws the warp, the nuclei and their places; used in the same way whatever the severity.
    """
    n_labels, labels, stats, _ = cv2.connectedComponentsWithStats((plan.depth_px > 0).astype(np.uint8), connectivity=8)
    for label in range(1, n_labels):
        left, top, width, height, _ = (int(value) * COARSE_PX for value in stats[label])
        rows = slice(max(0, top - _FRAME_PX), min(density.shape[0], top + height + _FRAME_PX))
        columns = slice(max(0, left - _FRAME_PX), min(density.shape[1], left + width + _FRAME_PX))
        coarse = np.s_[
            rows.start // COARSE_PX : -(-rows.stop // COARSE_PX),
            columns.start // COARSE_PX : -(-columns.stop // COARSE_PX),
        ]
        depth = np.where((labels[coarse] == label) | (plan.depth_px[coarse] <= 0), plan.depth_px[coarse], -64.0)
        size = (columns.stop - columns.start, rows.stop - rows.start)
        depth = cv2.resize(depth.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
        before = np.ascontiguousarray(density[rows, columns])
        after = _altered(before, depth, stamps, severity, rng)
        opacity = _smoothstep(depth / _SOFT_EDGE_PX + 0.5)[..., None]
        after = _with_colour_of(before, after, opacity)
        density[rows, columns] = before + opacity * (after - before)


def _altered(
    density: np.ndarray, depth: np.ndarray, stamps: NucleusStamps, severity: float, rng: np.random.Generator
) -> np.ndarray:
    """The window with its nuclei magnified and others pasted in, over all of it."""
    centres = find_nuclei(density)
    growth = _MAX_MAGNIFICATION * severity
    altered = _magnified(density, centres, growth, rng)
    local_mean = _local_mean(density)
    n_stamps = int((depth > 0).sum() * _STAMPS_PER_PX2)
    between = _places_between(depth, local_mean, centres, n_stamps, rng)  # (n_stamps, 2)
    inside = centres[depth[centres[:, 1], centres[:, 0]] > 0]
    upon = inside[(rng.random(n_stamps) * len(inside)).astype(np.int64)] if len(inside) else between[:0]
    moved = rng.random(n_stamps) < severity
    candidates = rng.integers(len(stamps.opacity), size=(n_stamps, _CANDIDATES))
    angles, scales = rng.uniform(0.0, 360.0, n_stamps), (1.0 + growth) * rng.uniform(0.9, 1.1, n_stamps)
    for k in range(n_stamps):
        if not moved[k] and not len(upon):
            continue  # nothing to replace here
        x, y = between[k] if moved[k] else upon[k]
        strangeness = np.abs(stamps.surroundings[candidates[k]] - local_mean[y, x]).sum(axis=1)  # (candidates,)
        _paste(altered, stamps, int(candidates[k, strangeness.argmin()]), (int(x), int(y)), angles[k], scales[k])
    return altered


def _magnified(density: np.ndarray, centres: np.ndarray, growth: float, rng: np.random.Generator) -> np.ndarray:
    """Resample along a faint random warp that, in addition, enlarges what surrounds each centre."""
    height, width = density.shape[:2]
    field_x, field_y = (_WARP_PX * smooth_noise(rng, (height, width), 12.0) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    reach = int(3 * _REACH_PX)
    span = np.arange(-reach, reach + 1, dtype=np.float32)
    bump = np.exp(-(span[:, None] ** 2 + span**2) / (2 * _REACH_PX**2))
    push_x, push_y, total = (np.zeros((height + 2 * reach, width + 2 * reach), np.float32) for _ in range(3))
    for cx, cy in centres:
        window = np.s_[cy : cy + 2 * reach + 1, cx : cx + 2 * reach + 1]
        push_x[window] += bump * span
        push_y[window] += bump * span[:, None]
        total[window] += bump
    inner = np.s_[reach : reach + height, reach : reach + width]
    shrink = (1.0 - 1.0 / (1.0 + growth)) / np.maximum(1.0, total[inner])  # neighbours share the room
    map_x, map_y = x + field_x - shrink * push_x[inner], y + field_y - shrink * push_y[inner]
    return cv2.remap(density, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def _places_between(
    depth: np.ndarray, local_mean: np.ndarray, centres: np.ndarray, n_places: int, rng: np.random.Generator
) -> np.ndarray:
    """Places inside the lesion and in tissue, each the emptiest of a few drawn at random: int64 (n_places, 2)."""
    tissue = np.argwhere((depth > 0) & (local_mean[..., 1] > _TISSUE_DENSITY))[:, ::-1]
    if len(tissue) == 0:
        tissue = np.argwhere(depth > 0)[:, ::-1]
    drawn = tissue[(rng.random((n_places, 4)) * len(tissue)).astype(np.int64)]  # (n_places, 4, 2)
    taken = np.ones(depth.shape, np.uint8)
    taken[centres[:, 1], centres[:, 0]] = 0
    places = np.zeros((n_places, 2), np.int64)
    room = cv2.distanceTransform(taken, cv2.DIST_L2, 5)
    for k in range(n_places):
        x, y = drawn[k, room[drawn[k, :, 1], drawn[k, :, 0]].argmax()]
        places[k] = x, y
        top, left = max(0, y - 32), max(0, x - 32)
        window = room[top : y + 32, left : x + 32]
        rows, columns = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        np.minimum(window, np.hypot(rows - y, columns - x), out=window)
    return places


def _paste(
    density: np.ndarray, stamps: NucleusStamps, which: int, place: tuple[int, int], angle: float, scale: float
) -> None:
    side = 2 * int(np.ceil(STAMP_PX * scale / 2)) + 1
    x, y = (centre - side // 2 for centre in place)
    if x < 0 or y < 0 or x + side > density.shape[1] or y + side > density.shape[0]:
        return
    turn = cv2.getRotationMatrix2D((STAMP_PX // 2, STAMP_PX // 2), angle, scale)
    turn[:, 2] += side // 2 - STAMP_PX // 2
    stamp = cv2.warpAffine(stamps.density[which], turn, (side, side), flags=cv2.INTER_LINEAR)
    opacity = cv2.warpAffine(stamps.opacity[which], turn, (side, side), flags=cv2.INTER_LINEAR)
    below = density[y : y + side, x : x + side]
    below += opacity[..., None] * (stamp - below)


def _with_colour_of(before: np.ndarray, after: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Scale the new density so that its mean, in every channel and so in every stain, is that of the old.

    First the local mean, nearly; then the mean over what will be seen of it, exactly.
    """
    after = np.maximum(after, 0.0)
    after *= (_local_mean(before) + 0.01) / (_local_mean(after) + 0.01)
    return after * ((opacity * before).sum(axis=(0, 1)) / (opacity * after).sum(axis=(0, 1)))


def _local_mean(density: np.ndarray) -> np.ndarray:
    height, width = density.shape[:2]
    small = cv2.resize(density, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), _COLOUR_SCALE_PX / 8, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _smoothstep(value: np.ndarray) -> np.ndarray:
    value = np.clip(value, 0.0, 1.0)
    return value * value * (3.0 - 2.0 * value)
