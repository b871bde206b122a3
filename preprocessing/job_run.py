"""One process's work on a job: it takes slides that nobody holds, embeds them, and writes what comes of them."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TypeAlias

from acmil.preprocessing.batch_encoder import BatchEncoder
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.embedding import EmbeddedSlide, embed, write_embedded
from acmil.preprocessing.encoders import Encoder
from acmil.preprocessing.feature_file import FeatureFile, FeatureFileError
from acmil.preprocessing.job_folder import MPP_ROUNDING, JobFolder
from acmil.preprocessing.ledger import Row, Status
from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.progress import Progress
from acmil.preprocessing.quality import quality_summary, tile_quality, within_limits
from acmil.preprocessing.reader_processes import ProcessReaders
from acmil.preprocessing.readers import ReaderName
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.stream import SlideFailure, StreamEvent, TileBatch, TileStream
from acmil.preprocessing.tile_images import TileWriter
from acmil.preprocessing.tile_readers import Examine, ThreadReader, TileReader

logger = logging.getLogger(__name__)

_MOST_THREADS = 4  # that read by themselves; more gain little, and hold up the one that feeds the encoder
_BATCHES_AHEAD = 2
_BATCHES_AHEAD_OF_GPU = 6  # two left a GPU waiting when the readers paused for a tenth of a second
_MOST_UNWRITTEN = 4  # slides whose features wait to be written, in memory
_LOOKS_PER_BEAT = 4

# A slide and its row, None if it was lost to another process.
_Outcome: TypeAlias = tuple[SlideSource, Row | None]


class JobRun:
    """One run over the slides that are left to do: keeps the table, the counts and the seconds.

    Args:
        folder: The job's.
        encoder: The network.
        prepare: Opens a slide and lays its tiles.
        config: The options.
        progress: Told of each slide.
    """

    def __init__(
        self,
        folder: JobFolder,
        encoder: Encoder,
        prepare: Callable[[SlideSource], PreparedSlide],
        *,
        config: PreprocessConfig,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._encoder = encoder
        self._prepare = prepare
        self._batch_size = config.batch_size
        self._tile_px = config.tile_px
        self._batch_encoder = BatchEncoder(encoder, feature_dtype=config.feature_dtype, batch_size=config.batch_size)
        self._progress = progress
        self._examine = tile_quality if config.tissue == "brightfield" else None
        self._limits = config.quality_limits
        self._reader_name = config.reader
        self._tiles: TileWriter | None = None
        self._is_warm = False
        self._renewed: set[str] = set()  # slides whose results are of another slide, or of a resolution not stated now
        self.counts: Counter[str] = Counter()  # done, empty, failed, skipped
        self.n_new_tiles = 0
        self.n_kept_tiles = 0
        self.seconds = {"warm_up": 0.0, "tissue": 0.0, "read": 0.0, "embed": 0.0, "write": 0.0}

    def plan(self, sources: Sequence[SlideSource]) -> list[SlideSource]:
        """Find the slides that are left to do; write the table with them as pending."""
        todo = []
        for source in sources:
            row = self._finished(source)
            if row is None:
                todo.append(source)
                if source.slide_id in self._renewed:
                    continue  # its row stays, which says why, until the slide is begun
                row = Row(source.slide_id, str(source.path.absolute()))
            else:
                self._keep(row)
            self._folder.ledger.set(row)
        self._folder.ledger.write()
        return todo

    def run(self, todo: Sequence[SlideSource], *, workers: int) -> None:
        """Process the slides; those that other processes hold are looked at again at the end."""
        if (store := self._folder.tiles) is not None:
            self._tiles = TileWriter(store, threads=workers)
        with self._folder.leases as leases, self._tiles or nullcontext():
            if todo:
                self._progress.begin("slides", len(todo))
                try:
                    self._read_and_embed(list(todo), workers)
                finally:
                    self._progress.end()
            leases.sweep()

    def _read_and_embed(self, todo: list[SlideSource], workers: int) -> None:
        block_bytes = self._batch_size * self._tile_px**2 * 3
        examine, encoder = self._examine, self._batch_encoder
        with choose_reader(workers, block_bytes=block_bytes, examine=examine, encoder=encoder) as reader:
            self._rounds(todo, workers, reader)

    def _rounds(self, todo: list[SlideSource], workers: int, reader: TileReader) -> None:
        is_told = False
        while todo:
            left: list[SlideSource] = []
            self._round(self._taken(todo, left), left, workers, reader)
            if len(left) == len(todo):
                if not is_told:
                    logger.info("%d slides are with other processes: waiting for them", len(left))
                is_told = True
                time.sleep(self._folder.leases.beat_seconds / _LOOKS_PER_BEAT)
            todo = left

    def _round(self, sources: Iterable[SlideSource], left: list[SlideSource], workers: int, reader: TileReader) -> None:
        """Embed slides; a thread of its own writes, so that the encoder does not wait for the disk."""
        stream = TileStream(
            sources,
            self._prepare,
            batch_size=self._batch_size,
            workers=workers,
            batches_ahead=_BATCHES_AHEAD_OF_GPU if self._encoder.device.type == "cuda" else _BATCHES_AHEAD,
            reader=reader,
            keep=partial(within_limits, limits=self._limits) if self._limits else None,
        )
        events = stream if self._tiles is None else self._tiles.watch(stream)
        writing: deque[Future[_Outcome]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="slide-writer") as writer:
            for result in embed(self._begun(events, reader), self._batch_encoder, on_batch=self._note):
                writing.append(writer.submit(self._settle, result))
                while writing and (writing[0].done() or len(writing) > _MOST_UNWRITTEN):
                    self._count(*writing.popleft().result(), left)
            while writing:
                self._count(*writing.popleft().result(), left)

    def _begun(self, events: Iterable[StreamEvent], reader: TileReader) -> Iterator[StreamEvent]:
        """Warm the encoder up, if that has not been done, while the readers start and read the first tiles."""
        coming = iter(events)

        def first() -> StreamEvent | None:
            reader.wait_ready()
            return next(coming, None)

        with ThreadPoolExecutor(1, thread_name_prefix="first-slide") as opener:
            opening = opener.submit(first)
            begun = time.perf_counter()
            if not self._is_warm and (self._encoder.is_compiled or self._encoder.device.type == "cuda"):
                self._batch_encoder.warm_up(self._tile_px)
                self.seconds["warm_up"] = time.perf_counter() - begun
            self._is_warm = True
            event = opening.result()
        if event is not None:
            yield event
        yield from coming

    def _taken(self, todo: Sequence[SlideSource], left: list[SlideSource]) -> Iterator[SlideSource]:
        """Take the slides that nobody holds, as they are asked for; those that are held are put into `left`."""
        folder = self._folder
        for source in todo:
            slide_id = source.slide_id
            if (lease := folder.leases.acquire(slide_id)) is None:
                left.append(source)
                continue
            news = folder.ledger.news(slide_id)
            row = news if news is not None and news.status == "failed" else self._finished(source)
            if row is not None:  # another process has done it, or tried it, since this one began
                folder.leases.release(slide_id)
                self._keep(row)
                self._tell(row)
                continue
            if lease.generation:
                logger.warning("%s: taken over from a process that gave no sign of life", slide_id)
                folder.clear_leftovers(slide_id)
            is_renewed = slide_id in self._renewed
            self._renewed.discard(slide_id)
            folder.clear(slide_id, keep_features=not is_renewed and self._has_features(source))
            yield source

    def _finished(self, source: SlideSource) -> Row | None:
        """A slide's row, if nothing is left to do for it."""
        row = self._folder.ledger.get(source.slide_id)
        why = None if row is None else _why_anew(row, source, reader=self._reader_name)
        if why is not None:
            if source.slide_id not in self._renewed:
                logger.warning("%s: %s: it is done anew", source.slide_id, why)
            self._renewed.add(source.slide_id)
            return None
        try:
            file = self._folder.finished(source)
        except FeatureFileError as error:  # kept, and the slide is not done again over it
            return self._failed(SlideFailure(source, error))
        if file is None:
            return row if self._folder.was_empty(source) else None
        path = str(source.path.absolute())
        if row is None or row.status != "done":
            row = self._row_of(file)
        return replace(row, path=path, tiles=file.n_tiles, mpp=file.meta.level0_mpp)

    def _has_features(self, source: SlideSource) -> bool:
        """Whether a slide's features are right as they are, or may be: then they stay until others take their place."""
        try:
            return self._folder.features_of(source) is not None
        except FeatureFileError:
            return True

    def _row_of(self, file: FeatureFile) -> Row:
        """What is left of the row of a slide whose process died between writing its feature file and its row."""
        row = Row(file.meta.slide_id, "", "done")
        if self._limits:
            return row  # the file knows nothing of the tiles that were dropped
        return replace(row, tiles_dropped=0, **quality_summary(file.quality()))

    def _keep(self, row: Row) -> None:
        self.n_kept_tiles += row.tiles
        self.counts["failed" if row.status == "failed" else "skipped"] += 1

    def _count(self, source: SlideSource, row: Row | None, left: list[SlideSource]) -> None:
        if row is None:
            left.append(source)
            return
        self.counts[row.status] += 1
        self.n_new_tiles += row.tiles
        self._tell(row)

    def _tell(self, row: Row) -> None:
        self._folder.ledger.set(row)
        self._progress.advance(1, f"{row.slide_id}: {row.status}, {row.tiles} tiles")

    def _settle(self, result: EmbeddedSlide | SlideFailure) -> _Outcome:
        """Write what came of a slide, and let it go."""
        source = result.source if isinstance(result, SlideFailure) else result.prepared.source
        leases = self._folder.leases
        if not leases.holds(source.slide_id):
            return self._lost(source)
        try:
            row = self._failed(result) if isinstance(result, SlideFailure) else self._finish(result)
            self._folder.ledger.record(row)
        except FileNotFoundError:  # who takes a slide over clears what was being written
            if leases.holds(source.slide_id):
                raise
            return self._lost(source)
        leases.release(source.slide_id)
        return source, row

    def _lost(self, source: SlideSource) -> _Outcome:
        logger.warning("%s: taken over by another process, as this one gave no sign of life for long", source.slide_id)
        if self._tiles is not None:
            self._tiles.drop(source.slide_id)
        self._folder.leases.release(source.slide_id)
        return source, None

    def _finish(self, embedded: EmbeddedSlide) -> Row:
        """Write what there is of a slide; its feature file last, as that one says that the slide is done."""
        prepared, begun = embedded.prepared, time.perf_counter()
        slide_id, n_tiles = prepared.source.slide_id, len(embedded.numbers)
        try:
            self._folder.write_outlines(prepared)
            if self._tiles is not None and not n_tiles:
                self._tiles.drop(slide_id)
            elif self._tiles is not None:
                self._tiles.finish(slide_id)
            if n_tiles:
                path, digest = self._folder.features(slide_id), self._folder.digest_of(prepared.tissue.polygons)
                write_embedded(path, embedded, encoder=self._encoder, preprocessing_digest=digest)
        except FeatureFileError as error:
            self._folder.clear(slide_id)
            return self._failed(SlideFailure(prepared.source, error))
        write_seconds = time.perf_counter() - begun
        for stage, seconds in (asdict(embedded.seconds) | {"write": write_seconds}).items():
            self.seconds[stage] += seconds
        seconds = embedded.seconds.total + write_seconds
        status: Status = "done" if n_tiles else "empty"
        logger.info("%s: %s, %d tiles, %.1f s", slide_id, status, n_tiles, seconds)
        tissue = prepared.tissue
        alarms = (*prepared.slide.resolution_alarms, *tissue.alarms, *(() if n_tiles else (_why_empty(prepared),)))
        for alarm in alarms:
            logger.warning("%s: %s", slide_id, alarm)
        if tissue.ink_fraction:
            logger.info("%s: pen ink on %.2f of the thumbnail", slide_id, tissue.ink_fraction)
        return Row(
            slide_id=slide_id,
            path=str(prepared.source.path.absolute()),
            status=status,
            tiles=n_tiles,
            mpp=prepared.slide.mpp,
            seconds=round(seconds, 3),
            ink_removed=round(tissue.ink_removed, 4),
            alarms="; ".join(alarms),
            tiles_dropped=len(prepared.grid) - n_tiles,
            file_bytes=prepared.source.path.stat().st_size,
            mpp_given=prepared.source.mpp is not None,
            **quality_summary(embedded.quality),
        )

    def _failed(self, failure: SlideFailure) -> Row:
        source, error = failure.source, failure.error
        # Anything but the expected errors is a bug in reading this slide: its trace belongs in the log.
        trace = None if isinstance(error, (SlideError, FeatureFileError, OSError)) else error
        logger.warning("%s: failed: %s", source.slide_id, error, exc_info=trace)
        text = str(error) or type(error).__name__
        return Row(source.slide_id, str(source.path.absolute()), "failed", error=text)

    def _note(self, batch: TileBatch) -> None:
        self._progress.advance(0, f"{batch.prepared.source.slide_id}: {batch.stop} of {len(batch.prepared.grid)} tiles")


