"""Preprocessing as a job: slides in, a folder of features out; resumable, and one broken slide stops no other."""

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from acmil.preprocessing.allocator import keep_large_buffers
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.embedding import EmbeddedSlide, embed, write_embedded
from acmil.preprocessing.encoders import Encoder, create_encoder
from acmil.preprocessing.encoders.registry import tile_advice
from acmil.preprocessing.feature_file import FeatureFileError
from acmil.preprocessing.job_folder import JobFolder
from acmil.preprocessing.ledger import Row
from acmil.preprocessing.prepare import prepare_slide
from acmil.preprocessing.progress import Progress, SilentProgress
from acmil.preprocessing.slide import SlideError
from acmil.preprocessing.slide_list import SlideSource, list_slides
from acmil.preprocessing.stream import SlideFailure, TileBatch, TileStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobSummary:
    """What a job did.

    Attributes:
        out: The job folder.
        done: Slides that got their feature file in this run.
        empty: Slides found in this run to have no tiles.
        failed: Slides that failed; `slides.csv` says why.
        skipped: Slides that were done, or found empty, in an earlier run.
        tiles: Tiles of all slides that have features, those of earlier runs too.
        new_tiles: Tiles embedded in this run.
        seconds: By stage: setup (listing, encoder), tissue and read (the reader threads' seconds, added up), embed,
            write, and total (by the clock; the others overlap).
    """

    out: Path
    done: int
    empty: int
    failed: int
    skipped: int
    tiles: int
    new_tiles: int
    seconds: dict[str, float]

    def __str__(self) -> str:
        counts = f"{self.done} done, {self.empty} empty, {self.failed} failed, {self.skipped} already there"
        rate = self.new_tiles / self.seconds["total"] if self.seconds["total"] else 0.0
        work = f"{self.new_tiles} tiles in {self.seconds['total']:.1f} s ({rate:.0f}/s)"
        return f"slides: {counts}; {work}. {self.out / 'slides.csv'} lists them."


def preprocess(config: PreprocessConfig, *, progress: Progress | None = None) -> JobSummary:
    """Turn slides into a job folder of tissue outlines, previews and feature files.

    A slide whose whole feature file of the same options is in the folder is left alone; one that failed is tried again.

    Args:
        config: The options.
        progress: Told of each slide; silent by default.

    Returns:
        Counts and seconds.

    Raises:
        SlideListError: If the list of slides cannot be used.
        EncoderError: If the encoder cannot be made.
        JobError: If the folder holds results of options that give other numbers.
    """
    begun = time.perf_counter()
    sources = list_slides(config.slides, mpp=config.mpp_override)
    encoder = create_encoder(config.encoder, weights=config.weights, device=config.device, precision=config.precision)
    _warn_of_unusual_tiles(config, encoder)
    folder = JobFolder(config.out, numbers=_numbers(config, encoder))
    workers = config.workers or _n_cores()
    in_force = {"device": str(encoder.device), "precision": encoder.precision, "workers": workers}
    folder.write_config(config.model_dump(mode="json") | in_force)
    if encoder.device.type == "cpu":
        keep_large_buffers()
    job = _Job(config, folder, encoder, progress or SilentProgress())
    todo = job.plan(sources)
    job.seconds["setup"] = time.perf_counter() - begun
    try:
        job.run(todo, workers=workers)
    finally:
        folder.ledger.write()
    return job.summary(n_skipped=len(sources) - len(todo), total_seconds=time.perf_counter() - begun)


