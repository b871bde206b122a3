"""Colour scales and laying colours over tissue."""

import numpy as np
import pytest

from acmil.overlay import blend, percentile_scale, relative_scale


def test_relative_scale_is_centred_at_one_and_clipped():
    scale = relative_scale()
    assert (scale.low, scale.high) == (0.1, 10.0)
    assert scale.norm(1.0) == pytest.approx(0.5)
    assert scale.norm(np.sqrt(10)) == pytest.approx(0.75)
    np.testing.assert_array_equal(scale.colours(np.array([0.0, 100.0])), scale.colours(np.array([0.1, 10.0])))
    red, blue = scale.colours(np.array([10.0, 0.1])).astype(int)
    assert red[0] > red[2] + 100
    assert blue[2] > blue[0] + 80


def test_ticks_carry_their_values():
    scale = relative_scale(10)
    np.testing.assert_allclose(scale.ticks, [0.1, 10**-0.5, 1, 10**0.5, 10])
    assert scale.tick_labels == ("≤ 0.1×", "0.32×", "1×", "3.2×", "≥ 10×")


def test_percentile_scale():
    scale = percentile_scale()
    assert (scale.low, scale.high, scale.log) == (0.0, 100.0, False)
    assert scale.norm(25.0) == pytest.approx(0.25)


def test_missing_scores_have_a_colour_that_is_never_shown():
    colours = relative_scale().colours(np.array([[np.nan, 1.0]]))
    assert colours.shape == (1, 2, 3)
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[0, 0], 0)


def test_background_is_untouched_and_tiles_are_mixed():
    thumbnail = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    colours = np.full((40, 30, 3), (200, 100, 0), dtype=np.uint8)
    covered = np.zeros((40, 30), dtype=bool)
    covered[10:20, 5:15] = True
    out = blend(thumbnail, colours, covered, opacity=0.25)
    np.testing.assert_array_equal(out[~covered], thumbnail[~covered])
    grey = thumbnail[covered] @ np.array([0.299, 0.587, 0.114])
    expected = 0.75 * grey[:, None] + 0.25 * np.array([200, 100, 0])
    assert np.abs(out[covered] - expected).max() <= 0.51


def test_full_opacity_shows_the_colour_alone():
    colours = np.full((2, 2, 3), 77, dtype=np.uint8)
    out = blend(np.zeros((2, 2, 3), np.uint8), colours, np.ones((2, 2), bool), opacity=1.0)
    np.testing.assert_array_equal(out, colours)
