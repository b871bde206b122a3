"""Stain normalisation: the colours of each slide brought to one fixed reference.

Colours are estimated once a slide, from pixels of evenly spaced tiles, and give one map of colours that every tile of
the slide goes through: estimates of single tiles would change colour from one tile to its neighbour, and a tile without
nuclei has no haematoxylin to find. The sample depends on the slide and its grid alone, never on threads or chance.

Written from the papers, as the libraries do not fit: torchstain 1.4 (MIT) estimates anew in each call to `normalize`
and cannot be handed a slide's estimate; HistomicsTK (Apache-2.0) can, for Reinhard, but is a compiled package that
brings scikit-image, dask and a client of its server; torch-staintools is not for commercial use. The tests hold both
methods against the numbers of the first two.

The references are numbers of real tissue that others use as well:

- Macenko: the stain vectors and 99th percentiles of concentration that the public MATLAB code of the method has and
  that torchstain takes by default.
- Reinhard: mean and standard deviation of the breast cancer slide TCGA-A2-A3XS-DX1 of Amgad et al., Bioinformatics
  2019, the standard of HistomicsTK.

A slide whose colours cannot be estimated fails: left as it is, it would lie among normalised ones and look like them.

Reference:
    Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
    Reinhard et al., "Color transfer between images", IEEE Computer Graphics and Applications 21 (2001).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np

from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.tiling import TileGrid

StainMethod = Literal["none", "macenko", "reinhard"]
# Turns tiles (n, h, w, 3) uint8 RGB into tiles of the reference's colours; safe to call from several threads.
StainMap: TypeAlias = Callable[[np.ndarray], np.ndarray]

GLASS_LIGHT = 240.0  # the light through clear glass that Macenko's reference goes with, of 255
LEAST_DENSITY = 0.15  # natural-log density, mean of the channels, under which a pixel is glass
REFERENCE_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])  # (haematoxylin, eosin; R, G, B)
REFERENCE_AMOUNTS = np.array([1.9705, 1.0308])  # 99th percentiles of haematoxylin, eosin
REFERENCE_MEAN = np.array([8.74108109, -0.12440419, 0.0444982])  # l, α, β
REFERENCE_STD = np.array([0.6135447, 0.10989545, 0.0286032])

_SAMPLE_TILES = 32
_SAMPLE_PIXELS = 8192  # of each tile
_LEAST_PIXELS = 1000
_ANGLE_PERCENTILE, _AMOUNT_PERCENTILE = 1.0, 99.0
_LEAST_ANGLE_DEGREES = 5.0  # between the two stains; the reference's are 22° apart
_BLOCK_PX = 1 << 15  # pixels computed at a time: their floats stay in a core's cache

_RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LOG_LMS_TO_LAB = np.diag([1 / math.sqrt(3), 1 / math.sqrt(6), 1 / math.sqrt(2)]) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]
_LEAST_LMS = 1.0  # of 255: black has no logarithm

_DENSITY_TABLE = -np.log((np.arange(256) + 1.0) / GLASS_LIGHT).astype(np.float32)  # one is added as black has no log


@dataclass(frozen=True, eq=False)
class MacenkoMap:
    """Takes the amounts of a slide's two stains, scales each, and dyes with the reference's stains.

    With the optical density d = -ln((I + 1) / 240) of a pixel (one is added so that black stays finite), the slide's
    stains W (2, 3), the reference's W_ref, and g = reference amounts / slide's amounts,

        d' = d W⁺ diag(g) W_ref,    I' = 240 exp(-d').

    Attributes:
        matrix: W⁺ diag(g) W_ref transposed, float32 (3, 3): d'ᵀ = matrix dᵀ.
    """

    matrix: np.ndarray

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Map tiles (n, h, w, 3) uint8 RGB."""
        result = np.empty(tiles.shape, np.uint8)
        for pixels, place in _blocks(tiles, result):
            density = cv2.transform(cv2.LUT(pixels, _DENSITY_TABLE), -self.matrix)  # (M, 1, 3)
            np.copyto(place, _to_levels(GLASS_LIGHT * cv2.exp(density)))
        return result


@dataclass(frozen=True, eq=False)
class ReinhardMap:
    """Shifts and scales a slide's colours in the space lαβ, so that their mean and spread are the reference's.

    lαβ is a rotation of the logarithms of the cones' answers LMS to a colour; a channel c becomes
    (c - mean) * reference's std / std + reference's mean. Glass is shifted with the tissue, as in the paper.

    Attributes:
        affine: The shift and the scale in ln LMS, float32 (3, 4).
    """

    affine: np.ndarray

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Map tiles (n, h, w, 3) uint8 RGB."""
        result = np.empty(tiles.shape, np.uint8)
        for pixels, place in _blocks(tiles, result):
            lms = np.maximum(cv2.transform(pixels.astype(np.float32), _TO_LMS), _LEAST_LMS)  # (M, 1, 3)
            mapped = cv2.exp(cv2.transform(cv2.log(lms), self.affine))
            np.copyto(place, _to_levels(cv2.transform(mapped, _TO_RGB)))
        return result


_TO_LMS = _RGB_TO_LMS.astype(np.float32)
_TO_RGB = np.linalg.inv(_RGB_TO_LMS).astype(np.float32)


def estimate_stain_map(slide: Slide, grid: TileGrid, method: Literal["macenko", "reinhard"]) -> StainMap:
    """Estimate a slide's colours and return the map from them to the reference's.

    Args:
        slide: The slide.
        grid: Its tiles, at least one; up to 32 of them, evenly spaced, are read.
        method: "macenko" or "reinhard".

    Returns:
        The map for every tile of the slide.

    Raises:
        SlideError: If the slide cannot be read, or has too little stained tissue, or not the two stains.
    """
    pixels = sample_pixels(slide, grid)  # (M, 3)
    try:
        return macenko_map(pixels) if method == "macenko" else reinhard_map(pixels)
    except ValueError as error:
        raise SlideError(
            f"slide '{slide.slide_id}': {error} ({slide.path}). Leave the slide out, or turn stain_normalisation off."
        ) from error


def sample_pixels(slide: Slide, grid: TileGrid) -> np.ndarray:
    """Read evenly spaced tiles and keep every so-manieth pixel of them: uint8 RGB (M, 3)."""
    chosen = np.unique(np.linspace(0, len(grid) - 1, min(len(grid), _SAMPLE_TILES)).round().astype(int))
    step = max(1, grid.tile_px**2 // _SAMPLE_PIXELS) | 1  # odd, so that it does not stay in the same columns
    side, tile_px = grid.tile_level0_px, grid.tile_px
    tiles = (slide.read_tile(x, y, size_level0_px=side, out_px=tile_px) for x, y in grid.coords[chosen].tolist())
    return np.concatenate([tile.reshape(-1, 3)[::step] for tile in tiles])


def macenko_map(pixels: np.ndarray) -> MacenkoMap:
    """Estimate the stains of a slide from a sample of it.

    The densities of stained pixels lie near a plane through zero. Haematoxylin and eosin are the directions at the
    1st and 99th percentile of the angle in that plane, haematoxylin the one of more red density; a stain's amount is
    the 99th percentile of its concentrations.

    Args:
        pixels: uint8 RGB (M, 3); those under LEAST_DENSITY do not count. Libraries ask that of every channel, which
            drops pale eosin, and so finds other stains where the same tissue is stained paler (docs/experiments.md).

    Returns:
        The map to the reference.

    Raises:
        ValueError: If too few pixels count, or they are of one colour.
    """
    density = _DENSITY_TABLE[_stained(pixels)].astype(np.float64)  # (M, 3)
    stains = _stain_vectors(density)  # (2, 3)
    angle = math.degrees(math.acos(min(1.0, float(stains[0] @ stains[1]))))
    amounts = np.percentile(_product(density, np.linalg.pinv(stains)), _AMOUNT_PERCENTILE, axis=0)  # (2,)
    if angle < _LEAST_ANGLE_DEGREES or amounts.min() <= 0:
        raise ValueError(
            f"its two stains must differ in colour by {_LEAST_ANGLE_DEGREES:g}° at least, got {angle:.1f}°: "
            "Macenko's method is for haematoxylin and eosin"
        )
    matrix = np.linalg.pinv(stains) @ np.diag(REFERENCE_AMOUNTS / amounts) @ REFERENCE_STAINS
    return MacenkoMap(np.ascontiguousarray(matrix.T, np.float32))


def reinhard_map(pixels: np.ndarray) -> ReinhardMap:
    """Estimate mean and spread of a slide's colours from a sample of it.

    Args:
        pixels: uint8 RGB (M, 3); those under LEAST_DENSITY do not count.

    Returns:
        The map to the reference.

    Raises:
        ValueError: If too few pixels count, or they are of one colour.
    """
    lms = np.maximum(_product(_stained(pixels).astype(np.float64), _RGB_TO_LMS.T), _LEAST_LMS)
    lab = _product(np.log(lms), _LOG_LMS_TO_LAB.T)  # (M, 3)
    mean, std = lab.mean(axis=0), lab.std(axis=0)
    if std.min() < 1e-3:
        raise ValueError("its tissue must have more than one colour, got one: Reinhard's method scales their spread")
    back = np.linalg.inv(_LOG_LMS_TO_LAB)
    scale = np.diag(REFERENCE_STD / std)
    affine = np.column_stack([back @ scale @ _LOG_LMS_TO_LAB, back @ (REFERENCE_MEAN - scale @ mean)])
    return ReinhardMap(affine.astype(np.float32))


def _stain_vectors(density: np.ndarray) -> np.ndarray:
    """Unit vectors of haematoxylin and eosin (2, 3) from densities (M, 3)."""
    centred = density - density.mean(axis=0)
    covariance = [[(centred[:, i] * centred[:, j]).mean() for j in range(3)] for i in range(3)]
    _, vectors = np.linalg.eigh(covariance)
    plane = vectors[:, :0:-1]  # (3, 2): the two directions of most variance, the first one first
    plane = plane * np.where(density.mean(axis=0) @ plane < 0, -1.0, 1.0)  # eigenvectors come with any sign
    projected = _product(density, plane)  # (M, 2)
    angles = np.arctan2(projected[:, 1], projected[:, 0])
    ends = np.percentile(angles, [_ANGLE_PERCENTILE, 100 - _ANGLE_PERCENTILE])
    stains = np.column_stack([np.cos(ends), np.sin(ends)]) @ plane.T  # (2, 3)
    return stains if stains[0, 0] > stains[1, 0] else stains[::-1]


def _product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`rows @ matrix` (M, 3) by (3, K), with sums that no number of BLAS threads changes."""
    return rows[:, :1] * matrix[0] + rows[:, 1:2] * matrix[1] + rows[:, 2:] * matrix[2]


def _stained(pixels: np.ndarray) -> np.ndarray:
    """Those pixels (M, 3) that are not glass; ValueError if they are too few."""
    stained = pixels[_DENSITY_TABLE[pixels].mean(axis=1) >= LEAST_DENSITY]
    if len(stained) < _LEAST_PIXELS:
        raise ValueError(
            f"stained pixels must be at least {_LEAST_PIXELS} for an estimate of its colours, "
            f"got {len(stained)} of the {len(pixels)} looked at"
        )
    return stained


def _blocks(tiles: np.ndarray, result: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Matching pieces of tiles and result, each (M, 1, 3), the shape that OpenCV takes."""
    pixels, places = tiles.reshape(-1, 1, 3), result.reshape(-1, 1, 3)
    for start in range(0, len(pixels), _BLOCK_PX):
        yield pixels[start : start + _BLOCK_PX], places[start : start + _BLOCK_PX]


def _to_levels(light: np.ndarray) -> np.ndarray:
    """Round to whole levels 0 to 255."""
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
