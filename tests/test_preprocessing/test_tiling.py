from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acmil.preprocessing.readers import Rectangle
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import Tissue, find_tissue


def stand_in(width, height, mpp, bounds=None):
    """What a grid asks of a slide, without pixels."""
    bounds = bounds or Rectangle(0, 0, width, height)
    return SimpleNamespace(slide_id="a", path="a.tiff", width=width, height=height, mpp=mpp, bounds=bounds)


def tissue_of(mask, downsample):
    return Tissue(mask=mask, downsample=downsample, polygons=(), fraction=float(mask.mean()))


@st.composite
def layouts(draw):
    """A slide, a random tissue mask for it, and tile options."""
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    mpp = draw(st.sampled_from([0.2275, 0.25, 0.499, 0.5]))
    downsample = draw(st.floats(8, 40))
    shape = int(np.ceil(height / downsample)), int(np.ceil(width / downsample))
    mask = np.random.default_rng(draw(st.integers(0, 1000))).random(shape) < draw(st.floats(0, 1))
    tile_px = draw(st.sampled_from([64, 224, 256]))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    bounds = Rectangle(left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top)))
    whole = draw(st.booleans())
    slide = stand_in(width, height, mpp, None if whole else bounds)
    return slide, tissue_of(mask, downsample), tile_px, draw(st.sampled_from([0.5, 0.6, 1.0]))


@given(layout=layouts(), min_tissue=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_tiles_are_inside_in_order_and_never_overlap(layout, min_tissue):
    slide, tissue, tile_px, tile_mpp = layout
    grid = tile_grid(slide, tissue, tile_px=tile_px, tile_mpp=tile_mpp, min_tissue=min_tissue)
    side, area = grid.tile_level0_px, slide.bounds
    assert side == round(tile_px * tile_mpp / slide.mpp)
    assert grid.tile_mpp == pytest.approx(side * slide.mpp / tile_px, rel=1e-12)
    assert (grid.coords.dtype, grid.tissue_fraction.dtype) == (np.int64, np.float32)
    assert grid.coords.shape == (len(grid), 2)
    if not len(grid):
        return
    assert (grid.coords >= [area.x, area.y]).all()
    assert (grid.coords + side <= [area.x + area.width, area.y + area.height]).all()
    assert np.array_equal(np.lexsort(grid.coords.T), np.arange(len(grid)))
    cells = (grid.coords - [area.x, area.y]) / side
    assert np.array_equal(cells, np.rint(cells))  # On one lattice of the tile's own side,
    assert len(np.unique(cells, axis=0)) == len(cells)  # each place once: no two overlap.
    assert (grid.tissue_fraction >= min_tissue).all()


@given(layout=layouts())
def test_every_tissue_pixel_under_the_grid_is_counted_in_one_tile(layout):
    slide, tissue, tile_px, tile_mpp = layout
    grid = tile_grid(slide, tissue, tile_px=tile_px, tile_mpp=tile_mpp, min_tissue=0.0)
    if not len(grid):
        return
    side = grid.tile_level0_px
    left, top = grid.coords.min(0)
    right, bottom = grid.coords.max(0) + side
    rows = overlap_px(top, bottom, tissue.mask.shape[0], tissue.downsample)
    columns = overlap_px(left, right, tissue.mask.shape[1], tissue.downsample)
    assert grid.tissue_fraction.sum(dtype=float) * side**2 == pytest.approx(
        rows @ tissue.mask @ columns, rel=1e-5, abs=1.0
    )


def overlap_px(low, high, count, downsample):
    """Level-0 px that [low, high) shares with each of `count` mask pixels along one axis."""
    edges = np.arange(count) * downsample
    return np.clip(np.minimum(high, edges + downsample) - np.maximum(low, edges), 0, None)


@given(overlap=st.integers(0, 255), mpp=st.sampled_from([0.2275, 0.25, 0.5]))
@settings(max_examples=40)
def test_overlapping_tiles_step_by_the_rest(overlap, mpp):
    step = max(1, round((256 - overlap) * round(128 / mpp) / 256))
    slide = stand_in(round(128 / mpp) + 3 * step, round(128 / mpp) + step, mpp)
    tissue = tissue_of(np.ones((200, 200), bool), 16.0)
    grid = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5, overlap_px=overlap)
    assert grid.overlap_px == overlap
    assert grid.coords.tolist() == [[x * step, y * step] for y in range(2) for x in range(4)]


