"""Kept tiles: the last ones used stay, memory is used again, and never while somebody reads from it."""

import numpy as np

from acmil.preprocessing.readers.tile_cache import SpareArrays, TileCache

SHAPE = (4, 4, 3)
N_BYTES = 48


def filled(spare: SpareArrays, value: int) -> np.ndarray:
    array = spare.take(SHAPE)
    array[:] = value
    return array


def test_the_tiles_used_last_stay():
    spare = SpareArrays(2 * N_BYTES)
    cache = TileCache(spare)
    for column in (0, 1):
        cache.give_back([cache.keep((0, 0, column), filled(spare, column))])
    cache.give_back(tile for tile in cache.get([(0, 0, 0)]) if tile is not None)
    cache.give_back([cache.keep((0, 0, 2), filled(spare, 2))])
    found = cache.get([(0, 0, column) for column in range(3)])
    assert [None if tile is None else int(tile.pixels[0, 0, 0]) for tile in found] == [0, None, 2]
    assert len(cache) == 2


def test_the_memory_of_a_dropped_tile_takes_the_next_one():
    spare = SpareArrays(N_BYTES)
    cache = TileCache(spare)
    first, second = filled(spare, 1), filled(spare, 2)
    cache.give_back([cache.keep((0, 0, 0), first)])
    cache.give_back([cache.keep((0, 0, 1), second)])  # drops the first
    assert spare.take(SHAPE) is first
    cache.clear()
    assert len(cache) == 0
    assert spare.take(SHAPE) is second


def test_memory_that_is_read_from_is_not_used_again():
    spare = SpareArrays(N_BYTES)
    cache = TileCache(spare)
    first = cache.keep((0, 0, 0), filled(spare, 1))
    cache.give_back([cache.keep((0, 0, 1), filled(spare, 2))])  # drops the first, which is still read from
    assert spare.take(SHAPE) is not first.pixels
    cache.give_back([first])
    assert spare.take(SHAPE) is first.pixels


def test_of_two_that_decoded_the_same_tile_one_is_kept_and_both_are_reused():
    spare = SpareArrays(10 * N_BYTES)
    cache = TileCache(spare)
    arrays = [filled(spare, 1), filled(spare, 1)]
    tiles = [cache.keep((0, 0, 0), array) for array in arrays]
    cache.give_back(tiles)
    assert len(cache) == 1
    assert spare.take(SHAPE) is arrays[1]
    cache.clear()
    assert spare.take(SHAPE) is arrays[0]


def test_spare_memory_is_bounded_and_of_one_shape():
    spare = SpareArrays(2 * N_BYTES)
    arrays = [np.zeros(SHAPE, np.uint8) for _ in range(3)]
    for array in arrays:
        spare.give(array)
    assert spare.take(SHAPE) is arrays[1]
    assert spare.take((8, 8, 3)).shape == (8, 8, 3)
    assert spare.take(SHAPE) is not arrays[0]  # let go when another shape was asked for
