import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acmil.preprocessing.geometry import (
    check_mpp,
    grid_coords,
    measured_mpp,
    select_level,
    thumbnail_side_px,
    tile_side_level0_px,
    tile_step_level0_px,
)
from acmil.preprocessing.readers import Rectangle, SlideError

areas = st.builds(
    Rectangle,
    x=st.integers(0, 5000),
    y=st.integers(0, 5000),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
)


@pytest.mark.parametrize(
    ("levels", "asked", "index", "shrink"),
    [
        ((1.0,), 1.0, 0, 1.0),
        ((1.0, 4.0, 16.0), 3.9, 1, 0.975),  # Within 5 % of level 1.
        ((1.0, 4.0, 16.0), 3.7, 0, 3.7),  # Level 1 would be upsampled by 8 %.
        ((1.0, 4.0, 16.0), 8.0, 1, 2.0),
        ((1.0, 2.0005), 2.0, 1, 2.0 / 2.0005),  # A floored level size, not a coarser level.
        ((1.0, 2.0, 4.016, 8.086), 100.0, 3, 100 / 8.086),
        ((1.0,), 0.96, 0, 0.96),
    ],
)
def test_level_is_the_coarsest_not_coarser_than_asked(levels, asked, index, shrink):
    choice = select_level(levels, downsample=asked)
    assert (choice.index, choice.downsample) == (index, levels[index])
    assert choice.shrink == pytest.approx(shrink)


def test_finer_than_the_slide_is_refused():
    with pytest.raises(SlideError, match=r"0\.5 level-0 px per px, finer than .* \(1\) by more than 5%"):
        select_level([1.0, 4.0], downsample=0.5)


@given(levels=st.lists(st.floats(1, 100), max_size=6), asked=st.floats(1, 200))
def test_a_chosen_level_never_upsamples_and_is_the_best_of_those(levels, asked):
    levels = [1.0, *sorted(levels)]
    choice = select_level(levels, downsample=asked)
    assert choice.shrink >= 1 / 1.05 - 1e-12
    assert all(level <= choice.downsample or level > asked * 1.05 for level in levels)


@pytest.mark.parametrize(
    ("tile_px", "tile_mpp", "slide_mpp", "side", "measured"),
    [
        (256, 0.5, 0.499, 257, 257 * 0.499 / 256),
        (256, 0.5, 0.25, 512, 0.5),
        (256, 0.5, 0.2275, 563, 563 * 0.2275 / 256),
        (224, 1.0, 0.2525, 887, 887 * 0.2525 / 224),
    ],
)
def test_tile_side_is_rounded_and_its_pitch_measured(tile_px, tile_mpp, slide_mpp, side, measured):
    assert tile_side_level0_px(tile_px=tile_px, tile_mpp=tile_mpp, slide_mpp=slide_mpp) == side
    got = measured_mpp(tile_level0_px=side, tile_px=tile_px, slide_mpp=slide_mpp)
    assert got == pytest.approx(measured, rel=1e-12)
    assert got == pytest.approx(tile_mpp, rel=0.002)  # Half a level-0 pixel of a tile's side.


@pytest.mark.parametrize(("overlap", "step"), [(0, 563), (64, 422), (128, 282), (255, 2)])
def test_step_of_overlapping_tiles(overlap, step):
    assert tile_step_level0_px(tile_px=256, overlap_px=overlap, tile_level0_px=563) == step


@given(area=areas, side=st.integers(1, 700), step=st.integers(50, 700))
def test_grid_is_whole_inside_and_in_order(area, side, step):
    coords = grid_coords(area, side_level0_px=side, step_level0_px=step)
    columns = max(0, (area.width - side) // step + 1)
    rows = max(0, (area.height - side) // step + 1)
    assert coords.dtype == np.int64
    assert coords.shape == (columns * rows, 2)
    x, y = coords.T
    if not len(coords):
        return
    assert (x.min(), y.min()) == (area.x, area.y)
    assert x.max() + side <= area.x + area.width < x.max() + side + step
    assert y.max() + side <= area.y + area.height < y.max() + side + step
    assert np.array_equal(np.lexsort((x, y)), np.arange(len(coords)))  # Sorted by y, then x.
    assert set(np.unique(np.diff(np.unique(x)))) <= {step}
    assert set(np.unique(np.diff(np.unique(y)))) <= {step}


@pytest.mark.parametrize(
    ("side", "downsample", "px"), [(2000, 16.0, 125), (2001, 16.0, 126), (3, 16.0, 1), (3, 0.3, 10)]
)
def test_thumbnail_reaches_the_last_pixel(side, downsample, px):
    assert thumbnail_side_px(side, downsample) == px


@pytest.mark.parametrize("mpp", [352.78, 0.0499, 20.1, 0.0, -0.5, float("nan"), float("inf")])
def test_absurd_resolution_names_the_range_and_the_mend(mpp):
    with pytest.raises(SlideError, match=r"slide 'a': .* within 0\.05 to 20 µm/px, got .*file\.tiff.* --mpp-override"):
        check_mpp(mpp, source="file.tiff", slide_id="a")


def test_real_resolutions_pass():
    for mpp in (0.05, 0.2275, 0.5, 20.0):
        assert check_mpp(mpp, source="file", slide_id="a") == mpp
