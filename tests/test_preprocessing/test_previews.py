import numpy as np
import pytest

from acmil.preprocessing.previews import OUTLINE_RGB, preview_image
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import find_tissue


def is_outline(image):
    return (np.abs(image.astype(int) - OUTLINE_RGB) < 30).all(-1)


def test_outline_and_tiles_lie_where_they_should(make_memory_slide, make_tissue_picture):
    slide = make_memory_slide(make_tissue_picture(4000, 4000, ellipses=[(2000, 2000, 1200, 1200)]))
    tissue = find_tissue(slide)
    grid = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5)
    image = preview_image(slide, tissue, grid)
    assert (image.shape, image.dtype) == ((1000, 1000, 3), np.uint8)
    rows, columns = np.nonzero(is_outline(image))
    radius = np.hypot(rows - 500, columns - 500) * 4  # Level-0 px from the centre.
    assert len(rows) > 1500
    assert np.abs(radius - 1200).max() < 48

    plain = slide.thumbnail_within(1000).image.astype(int)
    changed = np.abs(image - plain).max(-1) > 20
    x, y = grid.coords[len(grid) // 2]
    left, top, right = round(x / 4), round(y / 4), round((x + 256) / 4)
    assert changed[top, left:right].all()  # The tile's upper edge,
    assert not changed[top + 10 : top + 50, left + 10 : right - 10].any()  # and nothing drawn within.


@pytest.mark.parametrize(
    ("side", "mpp", "expected"),
    [(600, 0.5, 600), (4000, 0.5, 1000), (6000, 2.0, 1500), (6000, 4.0, 2000)],
)
def test_size_follows_the_tissue_picture_within_limits(make_memory_slide, side, mpp, expected):
    slide = make_memory_slide(np.full((side // 4, side, 3), 240, np.uint8), mpp=mpp)
    tissue = find_tissue(slide)
    image = preview_image(slide, tissue, tile_grid(slide, tissue, tile_px=256, tile_mpp=mpp))
    assert image.shape == (expected // 4, expected, 3)


def test_a_slide_without_tiles_is_its_thumbnail(shared_data):
    with Slide.open(shared_data / "slides" / "edge_cases" / "small.svs") as slide:
        tissue = find_tissue(slide)
        grid = tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5)
        image = preview_image(slide, tissue, grid)
        assert len(grid) == 0
        assert np.array_equal(image, slide.thumbnail_within(16).image)


def test_a_real_slide_keeps_its_picture_under_the_lines(shared_data):
    with Slide.open(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide)
        image = preview_image(slide, tissue, tile_grid(slide, tissue, tile_px=256, tile_mpp=0.5))
        plain = slide.thumbnail_within(1000).image
    assert image.shape == plain.shape == (1000, 749, 3)
    changed = (image != plain).any(-1).mean()
    assert 0.01 < changed < 0.08
