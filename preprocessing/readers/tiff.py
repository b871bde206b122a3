"""The reader of JPEG-tiled TIFF slides (Aperio SVS, generic pyramids): OpenSlide's facts, tiles decoded directly.

OpenSlide composes every region with cairo, which takes longer than decoding its tiles (`docs/experiments.md`). In the
two commonest layouts a region is nothing but tiles side by side, so they are copied from tile to region instead. The
pixels are the same, to the bit, wherever a region begins at a whole pixel of its level; elsewhere OpenSlide
interpolates, and this reader takes the nearest whole pixel. What is not plain is left to OpenSlide: other
compressions, missing tiles, damaged ones (whose error it words), and levels on which the two disagree.
"""

import logging
import os
import struct
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from acmil.preprocessing.readers import SlideFacts, within
from acmil.preprocessing.readers.openslide import OpenSlideReader
from acmil.preprocessing.readers.tile_cache import KeptTile, Key, SpareArrays, TileCache

logger = logging.getLogger(__name__)

VENDORS = ("aperio", "generic-tiff")  # those whose levels are grids of tiles without overlap, margins or gaps

# For decoded tiles. Two rows of them of a slide of 100,000 px fit in: neighbouring rows of a grid share them.
MEMORY = SpareArrays(128 << 20)
_LARGEST_DIFFERENCE = 3  # of 255: two JPEG decoders round differently, two colour spaces differ by far more
_JPEG = 7  # TIFF's number of the compression
_RGB, _YCBCR = 2, 6  # TIFF's numbers of the photometric interpretation
_START, _END = b"\xff\xd8", b"\xff\xd9"
# Adobe's marker tells a decoder what the three components are, which a tile of a TIFF leaves to the TIFF's tags.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_COMPONENTS = {_RGB: b"\x00", _YCBCR: b"\x01"}


