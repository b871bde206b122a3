"""Batches to slides: features and quality in the tiles' order, also where tiles or whole batches were dropped."""

from pathlib import Path

import numpy as np
import pytest

from acmil.preprocessing.embedding import EmbeddedSlide, SlideSeconds, embed
from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.stream import SlideFailure, TileBatch
from acmil.preprocessing.tiling import TileGrid
from acmil.preprocessing.tissue import Tissue


class Pending:
    def __init__(self, features):
        self.features = features

    def result(self):
        return self.features


class ValueEncoder:
    """The features of a tile are its first pixel, three times; it refuses a batch without tiles."""

    def begin(self, tiles):
        assert len(tiles)
        return Pending(tiles[:, 0, 0].astype(np.float16))


def prepared(slide_id, n_tiles) -> PreparedSlide:
    grid = TileGrid(np.zeros((n_tiles, 2), np.int64), np.ones(n_tiles, np.float32), 4, 4, 0.5, 0)
    return PreparedSlide(
        SlideSource(slide_id, Path("s")), None, Tissue(np.ones((1, 1), bool), 1.0, (), 1.0), grid, None, 2
    )


def batches(slide_id, n_tiles, kept, *, size=4):
    """A slide's batches, of which the tiles in `kept` are left."""
    slide = prepared(slide_id, n_tiles)
    for start in range(0, n_tiles, size):
        stop = min(start + size, n_tiles)
        numbers = np.array([number for number in kept if start <= number < stop], int)
        tiles = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (len(numbers), 4, 4, 3))
        quality = np.arange(start, stop, dtype=np.float32)[:, None] / 100
        yield TileBatch(slide, start, stop, numbers, tiles, quality, 0.5)


@pytest.mark.parametrize("kept", [range(11), [5, 6], [0, 10], [2, 3, 9], []])
def test_features_are_those_of_the_tiles_that_are_kept(kept):
    told = []
    events = [*batches("a", 11, kept), *batches("b", 4, [1])]
    first, second = embed(events, ValueEncoder(), on_batch=lambda batch: told.append(batch.stop))
    assert isinstance(first, EmbeddedSlide)
    assert first.numbers.tolist() == list(kept)
    assert first.features.tolist() == [[number] * 3 for number in kept]
    assert first.features.dtype == (np.float16 if len(kept) else np.float32)
    np.testing.assert_array_equal(first.quality[:, 0], np.arange(11, dtype=np.float32) / 100)
    assert (first.seconds.tissue, first.seconds.read) == (2, 1.5)
    assert (second.numbers.tolist(), second.features.tolist()) == ([1], [[1, 1, 1]])
    assert told == [4, 8, 11, 4]


def test_a_slide_that_fails_takes_nothing_along():
    failure = SlideFailure(SlideSource("a", Path("s")), OSError("gone"))
    begun = list(batches("a", 11, range(11)))[:2]
    found = list(embed([*begun, failure, prepared("none", 0), *batches("b", 2, [0, 1])], ValueEncoder()))
    assert found[0] is failure
    assert (found[1].features.shape, found[1].numbers.tolist(), found[1].quality) == ((0, 0), [], None)
    assert found[1].seconds == SlideSeconds(tissue=2)
    assert found[2].features.tolist() == [[0, 0, 0], [1, 1, 1]]