class _Job:
    """One run over the slides that are left to do: keeps the table, the counts and the seconds."""

    def __init__(self, config: PreprocessConfig, folder: JobFolder, encoder: Encoder, progress: Progress) -> None:
        self._config = config
        self._folder = folder
        self._encoder = encoder
        self._progress = progress
        self._counts: Counter[str] = Counter()
        self._n_new_tiles = 0
        self._n_kept_tiles = 0
        self.seconds = {"setup": 0.0, "tissue": 0.0, "read": 0.0, "embed": 0.0, "write": 0.0}

    def plan(self, sources: Sequence[SlideSource]) -> list[SlideSource]:
        """Find the slides that are left to do; write the table with them as pending."""
        todo = []
        for source in sources:
            slide_id, path = source.slide_id, str(source.path.absolute())
            row = self._folder.ledger.get(slide_id)
            if (file := self._folder.finished(source)) is not None:
                seconds = row.seconds if row is not None else 0.0
                row = Row(slide_id, path, "done", file.n_tiles, file.meta.level0_mpp, seconds)
                self._n_kept_tiles += file.n_tiles
            elif not self._folder.was_empty(source):
                todo.append(source)
                self._folder.clear(slide_id)
                row = Row(slide_id, path)
            if row is not None:
                self._folder.ledger.set(row)
        self._folder.ledger.write()
        return todo

    def run(self, todo: Sequence[SlideSource], *, workers: int) -> None:
        """Process the slides."""
        if not todo:
            return
        stream = TileStream(todo, self._prepare(), batch_size=self._config.batch_size, workers=workers)
        self._progress.begin("slides", len(todo))
        try:
            for result in embed(stream, self._encoder, feature_dtype=self._config.feature_dtype, on_batch=self._note):
                row = self._failed(result) if isinstance(result, SlideFailure) else self._finish(result)
                self._counts[row.status] += 1
                self._folder.ledger.set(row)
                self._progress.advance(1, f"{row.slide_id}: {row.status}, {row.tiles} tiles")
        finally:
            self._progress.end()

    def summary(self, *, n_skipped: int, total_seconds: float) -> JobSummary:
        """Sum up."""
        return JobSummary(
            out=self._folder.path,
            done=self._counts["done"],
            empty=self._counts["empty"],
            failed=self._counts["failed"],
            skipped=n_skipped,
            tiles=self._n_new_tiles + self._n_kept_tiles,
            new_tiles=self._n_new_tiles,
            seconds={name: round(value, 3) for name, value in {**self.seconds, "total": total_seconds}.items()},
        )

    def _prepare(self) -> partial:
        config = self._config
        return partial(
            prepare_slide,
            tile_px=config.tile_px,
            tile_mpp=config.tile_mpp,
            overlap_px=config.overlap_px,
            min_tissue=config.min_tissue,
            tissue_mpp=config.tissue_mpp,
            previews=config.previews,
        )

    def _finish(self, embedded: EmbeddedSlide) -> Row:
        """Write what there is of a slide; its feature file last, as that one says that the slide is done."""
        prepared, begun = embedded.prepared, time.perf_counter()
        slide_id, n_tiles = prepared.source.slide_id, len(prepared.grid)
        try:
            self._folder.write_outlines(prepared)
            if n_tiles:
                path, digest = self._folder.features(slide_id), self._folder.digest
                write_embedded(path, embedded, encoder=self._encoder, preprocessing_digest=digest)
        except FeatureFileError as error:
            self._folder.clear(slide_id)
            return self._failed(SlideFailure(prepared.source, error))
        write_seconds = time.perf_counter() - begun
        self._n_new_tiles += n_tiles
        for stage, seconds in (asdict(embedded.seconds) | {"write": write_seconds}).items():
            self.seconds[stage] += seconds
        seconds = embedded.seconds.total + write_seconds
        status = "done" if n_tiles else "empty"
        logger.info("%s: %s, %d tiles, %.1f s", slide_id, status, n_tiles, seconds)
        path = str(prepared.source.path.absolute())
        return Row(slide_id, path, status, n_tiles, prepared.slide.mpp, round(seconds, 3))

    def _failed(self, failure: SlideFailure) -> Row:
        source, error = failure.source, failure.error
        # Anything but the expected errors is a bug in reading this slide: its trace belongs in the log.
        trace = None if isinstance(error, (SlideError, FeatureFileError, OSError)) else error
        logger.warning("%s: failed: %s", source.slide_id, error, exc_info=trace)
        text = str(error) or type(error).__name__
        return Row(source.slide_id, str(source.path.absolute()), "failed", error=text)

    def _note(self, batch: TileBatch) -> None:
        last = batch.segments[-1]
        self._progress.advance(0, f"{last.prepared.source.slide_id}: {last.stop} of {len(last.prepared.grid)} tiles")


def _warn_of_unusual_tiles(config: PreprocessConfig, encoder: Encoder) -> None:
    """Tell where the tiles are not those the encoder was made for; they stay as asked."""
    if encoder.facts is not None:
        for sentence in tile_advice(encoder.facts, tile_px=config.tile_px, tile_mpp=config.tile_mpp):
            logger.warning(sentence)


def _numbers(config: PreprocessConfig, encoder: Encoder) -> dict[str, Any]:
    """Every option that changes the numbers, as in force."""
    names = ("tile_px", "tile_mpp", "overlap_px", "min_tissue", "mpp_override", "tissue_mpp", "feature_dtype")
    return {
        "encoder": encoder.name,
        "encoder_digest": encoder.digest,
        "precision": encoder.precision,
        **{name: getattr(config, name) for name in names},
    }


def _n_cores() -> int:
    """Cores that this process may use, which are fewer than the machine's under a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
