"""A slide's tissue before any lesion: an outline, filled with overlapping patches of real tissue."""

from dataclasses import dataclass

import cv2
import numpy as np

from acmil.demo.tissue_source import COARSE_PX, PAD_PX, TissuePart

TILE_PX = 224
MIN_TISSUE = 0.5  # a tile counts as tissue from this share on, as in configs/preprocess/demo.yaml
TISSUE_TILES = (56, 82)  # tissue tiles a slide: inside 50 to 90 even if a tissue finder draws the edge differently

_CELLS_PER_TILE = TILE_PX // COARSE_PX
_PATCH_RADIUS_PX = (260, 410)  # below PAD_PX
_N_SHAPES = 5
_FEATHER_PX = 12.0
_FRAME_CELLS = 9.0
_MAX_PATCHES = 400


@dataclass(frozen=True)
class Outline:
    """Where a slide's tissue lies, on cells of `COARSE_PX`.

    Attributes:
        depth_px: Signed distance to the edge in level-0 px, positive inside, float32 (h, w).
        tissue_tiles: Boolean (rows, columns) over the grid of `TILE_PX` from (0, 0): what counts as tissue.
    """

    depth_px: np.ndarray
    tissue_tiles: np.ndarray


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Gaussian noise blurred by `sigma` cells, with standard deviation 1: float32 of `shape`."""
    shrink = max(1, int(sigma / 4))
    small = tuple(side // shrink + 2 for side in shape)
    noise = cv2.GaussianBlur(rng.standard_normal(small, dtype=np.float32), (0, 0), sigma / shrink)
    noise = cv2.resize(noise, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_CUBIC)[: shape[0], : shape[1]]
    return (noise - noise.mean()) / noise.std()


def draw_outline(rng: np.random.Generator) -> Outline:
    """Draw an irregular outline whose number of tissue tiles lies in `TISSUE_TILES`."""
    while True:
        n_tiles = int(rng.integers(TISSUE_TILES[0], TISSUE_TILES[1] + 1))
        aspect = float(np.exp(rng.uniform(-0.35, 0.35)))
        columns, rows = (round(np.sqrt(1.6 * n_tiles * ratio)) for ratio in (aspect, 1.0 / aspect))
        field = _outline_field(rng, rows * _CELLS_PER_TILE, columns * _CELLS_PER_TILE)
        inside = _threshold_for(field, n_tiles)
        if inside is not None:
            return Outline(_signed_distance_px(inside), _tissue_tiles(inside))


def _outline_field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x + 0.5) / width * 2.0 - 1.0, (y + 0.5) / height * 2.0 - 1.0
    field = 1.0 - np.sqrt(x**2 + y**2)
    for sigma, amplitude in ((26.0, 0.22), (10.0, 0.08), (4.0, 0.025)):
        field += amplitude * smooth_noise(rng, (height, width), sigma)
    frame = np.minimum(np.minimum(1.0 + x, 1.0 - x) * width, np.minimum(1.0 + y, 1.0 - y) * height) / 2  # cells
    wanted = _FRAME_CELLS + 2.0 * np.clip(smooth_noise(rng, (height, width), 6.0), -1.5, 1.5)
    return field - np.maximum(0.0, wanted - frame)  # glass all round


def _threshold_for(field: np.ndarray, n_tiles: int) -> np.ndarray | None:
    """The level set of `field` with `n_tiles` tissue tiles, found by halving; None where no level gives that number."""
    low, high = float(field.min()), float(field.max())
    for _ in range(24):
        middle = 0.5 * (low + high)
        inside = _without_specks(field > middle)
        count = int(_tissue_tiles(inside).sum())
        if count == n_tiles:
            return inside
        low, high = (middle, high) if count > n_tiles else (low, middle)
    return None


def _without_specks(inside: np.ndarray) -> np.ndarray:
    """Keep pieces of at least three tiles and fill the holes."""
    n_labels, labels, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=4)
    large = [k for k in range(1, n_labels) if stats[k, cv2.CC_STAT_AREA] >= 3 * _CELLS_PER_TILE**2]
    kept = np.isin(labels, large).astype(np.uint8)
    outer, _ = cv2.findContours(kept, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(kept, outer, -1, 1, cv2.FILLED)
    return kept > 0


def _tissue_tiles(inside: np.ndarray) -> np.ndarray:
    return tile_shares(inside) >= MIN_TISSUE


def tile_shares(inside: np.ndarray) -> np.ndarray:
    """Share of each tile of the grid from (0, 0) that a coarse mask (h, w) covers: float64 (rows, columns)."""
    rows, columns = (side // _CELLS_PER_TILE for side in inside.shape)
    cells = inside[: rows * _CELLS_PER_TILE, : columns * _CELLS_PER_TILE]
    return cells.reshape(rows, _CELLS_PER_TILE, columns, _CELLS_PER_TILE).mean(axis=(1, 3))


def _signed_distance_px(inside: np.ndarray) -> np.ndarray:
    mask = inside.astype(np.uint8)
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)
    return cv2.GaussianBlur(distance, (0, 0), 1.0) * COARSE_PX


def quilt(part: TissuePart, outline: Outline, rng: np.random.Generator, *, cellularity: float = 0.0) -> np.ndarray:
    """Fill an outline with patches of a part's tissue, each with an irregular soft edge, in optical density.

    The patches are turned by multiples of 90° and mirrored.

    Args:
        part: Where the patches come from.
        outline: What to fill.
        rng: Draws them.
        cellularity: Preference for tissue with many nuclei (positive) or few (negative): log odds of the part's most
            cellular place against its least.

    Returns:
        Optical density, float32 (h, w, 3), in level-0 px; filled a little beyond the outline.
    """
    height, width = (side * COARSE_PX for side in outline.depth_px.shape)
    density = np.zeros((height + 2 * PAD_PX, width + 2 * PAD_PX, 3), np.float32)
    open_cells = outline.depth_px > -2 * COARSE_PX
    odds = np.exp(cellularity * part.cellularity)
    centres = part.centres[rng.choice(len(odds), size=_MAX_PATCHES, p=odds / odds.sum())]
    shapes = [_patch_shape(rng) for _ in range(_N_SHAPES)]
    for centre in centres:
        y, x = np.nonzero(open_cells)
        if len(y) == 0:
            break
        target = int(rng.integers(len(y)))
        cell = (int(x[target]), int(y[target]))
        patch, opacity = _cut_patch(part, centre, shapes[rng.integers(len(shapes))], rng)
        _lay(density, patch, opacity, cell)
        _close_cells(open_cells, opacity, cell)
    return density[PAD_PX : PAD_PX + height, PAD_PX : PAD_PX + width]


def _patch_shape(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an irregular patch: its depth in px and the fraying of source edges inside it, both float32 (side, side)."""
    cells = int(np.ceil(rng.uniform(*_PATCH_RADIUS_PX) / COARSE_PX))
    side = 2 * cells * COARSE_PX
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) - (side - 1) / 2
    radius = 0.75 * side / 2
    waves = _enlarged_noise(rng, side, 60.0), _enlarged_noise(rng, side, 12.0), _enlarged_noise(rng, side, 20.0)
    depth = radius - np.hypot(x, y) + 0.15 * radius * waves[0] + 8.0 * waves[1]
    frame = side / 2 - _FEATHER_PX - np.maximum(np.abs(x), np.abs(y))
    return np.minimum(depth, frame), 30.0 + 12.0 * np.clip(waves[2], -1.5, 1.5)


