"""How the stream's threads read tiles: by themselves, or each through a process of its own (`reader_processes`)."""

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np

from acmil.preprocessing.slide import Slide
from acmil.preprocessing.stain import StainMap
from acmil.preprocessing.tiling import TileGrid

Examine: TypeAlias = Callable[[np.ndarray], np.ndarray]  # measures tiles (n, h, w, 3) uint8: (n, Q) float32


class TileReader(Protocol):
    """Reads tiles into arrays of its own making; a context, whose `read` is called from several threads."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; nothing is being read any more."""

    def wait_ready(self) -> None:
        """Wait until tiles can be read; to be called before the first is."""

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Make an array of uint8 for tiles."""

    def read(
        self, slide: Slide, grid: TileGrid, start: int, tiles: np.ndarray, stain_map: StainMap | None
    ) -> np.ndarray | None:
        """Read tiles of a grid.

        Args:
            slide: The slide.
            grid: Its tiles.
            start: Number of the first to read.
            tiles: (n, tile_px, tile_px, 3) uint8, part of an array of `allocate`: where to.
            stain_map: Turns tiles as they were read into those that are wanted; None leaves them.

        Returns:
            What the tiles measure as they were read, (n, Q) float32; None if nothing is measured.

        Raises:
            SlideError: If the file is broken there.
        """


class ThreadReader:
    """Reads in the thread that asks.

    Args:
        allocate: Makes the arrays; memory that a GPU copies from by itself, for instance.
        examine: Measures tiles; None for no measures.
    """

    def __init__(
        self, *, allocate: Callable[[tuple[int, ...]], np.ndarray] | None = None, examine: Examine | None = None
    ) -> None:
        self._allocate = allocate
        self._examine = examine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def wait_ready(self) -> None:
        """Threads are always."""

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Make an array; see `TileReader`."""
        return np.empty(shape, np.uint8) if self._allocate is None else self._allocate(shape)

    def read(
        self, slide: Slide, grid: TileGrid, start: int, tiles: np.ndarray, stain_map: StainMap | None
    ) -> np.ndarray | None:
        """Read tiles; see `TileReader`."""
        coords = grid.coords[start : start + len(tiles)]
        return read_tiles(slide, coords, tiles, grid.tile_level0_px, examine=self._examine, stain_map=stain_map)


def read_tiles(
    slide: Slide,
    coords: np.ndarray,
    tiles: np.ndarray,
    size_level0_px: int,
    *,
    examine: Examine | None,
    stain_map: StainMap | None,
) -> np.ndarray | None:
    """Read the tiles at coords (n, 2) into `tiles`, measure them, and bring them to normal stains; see `TileReader`."""
    for tile, (x, y) in zip(tiles, coords.tolist(), strict=True):
        tile[:] = slide.read_tile(x, y, size_level0_px=size_level0_px, out_px=tiles.shape[1])
    quality = None if examine is None else examine(tiles)
    if stain_map is not None:
        tiles[:] = stain_map(tiles)
    return quality
