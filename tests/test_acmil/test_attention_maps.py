"""Raster geometry, display values, concentration, tables and GeoJSON, by numbers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acmil.attention_maps import (
    AttentionMapError,
    attention_entropy,
    attention_geojson,
    concentration_curve,
    descending_rank,
    percentile_rank,
    relative_attention,
    score_raster,
    select_branch,
    tile_table,
    top_k_mass,
)


def test_raster_on_a_grid_drawn_by_hand():
    coords = np.array([[0, 0], [4, 0], [4, 8]])
    raster = score_raster(np.array([1.0, 2.0, 3.0]), coords, tile_level0_px=4, level0_size=(12, 12), downsample=2.0)
    nan = np.nan
    expected = [
        [1, 1, 2, 2, nan, nan],
        [1, 1, 2, 2, nan, nan],
        [nan, nan, nan, nan, nan, nan],
        [nan, nan, nan, nan, nan, nan],
        [nan, nan, 3, 3, nan, nan],
        [nan, nan, 3, 3, nan, nan],
    ]
    assert raster.dtype == np.float32
    np.testing.assert_array_equal(raster, np.array(expected, dtype=np.float32))


def test_overlapping_tiles_are_averaged():
    raster = score_raster(
        np.array([1.0, 4.0]), np.array([[0, 0], [2, 0]]), tile_level0_px=4, level0_size=(6, 4), downsample=1.0
    )
    np.testing.assert_array_equal(raster[0], [1, 1, 2.5, 2.5, 4, 4])


@given(
    side=st.integers(2, 300),
    downsample=st.floats(1.0, 40.0),
    columns=st.integers(1, 12),
    rows=st.integers(1, 6),
    origin=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_touching_tiles_neither_gap_nor_overlap(side, downsample, columns, rows, origin):
    """At any downsample not above the tile side, each raster pixel of the grid belongs to exactly one tile."""
    downsample = min(downsample, float(side))
    x, y = (offset + side * np.arange(n) for offset, n in zip(origin, (columns, rows), strict=True))
    coords = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    level0_size = (int(x[-1]) + side + 64, int(y[-1]) + side + 64)
    shape = tuple(int(np.ceil(extent / downsample)) + 1 for extent in level0_size[::-1])
    raster = score_raster(
        np.arange(len(coords), dtype=float), coords, tile_level0_px=side, level0_size=level0_size,
        downsample=downsample, shape=shape,
    )  # fmt: skip
    x_edges, y_edges = (
        np.floor((offset + side * np.arange(n + 1)) / downsample + 0.5).astype(int)
        for offset, n in zip(origin, (columns, rows), strict=True)
    )
    expected = np.full(shape, np.nan)
    painted = np.arange(len(coords)).reshape(rows, columns).repeat(np.diff(y_edges), 0).repeat(np.diff(x_edges), 1)
    expected[y_edges[0] : y_edges[-1], x_edges[0] : x_edges[-1]] = painted
    np.testing.assert_array_equal(raster, expected)


def test_tile_edges_are_within_half_a_raster_pixel():
    downsample, side = 7.3, 100
    raster = score_raster(
        np.array([1.0]), np.array([[150, 260]]), tile_level0_px=side, level0_size=(1000, 1000), downsample=downsample
    )
    rows, columns = np.nonzero(~np.isnan(raster))
    for found, true in ((columns.min(), 150), (columns.max() + 1, 250), (rows.min(), 260), (rows.max() + 1, 360)):
        assert abs(found - true / downsample) <= 0.5


def test_a_tile_smaller_than_a_pixel_still_paints_one():
    raster = score_raster(
        np.array([5.0, 7.0]), np.array([[0, 0], [90, 90]]), tile_level0_px=10, level0_size=(100, 100), downsample=50.0
    )
    np.testing.assert_array_equal(raster, [[5, np.nan], [np.nan, 7]])


def test_raster_refuses_foreign_coordinates():
    with pytest.raises(AttentionMapError, match=r"slide of 100 x 100 px, got \[0, 0\] to \[200, 0\]"):
        score_raster(np.ones(2), np.array([[0, 0], [200, 0]]), tile_level0_px=10, level0_size=(100, 100), downsample=2)
    with pytest.raises(AttentionMapError, match=r"got \(3,\) and \(2, 2\)"):
        score_raster(np.ones(3), np.zeros((2, 2)), tile_level0_px=10, level0_size=(100, 100), downsample=2)


def test_no_tiles_give_an_empty_raster():
    raster = score_raster(np.ones(0), np.zeros((0, 2)), tile_level0_px=10, level0_size=(100, 60), downsample=10)
    assert raster.shape == (6, 10)
    assert np.isnan(raster).all()


def test_branch_choice():
    attention = np.array([[0.5, 0.5], [0.1, 0.9]])
    np.testing.assert_allclose(select_branch(attention), [0.3, 0.7])
    np.testing.assert_array_equal(select_branch(attention, "1"), [0.1, 0.9])
    for wrong in ("2", "-1", "first"):
        with pytest.raises(AttentionMapError, match="'mean' or a number from 0 to 1"):
            select_branch(attention, wrong)


def test_relative_attention_is_one_when_uniform():
    np.testing.assert_allclose(relative_attention(np.full(7, 1 / 7)), 1.0)
    np.testing.assert_allclose(relative_attention(np.array([[0.5, 0.25, 0.25]])), [[1.5, 0.75, 0.75]])


def test_ranks_and_percentiles_with_ties():
    values = np.array([3.0, 1.0, 3.0, 2.0])
    np.testing.assert_array_equal(descending_rank(values), [1, 4, 2, 3])
    np.testing.assert_allclose(percentile_rank(values), [75.0, 12.5, 75.0, 37.5])
    np.testing.assert_allclose(percentile_rank(np.ones(5)), 50.0)


def test_concentration_measures():
    attention = np.array([0.1, 0.6, 0.3])
    np.testing.assert_allclose(concentration_curve(attention), [0.6, 0.9, 1.0])
    assert top_k_mass(attention, 2) == pytest.approx(0.9)
    assert top_k_mass(attention, 10) == pytest.approx(1.0)
    assert attention_entropy(np.full(8, 1 / 8)) == pytest.approx(np.log(8))
    assert attention_entropy(np.array([0.0, 1.0])) == 0.0


@pytest.fixture
def table():
    attention = np.array([[0.2, 0.5, 0.3], [0.4, 0.5, 0.1]])
    coords = np.array([[0, 0], [256, 0], [0, 256]])
    return tile_table("s1", attention, coords, tile_level0_px=256, tissue_fraction=np.array([0.5, 1.0, 0.75]))


def test_tile_table(table):
    assert table.columns.tolist() == [
        "slide_id", "x", "y", "width", "height", "attention", "attention_branch_0", "attention_branch_1",
        "shown", "relative_attention", "rank", "percentile", "tissue_fraction",
    ]  # fmt: skip
    np.testing.assert_allclose(table["attention"], [0.3, 0.5, 0.2])
    np.testing.assert_allclose(table["relative_attention"], [0.9, 1.5, 0.6])
    assert table["rank"].tolist() == [2, 1, 3]
    np.testing.assert_allclose(table["percentile"], [50, 250 / 3, 50 / 3])
    np.testing.assert_array_equal(table[["x", "y", "width", "height"]].iloc[1], [256, 0, 256, 256])
    assert set(table["slide_id"]) == {"s1"}


def test_ranks_are_of_the_attention_that_is_shown():
    attention = np.array([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])
    table = tile_table("s1", attention, np.zeros((3, 2)), tile_level0_px=256, branch="1")
    assert set(table["shown"]) == {"1"}
    assert table["rank"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(table["relative_attention"], [2.1, 0.6, 0.3])
    np.testing.assert_allclose(table["attention"], [0.45, 0.35, 0.2])
    first = attention_geojson(table)["features"][0]["properties"]["measurements"]
    assert first["rank"] == 1
    assert first["attention_branch_1"] == 0.7


def test_a_branch_of_a_model_with_one():
    with pytest.raises(AttentionMapError, match="branch must be 'mean' or 0, the only one, got 1"):
        select_branch(np.ones((1, 2)) / 2, 1)


def test_tile_table_refuses_disagreeing_arrays():
    with pytest.raises(AttentionMapError, match="slide 's1'"):
        tile_table("s1", np.ones((2, 4)), np.zeros((3, 2)), tile_level0_px=256)


def test_geojson_is_qupath_detections_in_level0_pixels(table):
    colours = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.uint8)
    collection = json.loads(json.dumps(attention_geojson(table, colours=colours), allow_nan=False))
    assert collection["type"] == "FeatureCollection"
    first, *others = collection["features"]
    assert len(others) == 2
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[256, 0], [512, 0], [512, 256], [256, 256], [256, 0]]],
    }
    assert first["properties"]["objectType"] == "detection"
    assert first["properties"]["color"] == [4, 5, 6]
    measured = first["properties"]["measurements"]
    assert measured["attention"] == 0.5
    assert measured["rank"] == 1.0
    assert measured["attention_branch_1"] == 0.5
    assert measured["tissue_fraction"] == 1.0
    assert "x" not in measured


def test_geojson_keeps_the_top_fraction(table):
    features = attention_geojson(table, top_fraction=0.5)["features"]  # 1.5 tiles, rounded up
    assert [feature["properties"]["measurements"]["rank"] for feature in features] == [1.0, 2.0]
    with pytest.raises(AttentionMapError, match="top_fraction"):
        attention_geojson(table, top_fraction=0.0)
