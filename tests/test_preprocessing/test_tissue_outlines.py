"""Outlines: traced, written, edited, read back and filled."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tissue import find_tissue, given_tissue
from acmil.preprocessing.tissue_outlines import (
    OutlineError,
    Polygon,
    fill,
    inside_outlines,
    read_outlines,
    read_tissue_outlines,
)

SQUARE = [[100, 100], [900, 100], [900, 900], [100, 900], [100, 100]]
HOLE = [[300, 300], [500, 300], [500, 500], [300, 500], [300, 300]]
OTHER = [[1000, 1000], [1200, 1000], [1200, 1100], [1000, 1100], [1000, 1000]]


def written(folder, document, slide_id="memory"):
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / f"{slide_id}.geojson").write_text(text, encoding="utf-8")
    return folder


def feature(kind, coordinates):
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": {}}


def test_what_is_written_comes_back(tmp_path, shared_data):
    with Slide.open(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        found = find_tissue(slide)
        written(tmp_path, found.to_geojson(), slide.slide_id)
        back = given_tissue(slide, tmp_path)
    assert (back.mask.shape, back.downsample) == (found.mask.shape, found.downsample)
    assert (back.mask & found.mask).sum() / (back.mask | found.mask).sum() > 0.97
    assert back.fraction == pytest.approx(found.fraction, rel=0.02)
    assert back.to_geojson() == found.to_geojson()


@pytest.mark.parametrize(
    ("document", "pixels"),
    [
        ({"type": "FeatureCollection", "features": [feature("Polygon", [SQUARE, HOLE])]}, 6400 - 400),
        (feature("MultiPolygon", [[SQUARE, HOLE], [OTHER]]), 6400 - 400 + 200),
        ([feature("Polygon", [SQUARE]), feature("Polygon", [SQUARE[::-1]]), feature("Polygon", [OTHER])], 6600),
        ({"type": "Polygon", "coordinates": [OTHER[:-1]]}, 200),
        ({"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [OTHER]}]}, 200),
        ({"type": "FeatureCollection", "features": []}, 0),
    ],
)
def test_every_form_of_polygons_is_filled(tmp_path, make_memory_slide, document, pixels):
    slide = make_memory_slide(np.full((2000, 2000, 3), 255, np.uint8))
    tissue = given_tissue(slide, written(tmp_path, document), mpp=5.0)  # 10 level-0 px a mask pixel
    assert tissue.mask.shape == (200, 200)
    assert tissue.mask.sum() == pixels
    assert tissue.fraction == pytest.approx(pixels / 40000)
    assert tissue.alarms == (() if pixels > 400 else (f"only {pixels / 40000:.2%} of the slide is tissue",))


@given(
    mask=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31)).map(
        lambda t: np.random.default_rng(t[2]).random(t[:2]) < 0.5
    )
)
def test_the_square_of_each_pixel_fills_that_pixel(mask):
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    squares = tuple(Polygon((corners + np.array([x, y])) * 7.5) for y, x in np.argwhere(mask))
    height, width = mask.shape
    assert (fill(squares, height=height, width=width, downsample=7.5) == mask).all()


def test_what_lies_over_the_edge_is_cut():
    around = Polygon(np.array([[-50.0, -50], [1000, -50], [1000, 1000], [-50, 1000]]))
    outside = Polygon(np.array([[500.0, 500], [600, 500], [600, 600]]))
    assert fill((around,), height=5, width=4, downsample=10).all()
    assert not fill((outside,), height=5, width=4, downsample=10).any()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{ not json", "Expecting"),
        ({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}, "type 'Point'"),
        ({"features": []}, "type None"),
        ({"type": "FeatureCollection"}, "'features'"),
        (feature("Polygon", [[[0, 0], [1, 1], [0, 0]]]), "a ring of 2 points"),
        (feature("Polygon", [[[0, 0], [1, float("nan")], [0, 3]]]), "finite"),
        (feature("Polygon", []), "exterior|unpack"),
        (feature("Polygon", [["a", "b", "c"]]), "could not convert"),
        ("7", "attribute"),
        ({"type": "Feature", "geometry": None}, "attribute"),
    ],
)
def test_bad_outlines_name_slide_file_and_mend(tmp_path, document, message):
    written(tmp_path, document)
    with pytest.raises(OutlineError, match=message) as caught:
        read_tissue_outlines(tmp_path, "memory")
    text = str(caught.value)
    assert text.startswith("slide 'memory': outlines must be GeoJSON polygons in level-0 px, got ")
    assert str(tmp_path / "memory.geojson") in text
    assert text.endswith("Export them from QuPath as GeoJSON, polygons only.")


def test_missing_outlines_say_so(tmp_path):
    with pytest.raises(OutlineError, match=r"slide 's': tissue_from must hold .* found no s\.geojson"):
        read_tissue_outlines(tmp_path, "s")


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [feature("Polygon", [SQUARE, HOLE])]},
        [feature("Polygon", [SQUARE, HOLE]), feature("Point", [1, 2]), feature("LineString", [[1, 2], [3, 4]])],
        [feature("MultiPolygon", [[SQUARE, HOLE]]), {"type": "Feature", "geometry": None, "properties": {}}],
    ],
)
def test_drawings_without_an_area_are_left_out(tmp_path, document):
    (polygon,) = read_outlines(written(tmp_path, document) / "memory.geojson")
    exterior, hole = polygon.rings
    np.testing.assert_array_equal(exterior, SQUARE[:-1])
    np.testing.assert_array_equal(hole, HOLE[:-1])


@pytest.mark.parametrize("text", ["{", '{"features": []}', '{"type": "Polygon", "coordinates": [[1, 2]]}', "3"])
def test_malformed_files_of_any_outlines_are_named(tmp_path, text):
    with pytest.raises(OutlineError, match=r"^outlines must be GeoJSON polygons .*bad\.geojson"):
        read_outlines(written(tmp_path, text, "bad") / "bad.geojson")


def test_points_in_holes_and_overlaps():
    holed = Polygon(np.array(SQUARE[:-1], float), (np.array(HOLE[:-1], float),))
    other = Polygon(np.array([[800.0, 800], [2000, 800], [2000, 2000], [800, 2000]]))
    points = np.array([[150, 150], [400, 400], [850, 850], [1500, 1500], [2500, 400]])
    assert inside_outlines(points, [holed, other]).tolist() == [True, False, True, True, False]
    assert inside_outlines(points, []).tolist() == [False] * 5