def test_fractions_by_hand():
    mask = np.zeros((4, 8), bool)
    mask[:, :3] = True  # Tissue left of level-0 x = 48.
    mask[3, 7] = True
    slide = stand_in(128, 64, 0.5)
    grid = tile_grid(slide, tissue_of(mask, 16.0), tile_px=32, tile_mpp=0.5, min_tissue=0.25)
    assert grid.coords.tolist() == [[0, 0], [32, 0], [0, 32], [32, 32], [96, 32]]
    assert grid.tissue_fraction.tolist() == [1.0, 0.5, 1.0, 0.5, 0.25]
    stricter = tile_grid(slide, tissue_of(mask, 16.0), tile_px=32, tile_mpp=0.5, min_tissue=0.5)
    assert len(stricter) == 4
    assert len(tile_grid(slide, tissue_of(mask, 16.0), tile_px=32, tile_mpp=0.5, min_tissue=0.0)) == 8


@given(downsample=st.floats(8, 40), mpp=st.sampled_from([0.2275, 0.25, 0.499]))
def test_a_tile_full_of_tissue_passes_the_strictest_limit(downsample, mpp):
    """Also where rounding leaves its share a hair under 1."""
    shape = (int(np.ceil(2000 / downsample)),) * 2
    tissue = tissue_of(np.ones(shape, bool), downsample)
    grid = tile_grid(stand_in(2000, 2000, mpp), tissue, tile_px=256, tile_mpp=0.5, min_tissue=1.0)
    assert len(grid) == (2000 // grid.tile_level0_px) ** 2
    assert (grid.tissue_fraction == 1).all()


def test_grid_begins_at_the_scanned_area():
    slide = stand_in(10_000, 10_000, 0.25, Rectangle(1003, 2005, 1100, 1030))
    tissue = tissue_of(np.ones((313, 313), bool), 32.0)
    grid = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5)
    assert grid.coords.tolist() == [[1003, 2005], [1515, 2005], [1003, 2517], [1515, 2517]]


def test_a_slide_smaller_than_a_tile_has_none(shared_data):
    with Slide.open(shared_data / "slides" / "edge_cases" / "small.svs") as slide:
        grid = tile_grid(slide, find_tissue(slide), tile_px=256, tile_mpp=0.5, min_tissue=0.0)
    assert (len(grid), grid.coords.shape, grid.tissue_fraction.shape) == (0, (0, 2), (0,))
    assert (grid.tile_level0_px, grid.tile_mpp) == (257, pytest.approx(0.500949, abs=1e-6))


def test_real_slide(shared_data):
    with Slide.open(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide)
        every = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5, min_tissue=0.0)
        some = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5)
        again = tile_grid(slide, find_tissue(slide), tile_px=256, tile_mpp=0.5)
    assert len(every) == 88
    assert 36 <= len(some) <= 44
    assert np.array_equal(some.coords, again.coords)
    assert np.array_equal(some.tissue_fraction, again.tissue_fraction)


def test_finer_than_the_slide_is_refused():
    tissue = tissue_of(np.ones((10, 10), bool), 16.0)
    slide = stand_in(2000, 2000, 0.5)
    assert tile_grid(slide, tissue, tile_px=256, tile_mpp=0.48).tile_level0_px == 246  # Within 5 %.
    with pytest.raises(SlideError, match=r"slide 'a': tile_mpp must be at least level 0's 0\.5 µm/px .* got 0\.25"):
        tile_grid(slide, tissue, tile_px=256, tile_mpp=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_px": 0}, "tile_px must be at least 1, got 0"),
        ({"tile_mpp": 0.0}, r"tile_mpp must be > 0 µm/px, got 0\.0"),
        ({"tile_mpp": float("nan")}, "tile_mpp must be > 0 µm/px, got nan"),
        ({"overlap_px": 256}, "overlap_px must be within 0 to tile_px - 1 = 255, got 256"),
        ({"overlap_px": -1}, "overlap_px must be within 0 .* got -1"),
        ({"min_tissue": 1.5}, r"min_tissue must be within 0 to 1, got 1\.5"),
    ],
)
def test_options_out_of_range(options, message):
    tissue = tissue_of(np.ones((10, 10), bool), 16.0)
    with pytest.raises(ValueError, match=message):
        tile_grid(stand_in(2000, 2000, 0.5), tissue, **{"tile_px": 256, "tile_mpp": 0.5, **options})
