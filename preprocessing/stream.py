"""Many slides, one steady stream of tile batches: threads open, search and read ahead of the encoder.

Order and cut of the batches depend on the slides alone, never on the number of threads or on which of them is faster:
work is handed out in order and taken back in order. Batches run across slide borders, so that the encoder need not
wait for a slide to begin. Errors travel as values, one slide each.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide_list import SlideSource

T = TypeVar("T")

_RUN_TILES = 8  # tiles that a thread reads in one go: few enough to share a slide out, many enough to cost no overhead
_SLIDES_AHEAD = 2  # slides that are being opened and searched for tissue while one is read


@dataclass(frozen=True)
class Segment:
    """Tiles `start` to `stop` of one slide's grid, side by side in a batch; `seconds` is what reading them took."""

    prepared: PreparedSlide
    start: int
    stop: int
    seconds: float


@dataclass(frozen=True)
class TileBatch:
    """Tiles for the encoder.

    Attributes:
        tiles: (B, tile_px, tile_px, 3) uint8 RGB.
        segments: Whose they are, in the order of `tiles`.
    """

    tiles: np.ndarray
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class SlideFailure:
    """A slide that cannot be opened, has no usable resolution, or cannot be read to its end."""

    source: SlideSource
    error: Exception


# A PreparedSlide in the stream is one without tiles: nothing more comes of it.
StreamEvent: TypeAlias = TileBatch | PreparedSlide | SlideFailure


@dataclass(frozen=True)
class _Run:
    """Some consecutive tiles of one slide, read by a thread; the result is the tiles (n, h, w, 3) and the seconds."""

    prepared: PreparedSlide
    start: int
    stop: int
    result: Future[tuple[np.ndarray, float]]


@dataclass(frozen=True)
class _Piece:
    """Tiles that have been read and are not in a batch yet."""

    segment: Segment
    tiles: np.ndarray  # (n, h, w, 3)


