"""Many slides, one steady stream of tile batches: threads open, search and read ahead of the encoder.

Order and cut of the batches depend on the slides alone, never on the number of threads or on which of them is faster:
work is handed out in order and taken back in order. Batches begin anew at each slide and hold tiles of it alone, so
that a slide's features are the same to the last bit in whatever company it is done: a job that was cut short and
resumed, or shared, gives what one run gives. The encoder does not wait at a slide's end, as the next one's tiles have
been read by then. Errors travel as values, one slide each.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
class TileBatch:
    """Tiles `start` to `stop` of one slide's grid, for the encoder.

    Attributes:
        prepared: The slide.
        start: The first of the tiles in the slide's grid.
        stop: One beyond the last.
        tiles: (stop - start, tile_px, tile_px, 3) uint8 RGB.
        seconds: What reading them took.
    """

    prepared: PreparedSlide
    start: int
    stop: int
    tiles: np.ndarray
    seconds: float


@dataclass(frozen=True)
class SlideFailure:
    """A slide that cannot be opened, has no usable resolution, or cannot be read to its end."""

    source: SlideSource
    error: Exception


# A PreparedSlide in the stream is one without tiles: nothing more comes of it.
StreamEvent: TypeAlias = TileBatch | PreparedSlide | SlideFailure


def _new_tiles(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


@dataclass(frozen=True)
class _Run:
    """Tiles of one batch up to `stop`, read by a thread; the result is the tiles (n, h, w, 3) and the seconds."""

    prepared: PreparedSlide
    stop: int
    batch_stop: int
    result: Future[tuple[np.ndarray, float]]


class TileStream:
    """Iterate over the tiles of many slides.

    Yields, slide after slide, `TileBatch`es of `batch_size` tiles (a slide's last one may hold fewer), a
    `PreparedSlide` for each slide without tiles, and a `SlideFailure` for each slide that failed. Tiles of a failed
    slide may have been in earlier batches; none comes after the failure. At most about two batches of tiles are held
    beyond the one yielded.

    Args:
        sources: The slides; asked for one by one, shortly before they are opened.
        prepare: Opens a slide and lays its tiles; called in the reader threads.
        batch_size: Tiles in a batch.
        workers: Reader threads.
        allocate: Makes the array of a batch, of the shape given; pages that a GPU reads directly, for instance.
    """

    def __init__(
        self,
        sources: Iterable[SlideSource],
        prepare: Callable[[SlideSource], PreparedSlide],
        *,
        batch_size: int,
        workers: int,
        allocate: Callable[[tuple[int, ...]], np.ndarray] = _new_tiles,
    ) -> None:
        self._sources = sources
        self._allocate = allocate
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
        waiting: list[tuple[np.ndarray, float]] = []  # runs of one batch: tiles (n, h, w, 3), seconds
        for item in self._ahead(pool):
            if not isinstance(item, _Run):
                yield item
                continue
            outcome = self._taken(item)
            if isinstance(outcome, SlideFailure):
                waiting = []
                yield outcome
            elif outcome is not None:
                waiting.append(outcome)
                if item.stop == item.batch_stop:
                    yield self._batch(item, waiting)
                    waiting = []

    def _batch(self, last: _Run, runs: list[tuple[np.ndarray, float]]) -> TileBatch:
        start = (last.batch_stop - 1) // self._batch_size * self._batch_size
        n_tiles = last.batch_stop - start
        tiles = self._allocate((n_tiles, *runs[0][0].shape[1:]))
        np.concatenate([run_tiles for run_tiles, _ in runs], out=tiles)
        return TileBatch(last.prepared, start, last.batch_stop, tiles, sum(seconds for _, seconds in runs))

    def _taken(self, run: _Run) -> tuple[np.ndarray, float] | SlideFailure | None:
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
        return outcome

    def _ahead(self, pool: ThreadPoolExecutor) -> Iterator[_Run | PreparedSlide | SlideFailure]:
        """Keep runs of about two batches with the threads while the ones before are taken back, in order."""
        limit = 2 * -(-self._batch_size // _RUN_TILES) + self._workers
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
            for start, stop, batch_stop in _run_borders(len(item.grid), self._batch_size):
                if item.source.slide_id in self._failed:
                    break
                yield _Run(item, stop, batch_stop, pool.submit(_read, item, start, stop))

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


def _run_borders(n_tiles: int, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a slide into batches, and these into runs: start and stop of each run, and its batch's stop."""
    for batch_start in range(0, n_tiles, batch_size):
        batch_stop = min(batch_start + batch_size, n_tiles)
        for start in range(batch_start, batch_stop, _RUN_TILES):
            yield start, min(start + _RUN_TILES, batch_stop), batch_stop


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
