"""Quality of tiles: what is broken on purpose is found, clean H&E is not, and each tile is measured by itself."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from acmil.preprocessing import quality as module
from acmil.preprocessing.feature_file import MEASURES
from acmil.preprocessing.quality import quality_summary, tile_quality, within_limits
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import find_tissue

FOCUS, PEN, FOLD, BLOOD, DARK, STAIN = range(6)
INKS = {
    "blue": (40, 60, 160),
    "light blue": (70, 100, 190),
    "violet blue": (50, 45, 160),
    "green": (30, 130, 70),
    "light green": (90, 170, 120),
    "red": (225, 40, 60),
    "dark red": (200, 20, 40),
    "black": (40, 38, 45),
    "grey": (70, 70, 75),
}


@pytest.fixture(scope="module")
def skin(shared_data) -> np.ndarray:
    """The tiles of a slide of skin, at level 0."""
    return tiles_of(shared_data / "slides/CMU-1-Small-Region.svs", mpp=0.5)


@pytest.fixture(scope="module")
def carcinoma(shared_data) -> np.ndarray:
    """The tiles of a frozen section, which has folds and bubbles; it states no resolution."""
    return tiles_of(shared_data / "slides/tcga-cr-7395-01a-01-ts1.svs", mpp=1.0)


@pytest.fixture(scope="module", params=["skin", "carcinoma"])
def real_tiles(request) -> np.ndarray:
    return request.getfixturevalue(request.param)


def tiles_of(path: Path, *, mpp: float) -> np.ndarray:
    """All tiles (N, 224, 224, 3) of a slide that is taken to have this resolution."""
    with Slide.open(path, mpp=mpp) as slide:
        grid = tile_grid(slide, find_tissue(slide), tile_px=224, tile_mpp=mpp)
        side = grid.tile_level0_px
        return np.stack([slide.read_tile(x, y, size_level0_px=side, out_px=224) for x, y in grid.coords.tolist()])


def single_layers(tiles: np.ndarray) -> np.ndarray:
    """Tiles that are all tissue, none of it folded."""
    quality = tile_quality(tiles)
    is_tissue = (tiles.mean(axis=(1, 2))[:, 1] < 200) & (quality[:, FOLD] == 0)
    assert is_tissue.sum() >= 10
    return tiles[is_tissue]


def texture(n_tiles: int, side: int) -> np.ndarray:
    """Synthetic tissue: blobs of haematoxylin on eosin, and a grain."""
    generator = np.random.default_rng(0)
    tiles = []
    for _ in range(n_tiles):
        nuclei = cv2.GaussianBlur(generator.random((side, side), np.float32), (0, 0), 3)[..., None]
        tile = np.where(nuclei > np.quantile(nuclei, 0.8), (110, 70, 150), (225, 150, 190))
        tiles.append(np.clip(tile + generator.integers(-4, 5, tile.shape), 0, 255).astype(np.uint8))
    return np.stack(tiles)


def with_stroke(tile: np.ndarray, colour: tuple[int, int, int], *, cover: float = 1.0) -> tuple[np.ndarray, float]:
    """A broad marker stroke across a tile, covering so much of what is under it; and its share of the tile."""
    height, width = tile.shape[:2]
    stroke = np.zeros((height, width), np.float32)
    cv2.line(stroke, (-20, height // 2 - 30), (width + 20, height // 2 + 40), 1.0, height // 3)
    weight = cv2.GaussianBlur(stroke, (0, 0), 1.0)[..., None] * cover
    grain = np.random.default_rng(0).normal(0, 2, tile.shape)
    painted = tile * (1 - weight) + (np.array(colour) + grain) * weight
    return np.clip(painted, 0, 255).astype(np.uint8), float((weight > 0.95 * cover).mean())


def test_focus_falls_with_blur_on_every_tile(real_tiles):
    blurred = [np.stack([cv2.GaussianBlur(tile, (0, 0), sigma) for tile in real_tiles]) for sigma in (1, 2, 4)]
    sharp, *rest = (tile_quality(tiles)[:, FOCUS] for tiles in (real_tiles, *blurred))
    assert (np.diff([sharp, *rest], axis=0) < 0).all()
    assert sharp.min() > 0.5
    assert np.median(sharp) > 1.0
    assert rest[1].max() < 0.3  # blurred by 2 px: a limit of 0.3 tells them all from the sharp
    assert rest[2].max() < 0.15


def test_a_faint_stain_is_no_blur(real_tiles):
    faint = (real_tiles * 0.5 + 120).astype(np.uint8)
    ratio = tile_quality(faint) / np.maximum(tile_quality(real_tiles), 1e-9)
    assert np.median(ratio[:, FOCUS]) == pytest.approx(1.0, abs=0.1)
    assert np.median(ratio[:, STAIN]) == pytest.approx(0.5, abs=0.1)


def test_focus_falls_with_blur_on_synthetic_tissue():
    tiles = texture(4, 256)
    by_sigma = [
        tile_quality(np.stack([cv2.GaussianBlur(tile, (0, 0), sigma) for tile in tiles]))[:, FOCUS]
        for sigma in (0.5, 1, 2, 4, 8)
    ]
    assert (np.diff([tile_quality(tiles)[:, FOCUS], *by_sigma], axis=0) < 0).all()
    assert by_sigma[-1].max() < 0.15


def test_clean_tissue_has_next_to_no_pen_blood_or_darkness(real_tiles):
    quality = tile_quality(real_tiles)
    assert np.median(quality[:, [PEN, FOLD, BLOOD, DARK]], axis=0) == pytest.approx([0, 0, 0, 0], abs=0.004)
    # On the skin's edges there are specks of a green dye, up to 6 % of a tile.
    assert quality[:, [PEN, BLOOD, DARK]].max(axis=0) == pytest.approx([0, 0, 0], abs=0.06)


def test_a_slide_without_dye_has_no_pen_at_all(carcinoma):
    assert tile_quality(carcinoma)[:, [PEN, DARK]].max() < 0.001


@pytest.mark.parametrize("colour", INKS.values(), ids=INKS)
def test_dense_pen_over_real_tissue_is_found(real_tiles, colour):
    tiles = single_layers(real_tiles)[::3]
    painted, shares = zip(*(with_stroke(tile, colour) for tile in tiles), strict=True)
    found = tile_quality(np.stack(painted))[:, PEN] / shares[0]
    assert found.min() > 0.95
    assert found.max() < 1.15  # the stroke's soft edge, and what dye was there


@pytest.mark.parametrize(("name", "least"), [("blue", 0.9), ("light blue", 0.85), ("green", 0.9), ("light green", 0.9)])
def test_pen_that_lets_a_fifth_through_is_found(real_tiles, name, least):
    tiles = single_layers(real_tiles)[::3]
    painted, shares = zip(*(with_stroke(tile, INKS[name], cover=0.8) for tile in tiles), strict=True)
    assert (tile_quality(np.stack(painted))[:, PEN] / shares[0]).min() > least


@pytest.mark.parametrize("name", ["red", "dark red"])
def test_red_pen_is_neither_blood_nor_a_fold(real_tiles, name):
    tiles = single_layers(real_tiles)[::3]
    quality = tile_quality(np.stack([with_stroke(tile, INKS[name])[0] for tile in tiles]))
    assert quality[:, [BLOOD, FOLD]].max() < 0.06


def test_folded_tissue_is_found(real_tiles):
    tiles = single_layers(real_tiles)
    other = np.roll(tiles, 1, axis=0)[:, ::-1]
    folded = (tiles.astype(np.float64) * other / 240).clip(0, 255).astype(np.uint8)  # 240: the light through glass
    assert np.median(tile_quality(folded)[:, FOLD]) > 0.15


def test_the_densities_of_layers_add_up():
    tiles = texture(6, 128)
    other = tiles[::-1, ::-1]
    folded = np.rint((tiles + 1.0) * (other + 1.0) / 256 - 1).astype(np.uint8)
    layers = tile_quality(tiles)[:, STAIN] + tile_quality(other)[:, STAIN]
    np.testing.assert_allclose(tile_quality(folded)[:, STAIN], layers, rtol=0.02)


def test_the_real_folds_of_the_carcinoma_stand_out(carcinoma):
    fold = np.sort(tile_quality(carcinoma)[:, FOLD])[::-1]
    assert fold[:8].min() > 0.1  # folds and thick edges, as seen on a contact sheet
    assert np.median(fold) == 0
    assert np.quantile(fold, 0.8) < 0.02


@pytest.mark.parametrize(
    ("colour", "measure"),
    [
        ((190, 60, 80), BLOOD),
        ((200, 80, 100), BLOOD),
        ((225, 90, 130), None),  # strong eosin
        ((90, 60, 140), None),  # haematoxylin
        ((90, 60, 45), DARK),  # melanin
        ((45, 44, 50), DARK),
        ((5, 3, 4), DARK),
        ((70, 30, 90), None),  # nuclei, densely crowded
    ],
)
def test_colours_are_told_apart(real_tiles, colour, measure):
    tiles = single_layers(real_tiles)[::3]
    painted, shares = zip(*(with_stroke(tile, colour) for tile in tiles), strict=True)
    found = tile_quality(np.stack(painted))[:, [BLOOD, DARK]] / shares[0]
    expected = [0.0, 0.0]
    if measure is not None:
        expected[(BLOOD, DARK).index(measure)] = 1.0
    np.testing.assert_allclose(np.median(found, axis=0), expected, atol=0.08)


def test_flat_tiles_are_finite_and_as_expected():
    levels = np.array([0, 39, 128, 245, 255], np.uint8)
    tiles = np.broadcast_to(levels[:, None, None, None], (5, 64, 64, 3)).copy()
    quality = tile_quality(tiles)
    assert np.isfinite(quality).all()
    assert (quality[:, FOCUS] == 0).all()
    assert quality[:, [PEN, DARK]].tolist() == [[0, 1], [1, 1], [0, 0], [0, 0], [0, 0]]  # black is no ink: unlit
    density = -np.log((levels + 1.0) / 256)
    np.testing.assert_allclose(quality[:, STAIN], np.where(density > 0.12, density, 0), rtol=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert np.isfinite(tile_quality(noise)).all()


def test_no_tiles_are_no_rows():
    assert tile_quality(np.empty((0, 32, 32, 3), np.uint8)).shape == (0, len(MEASURES))


@pytest.mark.parametrize("side", [16, 100, 224, 250])
def test_a_tile_is_measured_alone_whatever_the_batch(monkeypatch, side):
    tiles = texture(9, side)
    tiles[4] = 255 - tiles[4]  # what a neighbour could not have without being seen
    together = tile_quality(tiles)
    assert (together.dtype, together.shape) == (np.float32, (9, 6))
    alone = np.concatenate([tile_quality(tile[None]) for tile in tiles])
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(tile_quality(tiles[::-1]), together[::-1])
    monkeypatch.setattr(module, "_MOST_PX", 3 * side * side)
    np.testing.assert_array_equal(tile_quality(tiles), together)
    cut = side // 16 * 16
    np.testing.assert_array_equal(tile_quality(tiles[:, :cut, :cut]), together)


def test_limits_hold_what_is_at_them():
    quality = np.zeros((3, 6), np.float32)
    quality[:, FOCUS] = [0.25, 0.5, 1.0]
    quality[:, PEN] = [0.0, 0.125, 0.25]
    assert within_limits(quality, {}).tolist() == [True, True, True]
    assert within_limits(quality, {"min_focus": 0.5}).tolist() == [False, True, True]
    assert within_limits(quality, {"min_focus": 0.5, "max_pen": 0.125}).tolist() == [False, True, False]
    assert within_limits(quality, {"min_stain": 0.1}).tolist() == [False, False, False]
    assert within_limits(quality[:0], {"max_dark": 0.1}).shape == (0,)


def test_the_summary_is_of_all_tiles():
    quality = np.array([[0.2, 0, 0, 0, 0, 0.5], [0.4, 0.3, 0.2, 0.1, 0.6, 0.7], [2.0, 0, 0, 0.2, 0, 0.6]], np.float32)
    assert quality_summary(quality) == {
        "focus_median": 0.4,
        "pen_mean": 0.1,
        "fold_mean": 0.0667,
        "blood_mean": 0.1,
        "dark_mean": 0.2,
        "stain_mean": 0.6,
    }
    assert set(quality_summary(None).values()) == set(quality_summary(quality[:0]).values()) == {None}
