"""Writing a small slide: a pyramidal, tiled, JPEG-compressed TIFF that says its resolution.

The container is written here in full, since tifffile, for want of a codec package, writes no JPEG tiles even when
handed them encoded.

Reference:
    TIFF 6.0, Aldus 1992, with JPEG compression after Adobe's TIFF Technical Note 2.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

TILE_PX = 256
_MIN_LEVEL_PX = 512  # the pyramid ends before a side falls below this
_UM_PER_CM = 10_000.0
_SHORT, _LONG, _RATIONAL, _ASCII = 3, 4, 5, 2
_FORMATS = {_SHORT: "H", _LONG: "I", _ASCII: "B"}
_JPEG, _YCBCR, _CENTIMETRE = 7, 6, 3

_Tag = tuple[int, int, Sequence[int]]  # number, type, values


@dataclass(frozen=True)
class TiledLevel:
    """One level of a pyramid, its tiles already compressed.

    Attributes:
        width: In px.
        height: In px.
        downsample: Level-0 px per px of this level.
        tiles: JPEG files of `TILE_PX` squares in reading order, those at the right and lower edge whole too.
    """

    width: int
    height: int
    downsample: int
    tiles: Iterable[bytes]


def write_pyramid(path: Path, image: np.ndarray, *, mpp: float, description: str, quality: int = 85) -> None:
    """Write an image as a pyramidal TIFF of JPEG tiles; the same image gives the same bytes.

    The levels halve as long as both sides keep 512 px. Resolution stands in the tags `XResolution` and `YResolution`
    (pixels per centimetre), from which OpenSlide takes the µm per pixel.

    Args:
        path: File to write.
        image: RGB uint8 (h, w, 3).
        mpp: Level-0 resolution in µm/px.
        description: What the image is, ASCII, for the tag `ImageDescription`.
        quality: JPEG quality, 1 to 95.
    """
    levels = (
        TiledLevel(pixels.shape[1], pixels.shape[0], 2**level, _jpeg_tiles(pixels, quality))
        for level, pixels in enumerate(_levels(image))
    )
    write_levels(path, levels, mpp=mpp, description=description)


def write_levels(path: Path, levels: Iterable[TiledLevel], *, mpp: float, description: str) -> None:
    """Write levels of compressed tiles as a pyramidal TIFF; equal tiles are stored once.

    Args:
        path: File to write, below 4 GiB.
        levels: From the finest on.
        mpp: Level-0 resolution in µm/px.
        description: What the image is, ASCII, for the tag `ImageDescription`.
    """
    places: dict[bytes, int] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))  # the offset of the first directory comes when it is known
        link = 4  # where the next directory's offset has to be written
        for level in levels:
            offsets, sizes = [], []
            for tile in level.tiles:
                if tile not in places:
                    places[tile] = file.tell()
                    file.write(tile)
                offsets.append(places[tile])
                sizes.append(len(tile))
            link = _write_directory(file, _tags(level, mpp * level.downsample, description, offsets, sizes), link)


def jpeg_tile(tile: np.ndarray, quality: int = 85) -> bytes:
    """Compress one tile, RGB uint8 (h, w, 3), as the pyramid wants it."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _levels(image: np.ndarray) -> Iterator[np.ndarray]:
    yield image
    while min(image.shape[:2]) >= 2 * _MIN_LEVEL_PX:
        height, width = (side // 2 for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        yield image


def _jpeg_tiles(image: np.ndarray, quality: int) -> Iterator[bytes]:
    """JPEG files of the tiles in reading order; tiles that hang over are filled with the edge's pixels."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, 0, -height % TILE_PX, 0, -width % TILE_PX, cv2.BORDER_REPLICATE)
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            yield jpeg_tile(padded[top : top + TILE_PX, left : left + TILE_PX], quality)


def _tags(level: TiledLevel, mpp: float, description: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[_Tag]:
    resolution = (round(_UM_PER_CM / mpp * 1000), 1000)  # px per cm as a fraction
    return [
        (254, _LONG, [0 if level.downsample == 1 else 1]),  # NewSubfileType: 1 is a reduced image
        (256, _LONG, [level.width]),
        (257, _LONG, [level.height]),
        (258, _SHORT, [8, 8, 8]),  # BitsPerSample
        (259, _SHORT, [_JPEG]),
        (262, _SHORT, [_YCBCR]),
        (270, _ASCII, description.encode("ascii") + b"\0"),  # ImageDescription
        (277, _SHORT, [3]),  # SamplesPerPixel
        (282, _RATIONAL, resolution),
        (283, _RATIONAL, resolution),
        (284, _SHORT, [1]),  # PlanarConfiguration: interleaved
        (296, _SHORT, [_CENTIMETRE]),
        (305, _ASCII, b"acmil\0"),  # Software
        (322, _LONG, [TILE_PX]),
        (323, _LONG, [TILE_PX]),
        (324, _LONG, offsets),
        (325, _LONG, sizes),
        (530, _SHORT, [2, 2]),  # YCbCrSubSampling
    ]


def _write_directory(file: BinaryIO, tags: Sequence[_Tag], link: int) -> int:
    """Write a directory at the end of the file, let `link` point to it, and return where the next link goes."""
    entries = []
    for number, kind, values in tags:
        packed = _packed(kind, values)
        if len(packed) > 4:
            _align(file)
            place = struct.pack("<I", file.tell())
            file.write(packed)
        else:
            place = packed.ljust(4, b"\0")
        count = len(values) // 2 if kind == _RATIONAL else len(values)
        entries.append(struct.pack("<HHI", number, kind, count) + place)
    _align(file)
    start = file.tell()
    file.write(struct.pack("<H", len(entries)) + b"".join(entries))
    next_link = file.tell()
    file.write(struct.pack("<I", 0))
    file.seek(link)
    file.write(struct.pack("<I", start))
    file.seek(0, io.SEEK_END)
    return next_link


def _packed(kind: int, values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}{'I' if kind == _RATIONAL else _FORMATS[kind]}", *values)


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (file.tell() % 2))  # TIFF wants values at even offsets
