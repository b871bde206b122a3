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

import cv2
import numpy as np

from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.tile_readers import ThreadReader, TileReader

T = TypeVar("T")

_RUN_TILES = 8  # tiles that a thread reads in one go: few enough to share a slide out, many enough to cost no overhead
_MOST_BYTES_AHEAD = 1 << 30  # pixels that are being read or wait for the encoder
_SLIDES_AHEAD = 2  # slides that are being opened and searched for tissue while one is read


@dataclass(frozen=True)
class TileBatch:
    """Tiles `start` to `stop` of one slide's grid, for the encoder, but for those that are dropped.

    Attributes:
        prepared: The slide.
        start: The first of the tiles in the slide's grid.
        stop: One beyond the last.
        numbers: (n,) int, those of the tiles that are kept, in the slide's grid, ascending.
        tiles: (n, tile_px, tile_px, 3) uint8 RGB.
        quality: (stop - start, Q) float32, what `examine` says of all of them; None without it.
        seconds: What reading them took.
    """

    prepared: PreparedSlide
    start: int
    stop: int
    numbers: np.ndarray
    tiles: np.ndarray
    quality: np.ndarray | None
    seconds: float


@dataclass(frozen=True)
class SlideFailure:
    """A slide that cannot be opened, has no usable resolution, or cannot be read to its end."""

    source: SlideSource
    error: Exception


# A PreparedSlide in the stream is one without tiles: nothing more comes of it.
StreamEvent: TypeAlias = TileBatch | PreparedSlide | SlideFailure


@dataclass(frozen=True)
class _Read:
    """What reading a run left beside its tiles: (n, Q) of `examine`, and the seconds it took."""

    quality: np.ndarray | None
    seconds: float


@dataclass(frozen=True)
class _Run:
    """Tiles of one batch up to `stop`, which a thread reads into their place in the batch's array."""

    prepared: PreparedSlide
    stop: int
    batch_start: int
    batch_tiles: np.ndarray  # (B, tile_px, tile_px, 3)
    result: Future[_Read]


class TileStream:
    """Iterate over the tiles of many slides.

    Yields, slide after slide, `TileBatch`es of `batch_size` tiles (a slide's last one may hold fewer, as may those of
    which tiles are dropped), a `PreparedSlide` for each slide without tiles, and a `SlideFailure` for each slide that
    failed. Tiles of a failed slide may have been in earlier batches; none comes after the failure. At most about
    `batches_ahead` batches of tiles are held beyond the one yielded, and a bounded number of bytes.

    Args:
        sources: The slides; asked for one by one, shortly before they are opened.
        prepare: Opens a slide and lays its tiles; called in the reader threads.
        batch_size: Tiles in a batch.
        workers: Reader threads.
        batches_ahead: Batches that are being read or wait, beside the one yielded.
        keep: Says from what `examine` says of a batch's tiles, (B, Q), which to go on with: bool (B,).
        reader: What reads the tiles, begun by the caller; by default the threads do.
    """

    def __init__(
        self,
        sources: Iterable[SlideSource],
        prepare: Callable[[SlideSource], PreparedSlide],
        *,
        batch_size: int,
        workers: int,
        batches_ahead: int = 2,
        keep: Callable[[np.ndarray], np.ndarray] | None = None,
        reader: TileReader | None = None,
    ) -> None:
        self._sources = sources
        self._reader = ThreadReader() if reader is None else reader
        self._keep = keep
        self._prepare = prepare
        self._batch_size = batch_size
        self._workers = workers
        self._batches_ahead = batches_ahead
        self._failed: set[str] = set()

    def __iter__(self) -> Iterator[StreamEvent]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="slide-reader")
        opencv_threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # the readers share the cores already
        try:
            yield from self._batches(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            cv2.setNumThreads(opencv_threads)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[StreamEvent]:
        done: list[_Read] = []  # runs of one batch
        for item in self._ahead(pool):
            if not isinstance(item, _Run):
                yield item
                continue
            outcome = self._taken(item)
            if isinstance(outcome, SlideFailure):
                done = []
                yield outcome
            elif outcome is not None:
                done.append(outcome)
                if item.stop == item.batch_start + len(item.batch_tiles):
                    yield self._batch(item, done)
                    done = []

    def _batch(self, last: _Run, done: list[_Read]) -> TileBatch:
        """A batch whose runs have all been read, by its last one."""
        parts = [read.quality for read in done if read.quality is not None]
        quality = np.concatenate(parts) if parts else None  # (B, Q)
        numbers, tiles = np.arange(last.batch_start, last.stop), last.batch_tiles
        if self._keep is not None and quality is not None and not (kept := self._keep(quality)).all():
            numbers = numbers[kept]
            tiles[: len(numbers)] = tiles[kept]  # moved up within memory that a GPU may read directly
            tiles = tiles[: len(numbers)]
        seconds = sum(read.seconds for read in done)
        return TileBatch(last.prepared, last.batch_start, last.stop, numbers, tiles, quality, seconds)

    def _taken(self, run: _Run) -> _Read | SlideFailure | None:
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
        """Keep runs of some batches with the threads while the ones before are taken back, in order."""
        most_runs = self._batches_ahead * -(-self._batch_size // _RUN_TILES) + self._workers
        queue: deque[_Run | PreparedSlide | SlideFailure] = deque()
        for item in self._runs(pool):
            queue.append(item)
            limit = min(most_runs, _runs_in_bytes(item)) if isinstance(item, _Run) else most_runs
            while len(queue) > limit:
                yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _runs(self, pool: ThreadPoolExecutor) -> Iterator[_Run | PreparedSlide | SlideFailure]:
        """Hand the tiles of all slides to the threads."""
        for item in self._prepared(pool):
            if isinstance(item, SlideFailure) or not len(item.grid):
                yield item
            else:
                yield from self._runs_of(item, pool)

    def _runs_of(self, prepared: PreparedSlide, pool: ThreadPoolExecutor) -> Iterator[_Run]:
        """Hand a slide's tiles to the threads, run by run, as they are asked for; no more once one has failed."""
        n_tiles, side = len(prepared.grid), prepared.grid.tile_px
        for first in range(0, n_tiles, self._batch_size):
            batch_stop = min(first + self._batch_size, n_tiles)
            tiles = self._reader.allocate((batch_stop - first, side, side, 3))
            for start in range(first, batch_stop, _RUN_TILES):
                if prepared.source.slide_id in self._failed:
                    return
                stop = min(start + _RUN_TILES, batch_stop)
                place = tiles[start - first : stop - first]
                yield _Run(prepared, stop, first, tiles, pool.submit(self._read, prepared, start, place))

    def _read(self, prepared: PreparedSlide, start: int, tiles: np.ndarray) -> _Read:
        """Read the tiles of a slide from number `start` on into `tiles` (n, tile_px, tile_px, 3) uint8."""
        begun = time.perf_counter()
        quality = self._reader.read(prepared.slide, prepared.grid, start, tiles, prepared.stain_map)
        return _Read(quality, time.perf_counter() - begun)

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


def _runs_in_bytes(run: _Run) -> int:
    """Number of runs of this size whose pixels may be held at a time, at least one."""
    run_bytes = _RUN_TILES * run.batch_tiles[0].nbytes
    return max(1, _MOST_BYTES_AHEAD // run_bytes)


def _outcome(future: Future[T]) -> T | Exception:
    """Wait for a thread's work on one slide; what went wrong is that slide's result, and the others go on."""
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001  the per-slide ledger: a broken slide can raise anything
        return error
