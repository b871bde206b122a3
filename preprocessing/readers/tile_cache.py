"""Decoded tiles that were used last, kept in memory that is used again.

Fresh memory costs a page fault for every 4 kB, on a virtual machine more than decoding a tile into it does
(`docs/experiments.md`). So a tile is decoded into the memory of one that is no longer kept, of this slide or of one
that was closed before.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

Key: TypeAlias = tuple[int, int, int]  # level, row, column


class SpareArrays:
    """Arrays that nobody uses any more, for those who need one; safe to use from several threads.

    Attributes:
        most_bytes: Arrays beyond this are let go; a cache keeps as much.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._arrays: list[np.ndarray] = []
        self._bytes = 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Get a uint8 array of a shape, with anything in it."""
        with self._lock:
            if self._arrays and self._arrays[-1].shape != shape:  # slides of another scanner: theirs are of no use
                self._arrays, self._bytes = [], 0
            if self._arrays:
                array = self._arrays.pop()
                self._bytes -= array.nbytes
                return array
        return np.empty(shape, np.uint8)

    def give(self, array: np.ndarray) -> None:
        """Hand over an array that nobody else holds."""
        with self._lock:
            if self._bytes + array.nbytes <= self.most_bytes:
                self._arrays.append(array)
                self._bytes += array.nbytes


class KeptTile:
    """A decoded tile, how many threads are copying from it, and whether the cache holds it, too."""

    __slots__ = ("is_kept", "n_users", "pixels")

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.n_users = 1
        self.is_kept = False


class TileCache:
    """The tiles of a slide that were used last; safe to use from several threads.

    A tile that was got here is the caller's to read from until it is given back.

    Args:
        spare: Where the memory of tiles comes from and goes to. Tiles beyond its `most_bytes` are dropped, those that
            were not used for longest first.
    """

    def __init__(self, spare: SpareArrays) -> None:
        self._spare = spare
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, KeptTile] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, keys: Sequence[Key]) -> list[KeptTile | None]:
        """Get tiles, None for those that are not here."""
        with self._lock:
            tiles = [self._kept.get(key) for key in keys]
            for key, tile in zip(keys, tiles, strict=True):
                if tile is not None:
                    tile.n_users += 1
                    self._kept.move_to_end(key)
            return tiles

    def keep(self, key: Key, pixels: np.ndarray) -> KeptTile:
        """Keep a tile that was decoded just now, and get it."""
        tile = KeptTile(pixels)
        with self._lock:
            if key in self._kept:  # another thread was faster
                return tile
            self._kept[key] = tile
            tile.is_kept = True
            self._bytes += pixels.nbytes
            while self._bytes > self._spare.most_bytes:
                self._drop(self._kept.popitem(last=False)[1])
        return tile

    def give_back(self, tiles: Iterable[KeptTile]) -> None:
        """Stop using tiles that were got."""
        with self._lock:
            for tile in tiles:
                tile.n_users -= 1
                self._reuse(tile)

    def clear(self) -> None:
        """Drop all tiles."""
        with self._lock:
            while self._kept:
                self._drop(self._kept.popitem()[1])

    def _drop(self, tile: KeptTile) -> None:
        tile.is_kept = False
        self._bytes -= tile.pixels.nbytes
        self._reuse(tile)

    def _reuse(self, tile: KeptTile) -> None:
        if not tile.is_kept and tile.n_users == 0:
            self._spare.give(tile.pixels)