def _why_anew(row: Row, source: SlideSource, *, reader: ReaderName) -> str | None:
    """Why what was done of a slide is not what is asked for now; what cannot be told throws nothing away."""
    if row.status not in ("done", "empty"):
        return None
    try:
        if row.file_bytes not in (None, source.path.stat().st_size):  # the same one may have been moved
            return f"{source.path} is not the slide that was done under this name, {row.path}"
        if source.mpp is None and row.mpp is not None and row.mpp_given:
            with Slide.open(source.path, slide_id=source.slide_id, reader=reader) as slide:
                own = slide.mpp
            if abs(own - row.mpp) > MPP_ROUNDING * own:
                return f"was done at {row.mpp:.4g} µm/px, which is not given any more, and the slide states {own:.4g}"
    except (SlideError, OSError):
        pass
    return None


def _why_empty(prepared: PreparedSlide) -> str:
    """Say why a slide has no tile left."""
    slide, side = prepared.slide, prepared.grid.tile_level0_px
    if len(prepared.grid):
        return f"no tile is within the limits of quality: all {len(prepared.grid)} were dropped"
    if min(slide.width, slide.height) < side:
        return f"no tile: the slide is {slide.width} x {slide.height} px, smaller than a tile of {side} level-0 px"
    return "no tile holds enough tissue"


def choose_reader(
    workers: int, *, block_bytes: int, examine: Examine | None = None, encoder: BatchEncoder | None = None
) -> TileReader:
    """What the stream's threads read with: processes, where they would be in each other's way.

    Args:
        workers: Number of the threads.
        block_bytes: Bytes of a full batch of tiles.
        examine: Measures tiles; None for no measures.
        encoder: What gets the batches; None for nothing.
    """
    if workers <= _MOST_THREADS or not ProcessReaders.is_available():
        return ThreadReader(allocate=None if encoder is None else encoder.allocate, examine=examine)
    if encoder is None:
        return ProcessReaders(workers, block_bytes=block_bytes, examine=examine)
    return ProcessReaders(workers, block_bytes=block_bytes, examine=examine, pin=encoder.pin, unpin=encoder.unpin)