def _enlarged_noise(rng: np.random.Generator, side: int, sigma_px: float) -> np.ndarray:
    noise = smooth_noise(rng, (side // 4, side // 4), sigma_px / 4)
    return cv2.resize(noise, (side, side), interpolation=cv2.INTER_LINEAR)


def _cut_patch(
    part: TissuePart, centre: np.ndarray, shape: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut density (side, side, 3) and opacity (side, side) of a patch around a centre, turned at random."""
    depth, fraying = shape
    half = len(depth) // 2
    window = np.s_[centre[1] - half : centre[1] + half, centre[0] - half : centre[0] + half]
    depth = np.minimum(depth, part.depth_px[window] - fraying)
    opacity = np.clip(depth / (2 * _FEATHER_PX) + 0.5, 0.0, 1.0)
    turn = (None, cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)[rng.integers(4)]
    mirrored = bool(rng.integers(2))

    def oriented(array: np.ndarray) -> np.ndarray:
        turned = array if turn is None else cv2.rotate(array, turn)
        return cv2.flip(turned, 1) if mirrored else turned

    return oriented(part.density[window]), oriented(opacity)


def _lay(density: np.ndarray, patch: np.ndarray, opacity: np.ndarray, cell: tuple[int, int]) -> None:
    side = len(opacity)
    left, top = (PAD_PX + index * COARSE_PX + COARSE_PX // 2 - side // 2 for index in cell)
    below = density[top : top + side, left : left + side]
    below[:] = cv2.blendLinear(patch, below, opacity, 1.0 - opacity)


def _close_cells(open_cells: np.ndarray, opacity: np.ndarray, cell: tuple[int, int]) -> None:
    """Mark as filled every cell that the patch covers well."""
    half = len(opacity) // COARSE_PX // 2
    covered = opacity[::COARSE_PX, ::COARSE_PX] >= 0.98  # (cells, cells)
    left, top = cell[0] - half, cell[1] - half
    height, width = open_cells.shape
    rows, columns = slice(max(0, top), min(height, top + 2 * half)), slice(max(0, left), min(width, left + 2 * half))
    open_cells[rows, columns] &= ~covered[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    open_cells[cell[1], cell[0]] = False


def edge_opacity(outline: Outline, density: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Opacity of the tissue at its edge: frayed along its own fibres, about 3 px soft.

    Args:
        outline: The outline drawn.
        density: Optical density of the filled canvas, float32 (h, w, 3).
        rng: Draws the fraying.

    Returns:
        Float32 (h, w) in 0-1.
    """
    height, width = density.shape[:2]
    depth: np.ndarray = cv2.resize(outline.depth_px, (width, height), interpolation=cv2.INTER_CUBIC)
    fibres = cv2.GaussianBlur(density[..., 1], (0, 0), 2.0)
    depth += 14.0 * smooth_noise(rng, (height, width), 24.0) + 5.0 * smooth_noise(rng, (height, width), 5.0)
    depth += 40.0 * np.minimum(fibres - 0.45, 0.4)  # gaps open towards the glass, fibres reach out into it
    return np.clip(depth / 3.0 + 0.5, 0.0, 1.0)