class TileStream:
    """Iterate over the tiles of many slides.

    Yields, slide after slide, `TileBatch`es of `batch_size` tiles (the last one may hold fewer), a `PreparedSlide` for
    each slide without tiles, and a `SlideFailure` for each slide that failed. Tiles of a failed slide may have been in
    earlier batches; none comes after the failure. At most about two batches of tiles are held beyond the one yielded.

    Args:
        sources: The slides.
        prepare: Opens a slide and lays its tiles; called in the reader threads.
        batch_size: Tiles in a batch.
        workers: Reader threads.
    """

    def __init__(
        self,
        sources: Sequence[SlideSource],
        prepare: Callable[[SlideSource], PreparedSlide],
        *,
        batch_size: int,
        workers: int,
    ) -> None:
        self._sources = sources
        self._prepare = prepare
        self._batch_size = batch_size
        self._workers = workers
        self._failed: set[str] = set()

    def __iter__(self) -> Iterator[StreamEvent]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="slide-reader")
        try:
            yield from self._batches(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[StreamEvent]:
        waiting: list[_Piece] = []
        for item in self._ahead(pool):
            if not isinstance(item, _Run):
                yield item
                continue
            outcome = self._taken(item)
            if isinstance(outcome, SlideFailure):
                waiting = [piece for piece in waiting if piece.segment.prepared is not item.prepared]
                yield outcome
            elif outcome is not None:
                waiting.append(outcome)
            while sum(len(piece.tiles) for piece in waiting) >= self._batch_size:
                batch, waiting = _cut(waiting, self._batch_size)
                yield batch
        if waiting:
            yield _cut(waiting, self._batch_size)[0]

    def _taken(self, run: _Run) -> _Piece | SlideFailure | None:
        """Wait for a run's tiles; None if its slide has failed before."""
        source = run.prepared.source
        if source.slide_id in self._failed:
            return None
        outcome = _outcome(run.result)
        is_last = run.stop == len(run.prepared.grid)
        if isinstance(outcome, Exception) or is_last:
            run.prepared.slide.close()
        if isinstance(outcome, Exception):
            self._failed.add(source.slide_id)
            return SlideFailure(source, outcome)
        tiles, seconds = outcome
        return _Piece(Segment(run.prepared, run.start, run.stop, seconds), tiles)

    def _ahead(self, pool: ThreadPoolExecutor) -> Iterator[_Run | PreparedSlide | SlideFailure]:
        """Keep runs of about two batches with the threads while the ones before are taken back, in order."""
        limit = -(-2 * self._batch_size // _RUN_TILES) + self._workers
        queue: deque[_Run | PreparedSlide | SlideFailure] = deque()
        for item in self._runs(pool):
            queue.append(item)
            if len(queue) > limit:
                yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _runs(self, pool: ThreadPoolExecutor) -> Iterator[_Run | PreparedSlide | SlideFailure]:
        """Hand each slide's tiles to the threads, run by run, as they are asked for."""
        for item in self._prepared(pool):
            if isinstance(item, SlideFailure) or not len(item.grid):
                yield item
                continue
            for start in range(0, len(item.grid), _RUN_TILES):
                if item.source.slide_id in self._failed:
                    break
                stop = min(start + _RUN_TILES, len(item.grid))
                yield _Run(item, start, stop, pool.submit(_read, item, start, stop))

    def _prepared(self, pool: ThreadPoolExecutor) -> Iterator[PreparedSlide | SlideFailure]:
        """Have the next slides prepared while one is read; a slide without tiles is closed at once."""
        preparing: deque[tuple[SlideSource, Future[PreparedSlide]]] = deque()
        remaining = iter(self._sources)
        while True:
            while len(preparing) <= _SLIDES_AHEAD and (source := next(remaining, None)) is not None:
                preparing.append((source, pool.submit(self._prepare, source)))
            if not preparing:
                return
            source, future = preparing.popleft()
            outcome = _outcome(future)
            if isinstance(outcome, Exception):
                yield SlideFailure(source, outcome)
                continue
            if not len(outcome.grid):
                outcome.slide.close()
            yield outcome


def _read(prepared: PreparedSlide, start: int, stop: int) -> tuple[np.ndarray, float]:
    """Read some tiles of a slide: (n, tile_px, tile_px, 3) uint8, and the seconds it took."""
    begun = time.perf_counter()
    grid = prepared.grid
    tiles = [
        prepared.slide.read_tile(int(x), int(y), size_level0_px=grid.tile_level0_px, out_px=grid.tile_px)
        for x, y in grid.coords[start:stop]
    ]
    return np.stack(tiles), time.perf_counter() - begun


def _outcome(future: Future[T]) -> T | Exception:
    """Wait for a thread's work on one slide; what went wrong is that slide's result, and the others go on."""
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001  the per-slide ledger: a broken slide can raise anything
        return error


def _cut(waiting: list[_Piece], batch_size: int) -> tuple[TileBatch, list[_Piece]]:
    """Cut the next batch off what is waiting; a piece across the border is split."""
    taken: list[_Piece] = []
    space = batch_size
    rest = deque(waiting)
    while rest and space:
        piece = rest.popleft()
        if len(piece.tiles) > space:
            piece, left = _split(piece, space)
            rest.appendleft(left)
        taken.append(piece)
        space -= len(piece.tiles)
    tiles = np.concatenate([piece.tiles for piece in taken])
    return TileBatch(tiles, tuple(piece.segment for piece in taken)), list(rest)


def _split(piece: _Piece, n_tiles: int) -> tuple[_Piece, _Piece]:
    segment = piece.segment
    middle = segment.start + n_tiles
    seconds = segment.seconds * n_tiles / len(piece.tiles)
    first = Segment(segment.prepared, segment.start, middle, seconds)
    second = Segment(segment.prepared, middle, segment.stop, segment.seconds - seconds)
    return _Piece(first, piece.tiles[:n_tiles]), _Piece(second, piece.tiles[n_tiles:])