@dataclass(frozen=True)
class _Level:
    """Where the tiles of a level lie in the file.

    Attributes:
        width: Of the level in pixels.
        height: Likewise.
        tile_width: Of a tile in pixels.
        tile_height: Likewise.
        offsets: (rows, columns) int64, where each tile begins in the file.
        sizes: (rows, columns) int64, its bytes; 0 for a missing tile.
        header: What a tile lacks to be a JPEG file by itself, in place of its first two bytes.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray
    sizes: np.ndarray
    header: bytes


class _File:
    """A file to read at any place from any thread, open until nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end of the file."""
        return os.pread(self._descriptor, size, offset)


class TiffReader:
    """Reads one slide; see the module.

    Args:
        opened: OpenSlide's reader of the same file, which this one closes with itself.
        path: The file.
    """

    def __init__(self, opened: OpenSlideReader, *, path: Path) -> None:
        self._openslide = opened
        self._path = path
        self._file: _File | None = _File(path)
        self._lock = threading.Lock()
        self._checks: dict[int, bool] = {}  # level: whether it reads as OpenSlide reads it
        self._cache = TileCache(MEMORY)

    @property
    def facts(self) -> SlideFacts:
        """What the file says of itself."""
        return self._openslide.facts

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        """Read a rectangle of one pyramid level as uint8 RGB (height_px, width_px, 3); see `SlideReader.read`."""
        file = self._file
        if file is not None and self._is_plain(level, file):
            downsample = self.facts.level_downsamples[level]
            x, y = round(x_level0_px / downsample), round(y_level0_px / downsample)
            pixels = self._copied(level, file, x, y, width_px, height_px)
            if pixels is not None:
                return pixels
        return self._openslide.read(level, x_level0_px, y_level0_px, width_px, height_px)

    def close(self) -> None:
        """Let the file go; reading afterwards is an error."""
        self._file = None
        self._cache.clear()
        self._openslide.close()

    @cached_property
    def _levels(self) -> dict[int, _Level]:
        """The levels that are JPEG tiles, by their numbers."""
        try:
            return _plain_levels(self._path, self.facts)
        except (OSError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
            logger.info("%s: tiles are not decoded directly: %s", self._path, error)
            return {}

    def _is_plain(self, index: int, file: _File) -> bool:
        """Whether a level can be read directly: seen by reading a tile both ways, once a level."""
        if (known := self._checks.get(index)) is not None:
            return known
        with self._lock:
            if index not in self._checks:
                level = self._levels.get(index)
                self._checks[index] = level is not None and self._agrees(index, level, file)
            return self._checks[index]

    def _agrees(self, index: int, level: _Level, file: _File) -> bool:
        downsample = self.facts.level_downsamples[index]
        rows, columns = np.nonzero(level.sizes)
        # Where the downsample is no whole number, the first tile alone begins at a whole pixel for both.
        place = len(rows) // 2 if downsample == round(downsample) else 0
        row, column = (int(rows[place]), int(columns[place])) if len(rows) else (0, 0)
        tile = _decoded(level, file, row, column)
        if tile is None:
            return False
        x, y = column * level.tile_width, row * level.tile_height
        width, height = min(level.tile_width, level.width - x), min(level.tile_height, level.height - y)
        other = self._openslide.read(index, round(x * downsample), round(y * downsample), width, height)
        difference = np.abs(tile[:height, :width].astype(np.int16) - other)
        return int(difference.max()) <= _LARGEST_DIFFERENCE

    def _copied(self, index: int, file: _File, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """Put a rectangle of a level together from its tiles; None if one of them cannot be decoded."""
        level = self._levels[index]
        inside = within(x, y, width, height, size=(level.width, level.height))
        is_whole = inside is not None and (inside.width, inside.height) == (width, height)
        pixels = np.empty((height, width, 3), np.uint8) if is_whole else np.full((height, width, 3), 255, np.uint8)
        if inside is None:
            return pixels
        right, bottom = inside.x + inside.width, inside.y + inside.height
        rows = range(inside.y // level.tile_height, -(-bottom // level.tile_height))
        columns = range(inside.x // level.tile_width, -(-right // level.tile_width))
        keys = [(index, row, column) for row in rows for column in columns]
        tiles = self._tiles(level, file, keys)
        if not tiles:
            return None
        for (_, row, column), tile in zip(keys, tiles, strict=True):
            top, left = row * level.tile_height, column * level.tile_width
            first_y, last_y = max(inside.y, top), min(bottom, top + level.tile_height)
            first_x, last_x = max(inside.x, left), min(right, left + level.tile_width)
            part = tile.pixels[first_y - top : last_y - top, first_x - left : last_x - left]
            pixels[first_y - y : last_y - y, first_x - x : last_x - x] = part
        self._cache.give_back(tiles)
        return pixels

    def _tiles(self, level: _Level, file: _File, keys: list[Key]) -> list[KeptTile]:
        """Get decoded tiles, to be given back to the cache; none if one of them cannot be decoded."""
        found = self._cache.get(keys)
        for i, (_, row, column) in enumerate(keys):
            if found[i] is None:
                pixels = _decoded(level, file, row, column)
                if pixels is None:
                    break
                found[i] = self._cache.keep(keys[i], pixels)
        tiles = [tile for tile in found if tile is not None]
        if len(tiles) < len(keys):
            self._cache.give_back(tiles)
            return []
        return tiles


def _decoded(level: _Level, file: _File, row: int, column: int) -> np.ndarray | None:
    """Decode a tile; None if it is missing, damaged, or of another size than the level's tiles."""
    size = int(level.sizes[row, column])
    data = file.read(int(level.offsets[row, column]), size) if size else b""
    if not data.startswith(_START):
        return None
    pixels = MEMORY.take((level.tile_height, level.tile_width, 3))
    jpeg = level.header + data[len(_START) :]
    try:
        # Strict: what libjpeg merely warns of, and OpenCV and Pillow pass over, is a damaged tile.
        tile = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=pixels)
    except ValueError:  # also for a larger tile
        MEMORY.give(pixels)
        return None
    return pixels if tile.shape == pixels.shape else None


def _plain_levels(path: Path, facts: SlideFacts) -> dict[int, _Level]:
    """Find the pages of a TIFF that are levels of JPEG tiles; a level that two pages could be is left out."""
    from tifffile import TiffFile  # here, as files of other kinds do not need it

    levels: dict[int, _Level] = {}
    with TiffFile(path) as tiff:
        pages = [page.aspage() for page in tiff.pages]
        for index, (width, height) in enumerate(facts.level_sizes):
            alike = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == (width, height)]
            if len(alike) == 1 and _is_plain_page(alike[0]):
                levels[index] = _level(alike[0])
    return levels


def _is_plain_page(page: Any) -> bool:
    is_colour = page.samplesperpixel == 3 and page.bitspersample == 8 and page.planarconfig == 1
    return is_colour and page.compression == _JPEG and page.photometric in _COMPONENTS and page.imagedepth == 1


def _level(page: Any) -> _Level:
    rows, columns = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    tables = page.jpegtables or _START + _END
    inner = tables[len(_START) : tables.rindex(_END)]
    return _Level(
        width=page.imagewidth,
        height=page.imagelength,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        offsets=np.asarray(page.dataoffsets, np.int64).reshape(rows, columns),
        sizes=np.asarray(page.databytecounts, np.int64).reshape(rows, columns),
        header=_START + _ADOBE + _COMPONENTS[int(page.photometric)] + inner,
    )
