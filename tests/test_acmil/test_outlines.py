"""Reading outlines from GeoJSON, and points inside them."""

import json

import numpy as np
import pytest

from acmil.outlines import OutlineError, inside_outlines, read_outlines

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[4, 4], [6, 4], [6, 6], [4, 6], [4, 4]]


def _feature(kind, coordinates):
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": coordinates}}


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [_feature("Polygon", [SQUARE, HOLE])]},
        _feature("MultiPolygon", [[SQUARE, HOLE]]),
        [_feature("Polygon", [SQUARE, HOLE]), _feature("Point", [1, 2])],
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE, HOLE]}]},
    ],
)
def test_every_form_gives_the_same_polygon(tmp_path, content):
    path = tmp_path / "s.geojson"
    path.write_text(json.dumps(content))
    (polygon,) = read_outlines(path)
    np.testing.assert_array_equal(polygon[0], SQUARE)
    np.testing.assert_array_equal(polygon[1], HOLE)


@pytest.mark.parametrize("text", ["{", '{"features": []}', '{"type": "Polygon", "coordinates": [[1, 2]]}', "3"])
def test_malformed_files_are_named(tmp_path, text):
    path = tmp_path / "bad.geojson"
    path.write_text(text)
    with pytest.raises(OutlineError, match=r"bad\.geojson"):
        read_outlines(path)


def test_points_in_holes_and_overlaps():
    other = [np.array([[8.0, 8], [20, 8], [20, 20], [8, 20]])]
    polygons = [[np.array(SQUARE, float), np.array(HOLE, float)], other]
    points = np.array([[1, 1], [5, 5], [9, 9], [15, 15], [25, 5]])
    assert inside_outlines(points, polygons).tolist() == [True, False, True, True, False]
    assert inside_outlines(points, []).tolist() == [False] * 5
