"""The resolution that tiles are said to have, against lines of known distance in their pixels."""

import numpy as np
import pytest

from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import Tissue

PERIOD_UM = 20.0
TILE_PX = 256
N_SPECTRUM = 1 << 17


def ruler(width_px, height_px, *, mpp):
    """Sine lines every 20 µm: red along x, green along y."""
    wave = np.sin(2 * np.pi * np.arange(max(width_px, height_px)) * mpp / PERIOD_UM)
    lines = np.rint(127.5 + 100 * wave).astype(np.uint8)
    image = np.full((height_px, width_px, 3), 128, np.uint8)
    image[..., 0] = lines[:width_px]
    image[..., 1] = lines[:height_px, None]
    return image


def profiles(tile):
    """Mean grey along x of the red lines and along y of the green ones, windowed."""
    for profile in (tile[..., 0].mean(0), tile[..., 1].mean(1)):
        yield (profile - profile.mean()) * np.hanning(len(profile))


def period_px(profile):
    return N_SPECTRUM / np.argmax(np.abs(np.fft.rfft(profile, N_SPECTRUM)))


def shift_px(profile, *, start_px, pixel_px, period_level0_px):
    """How far the lines lie from where level 0 has them, in level-0 px; the tile's pixels are `pixel_px` wide."""
    centres = start_px + (np.arange(len(profile)) + 0.5) * pixel_px - 0.5  # (n,) in level-0 pixel indices
    turn = np.sum(profile * np.exp(-2j * np.pi * centres / period_level0_px)) / np.exp(-0.5j * np.pi)
    return np.angle(turn) / (2 * np.pi) * period_level0_px


# Level 1 of 4001 px is 2000 px wide: 2.0005. Levels 2 and 5 of 2003 px: 2.001 and 5.0075.
@pytest.mark.parametrize(
    ("mpp", "side_px", "downsamples", "stated"),
    [
        (0.25, 4001, (1, 2), 2.0005),
        (0.2505, 2003, (1, 2), 2.0010),
        (0.2275, 2003, (1, 2, 5), 2.0010),
        (0.46, 2003, (1, 2), 2.0010),
        (0.5, 2003, (1, 2), 2.0010),
        (0.52, 2003, (1, 2), 2.0010),  # Coarser than 0.5, within the tolerance.
    ],
)
def test_tiles_have_the_resolution_that_is_said(tmp_path, write_slide, mpp, side_px, downsamples, stated):
    image = ruler(side_px, side_px, mpp=mpp)
    path = write_slide(tmp_path / "ruler.tiff", image, mpp=mpp, downsamples=downsamples)
    with Slide.open(path) as slide:
        assert slide._reader.facts.level_downsamples[1] == pytest.approx(stated, abs=1e-4)
        everything = Tissue(mask=np.ones((20, 20), bool), downsample=side_px / 20, polygons=(), fraction=1.0)
        for asked_mpp in (0.5, 1.0):
            grid = tile_grid(slide, everything, tile_px=TILE_PX, tile_mpp=asked_mpp)
            assert grid.tile_mpp == pytest.approx(asked_mpp, rel=0.005)
            for x, y in (grid.coords[0], grid.coords[-1]):
                tile = slide.read_tile(x, y, size_level0_px=grid.tile_level0_px, out_px=TILE_PX)
                pixel_px = grid.tile_level0_px / TILE_PX
                for profile, start_px in zip(profiles(tile), (x, y), strict=True):
                    measured_mpp = PERIOD_UM / period_px(profile)
                    assert measured_mpp == pytest.approx(asked_mpp, rel=0.01)
                    assert measured_mpp == pytest.approx(grid.tile_mpp, rel=0.01)
                    shift = shift_px(profile, start_px=start_px, pixel_px=pixel_px, period_level0_px=PERIOD_UM / mpp)
                    assert abs(shift) < 0.5 * pixel_px


def test_a_small_tile_says_the_resolution_that_rounding_leaves_it(tmp_path, write_slide):
    """Of 16 px at 0.5 µm/px on 0.46: 17 level-0 px, not 17.39; the grid says 0.489."""
    path = write_slide(tmp_path / "ruler.tiff", ruler(600, 600, mpp=0.46), mpp=0.46, downsamples=(1,))
    with Slide.open(path) as slide:
        everything = Tissue(mask=np.ones((20, 20), bool), downsample=30.0, polygons=(), fraction=1.0)
        grid = tile_grid(slide, everything, tile_px=16, tile_mpp=0.5)
        assert (grid.tile_level0_px, grid.tile_mpp) == (17, pytest.approx(17 * 0.46 / 16))
        row = [slide.read_tile(x, y, size_level0_px=17, out_px=16) for x, y in grid.coords if y == grid.coords[0, 1]]
    profile = next(profiles(np.concatenate(row, axis=1)))  # Neighbours, so their pixels go on without a gap.
    assert PERIOD_UM / period_px(profile) == pytest.approx(grid.tile_mpp, rel=0.01)
