import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acmil.preprocessing.readers import Rectangle
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tissue import area_fraction, find_tissue, tissue_mask

masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31)).map(
    lambda t: np.random.default_rng(t[2]).random(t[:2]) < 0.5
)


def ring_area(ring):
    """Area inside a ring of points, shoelace formula."""
    x, y = np.asarray(ring, float).T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def polygon_area(polygon):
    return ring_area(polygon.exterior) - sum(ring_area(hole) for hole in polygon.holes)


def find(slide_picture, make_memory_slide, **options):
    return find_tissue(make_memory_slide(slide_picture), **options)


def test_an_ellipse_is_found_to_a_thumbnail_pixel(make_memory_slide, make_tissue_picture):
    tissue = find(make_tissue_picture(4000, 3000, ellipses=[(1500, 1400, 900, 600)]), make_memory_slide)
    assert (tissue.downsample, tissue.mask.shape) == (16.0, (188, 250))
    area = np.pi * 900 * 600
    perimeter = 4750  # Of the ellipse, about.
    assert tissue.fraction * 4000 * 3000 == pytest.approx(area, abs=16 * perimeter)
    assert tissue.mask[1400 // 16, 1500 // 16]
    assert not tissue.mask[2800 // 16, 1500 // 16]
    assert len(tissue.polygons) == 1
    assert polygon_area(tissue.polygons[0]) == pytest.approx(tissue.mask.sum() * 256, rel=0.03)
    left, top = tissue.polygons[0].exterior.min(0)
    right, bottom = tissue.polygons[0].exterior.max(0)
    assert np.abs(np.array([left, top, right, bottom]) - [600, 800, 2400, 2000]).max() <= 24


def test_glass_alone_has_no_tissue(make_memory_slide, make_tissue_picture):
    tissue = find(make_tissue_picture(2000, 2000, ellipses=[]), make_memory_slide)
    assert (tissue.mask.sum(), tissue.fraction, tissue.polygons) == (0, 0.0, ())
    assert tissue.to_geojson() == {"type": "FeatureCollection", "features": []}


def test_a_slide_full_of_tissue_is_all_tissue(make_memory_slide, make_tissue_picture):
    """Otsu alone would keep the dark nests and lose the stroma around them."""
    picture = make_tissue_picture(2000, 2000, ellipses=[(1000, 1000, 3000, 3000)])
    for x in range(100, 2000, 200):
        cv2.circle(picture, (x, 1000), 90, (90, 40, 140), -1)
    tissue = find(picture, make_memory_slide)
    assert tissue.mask.all()
    assert tissue.fraction == 1.0
    assert polygon_area(tissue.polygons[0]) == pytest.approx(2000 * 2000, rel=0.02)


def test_noise_of_any_grain_is_no_tissue():
    generator = np.random.default_rng(0)
    for spread in (1, 4, 8):
        image = (240 + generator.integers(-spread, spread + 1, (200, 200, 3))).astype(np.uint8)
        assert not tissue_mask(image).any()


def test_black_is_no_tissue(make_memory_slide, make_tissue_picture):
    picture = make_tissue_picture(2000, 2000, ellipses=[(1000, 1000, 300, 300)])
    picture[:400] = np.random.default_rng(0).integers(0, 12, (400, 2000, 3))
    tissue = find(picture, make_memory_slide)
    assert not tissue.mask[: 400 // 16].any()
    assert tissue.mask[1000 // 16, 1000 // 16]


def test_specks_go_and_holes_fill_by_area_in_um2(make_memory_slide, make_tissue_picture):
    # Radii in level-0 px at 0.5 µm/px: 48 px is a disc of 1,810 µm², 120 px one of 11,310 µm².
    pieces = [(1000, 1000, 800, 800), (2400, 500, 48, 48), (2400, 1500, 120, 120)]
    picture = make_tissue_picture(4000, 2000, ellipses=pieces)
    cv2.circle(picture, (700, 1000), 56, (243, 243, 244), -1)  # 2,463 µm²: filled.
    cv2.circle(picture, (1300, 1000), 160, (243, 243, 244), -1)  # 20,106 µm²: a hole.
    tissue = find(picture, make_memory_slide)
    places = [(2400, 500), (2400, 1500), (700, 1000), (1300, 1000)]
    assert [bool(tissue.mask[y // 16, x // 16]) for x, y in places] == [False, True, True, False]
    assert sorted(len(polygon.holes) for polygon in tissue.polygons) == [0, 1]
    assert ring_area(next(p for p in tissue.polygons if p.holes).holes[0]) == pytest.approx(np.pi * 160**2, rel=0.15)
    assert find(picture, make_memory_slide, min_area_um2=1000).mask[500 // 16, 2400 // 16]
    assert find(picture, make_memory_slide, max_hole_um2=30000).mask[1000 // 16, 1300 // 16]


def test_a_bay_at_the_slides_edge_is_not_filled_as_a_hole(make_memory_slide, make_tissue_picture):
    picture = make_tissue_picture(2000, 2000, ellipses=[(1000, 1000, 3000, 3000)])
    cv2.circle(picture, (1000, 0), 70, (243, 243, 244), -1)
    assert not find(picture, make_memory_slide).mask[0, 1000 // 16]


def test_fraction_is_of_the_scanned_area(make_memory_slide, make_tissue_picture):
    picture = make_tissue_picture(2048, 2048, ellipses=[(1024, 1024, 4000, 4000)])
    picture[:, 1024:] = 255
    slide = make_memory_slide(picture, bounds=Rectangle(512, 0, 1024, 2048))
    assert find_tissue(slide).fraction == pytest.approx(0.5, abs=0.02)
    slide = make_memory_slide(picture, bounds=Rectangle(0, 0, 1000, 2048))
    assert find_tissue(slide).fraction == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [("CMU-1-Small-Region.svs", None, 0.33, 0.37), ("tcga-cr-7395-01a-01-ts1.svs", 1.0, 0.60, 0.64)],
)
def test_real_slides(shared_data, name, mpp, low, high):
    with Slide.open(shared_data / "slides" / name, mpp=mpp) as slide:
        tissue = find_tissue(slide)
        area = slide.width * slide.height
    assert low < tissue.fraction < high
    outlined = sum(polygon_area(polygon) for polygon in tissue.polygons) / area
    assert outlined == pytest.approx(tissue.fraction, rel=0.04)


def test_a_slide_of_a_few_pixels(shared_data):
    with Slide.open(shared_data / "slides" / "edge_cases" / "small.svs") as slide:
        tissue = find_tissue(slide)
    assert (tissue.mask.shape, tissue.fraction, tissue.polygons) == ((1, 1), 0.0, ())


def test_geojson_opens_in_qupath(make_memory_slide, make_tissue_picture):
    picture = make_tissue_picture(2000, 2000, ellipses=[(1000, 1000, 800, 800)])
    cv2.circle(picture, (1000, 1000), 300, (243, 243, 244), -1)
    tissue = find(picture, make_memory_slide)
    document = json.loads(json.dumps(tissue.to_geojson()))
    assert document["type"] == "FeatureCollection"
    (feature,) = document["features"]
    assert feature["properties"] == {"objectType": "annotation", "classification": {"name": "Tissue"}}
    assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
    exterior, hole = feature["geometry"]["coordinates"]
    assert exterior[0] == exterior[-1]
    assert hole[0] == hole[-1]
    assert ring_area(exterior[:-1]) == pytest.approx(np.pi * 800**2, rel=0.03)
    assert ring_area(hole[:-1]) == pytest.approx(np.pi * 300**2, rel=0.08)


@given(mask=masks, corners=st.lists(st.floats(-3, 15), min_size=4, max_size=4))
def test_area_fraction_is_the_sum_over_pixels(mask, corners):
    """Against the plain definition: overlap of the box with each mask pixel."""
    left, right = sorted(corners[:2])
    top, bottom = sorted(corners[2:])
    got = area_fraction(mask, np.array([[left, top, right, bottom]]))[0]

    def overlap(low, high, count):
        edges = np.arange(count)
        return np.clip(np.minimum(high, edges + 1) - np.maximum(low, edges), 0, None)

    height, width = mask.shape
    covered = overlap(top, bottom, height) @ mask @ overlap(left, right, width)
    area = (right - left) * (bottom - top)
    if area > 1e-6:
        assert got == pytest.approx(covered / area, abs=1e-6)


def test_area_fraction_of_nothing():
    mask = np.ones((3, 3), bool)
    assert area_fraction(mask, np.empty((0, 4))).shape == (0,)
    assert area_fraction(mask, np.array([[1.0, 1.0, 1.0, 2.0]])).tolist() == [0.0]
    assert area_fraction(mask, np.array([[2.5, 0.0, 3.5, 1.0]])).tolist() == [0.5]


def test_coarse_slides_use_their_own_pitch(make_memory_slide, make_tissue_picture):
    slide = make_memory_slide(make_tissue_picture(300, 200, ellipses=[(150, 100, 80, 60)]), mpp=16.0)
    tissue = find_tissue(slide, mpp=8.0)
    assert (tissue.downsample, tissue.mask.shape) == (1.0, (200, 300))
    assert tissue.fraction == pytest.approx(np.pi * 80 * 60 / 60000, rel=0.03)


def test_thumbnail_is_read_at_the_stated_pitch():
    asked = []

    def thumbnail(mpp):
        asked.append(mpp)
        return SimpleNamespace(image=np.full((10, 10, 3), 255, np.uint8), downsample=8.0)

    find_tissue(SimpleNamespace(thumbnail=thumbnail, mpp=0.5, bounds=Rectangle(0, 0, 80, 80)), mpp=4.0)
    assert asked == [4.0]


def test_tinted_glass_of_a_part_that_was_scanned_is_an_alarm(make_memory_slide, make_tissue_picture):
    picture = make_tissue_picture(8000, 6000, ellipses=[(3000, 3000, 1000, 800)])
    plain = find(picture, make_memory_slide)
    assert not [alarm for alarm in plain.alarms if "rectangle" in alarm]
    tinted = np.full((6000, 8000, 3), 255, np.uint8)
    tinted[1000:5000, 1000:6000] = (240, 232, 205)
    is_tissue = np.ptp(picture.astype(int), axis=2) > 40
    tinted[is_tissue] = picture[is_tissue]
    (alarm,) = [alarm for alarm in find(tinted, make_memory_slide).alarms if "rectangle" in alarm]
    assert alarm == "1 of the pieces of tissue fill a rectangle: look at the preview, they may be tinted glass"
