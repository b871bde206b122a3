"""Preprocessing as a job: slides in, a folder of features out; resumable, and one broken slide stops no other."""

import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from acmil.preprocessing.allocator import keep_large_buffers
from acmil.preprocessing.config import QUALITY_LIMITS, PreprocessConfig
from acmil.preprocessing.encoders import Encoder, create_encoder
from acmil.preprocessing.encoders.registry import tile_advice
from acmil.preprocessing.job_folder import JobFolder
from acmil.preprocessing.job_run import JobRun
from acmil.preprocessing.leases import BEAT_SECONDS
from acmil.preprocessing.prepare import PreparedSlide, prepare_slide
from acmil.preprocessing.progress import Progress, SilentProgress
from acmil.preprocessing.slide_list import list_slides
from acmil.preprocessing.tile_images import TileStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobSummary:
    """What a job did.

    Attributes:
        out: The job folder.
        done: Slides that got their feature file in this run.
        empty: Slides found in this run to have no tiles, or none within the limits of quality.
        failed: Slides that failed, here or in a process beside this one; `slides.csv` says why.
        skipped: Slides that were done, or found empty, in an earlier run or by another process.
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


def preprocess(
    config: PreprocessConfig, *, progress: Progress | None = None, _beat_seconds: float = BEAT_SECONDS
) -> JobSummary:
    """Turn slides into a job folder of tissue outlines, previews and feature files.

    A slide whose whole feature file of the same options is in the folder is left alone; one that failed is tried again.
    Several processes, on any machines that see the folder, may do so at once: each slide is done by one of them, and
    the slides of one that dies are taken over by the others.

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
    if config.compile:
        encoder.compile()
    folder = JobFolder(
        config.out,
        numbers=_numbers(config, encoder),
        outlines=config.tissue_from,
        tiles=_tile_store(config),
        beat_seconds=_beat_seconds,
    )
    workers = config.workers or _n_cores()
    in_force = {"device": str(encoder.device), "precision": encoder.precision, "workers": workers}
    folder.write_config(config.model_dump(mode="json") | in_force)
    if encoder.device.type == "cpu":
        keep_large_buffers()
    job = JobRun(folder, encoder, _prepare(config), config=config, progress=progress or SilentProgress())
    todo = job.plan(sources)
    setup_seconds = time.perf_counter() - begun
    try:
        job.run(todo, workers=workers)
    finally:
        folder.ledger.write()
    seconds = {"setup": setup_seconds, **job.seconds, "total": time.perf_counter() - begun}
    return JobSummary(
        out=config.out,
        done=job.counts["done"],
        empty=job.counts["empty"],
        failed=job.counts["failed"],
        skipped=job.counts["skipped"],
        tiles=job.n_new_tiles + job.n_kept_tiles,
        new_tiles=job.n_new_tiles,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _prepare(config: PreprocessConfig) -> partial[PreparedSlide]:
    """What opens a slide and lays its tiles, with the options in force."""
    return partial(
        prepare_slide,
        tile_px=config.tile_px,
        tile_mpp=config.tile_mpp,
        overlap_px=config.overlap_px,
        min_tissue=config.min_tissue,
        tissue_mpp=config.tissue_mpp,
        previews=config.previews,
        reader=config.reader,
        tissue=config.tissue,
        remove_ink=config.remove_ink,
        tissue_from=config.tissue_from,
        stain_normalisation=config.stain_normalisation,
    )


def _tile_store(config: PreprocessConfig) -> TileStore | None:
    """Where pictures of the tiles are to be written."""
    if config.save_tiles == "none":
        return None
    return TileStore(config.out / "tiles", config.save_tiles, config.tile_format)


def _warn_of_unusual_tiles(config: PreprocessConfig, encoder: Encoder) -> None:
    """Tell where the tiles are not those the encoder was made for; they stay as asked."""
    if encoder.facts is not None:
        for sentence in tile_advice(encoder.facts, tile_px=config.tile_px, tile_mpp=config.tile_mpp):
            logger.warning(sentence)


def _numbers(config: PreprocessConfig, encoder: Encoder) -> dict[str, Any]:
    """Every option that changes the numbers, as in force."""
    names = (
        *("tile_px", "tile_mpp", "overlap_px", "min_tissue", "mpp_override"),
        *("tissue_mpp", "tissue", "remove_ink", "reader", "feature_dtype", "compile", "stain_normalisation"),
    )
    return {
        "encoder": encoder.name,
        "encoder_digest": encoder.digest,
        "precision": encoder.precision,
        **{name: getattr(config, name) for name in (*names, *QUALITY_LIMITS)},
        "tissue_from": None if config.tissue_from is None else "outlines",  # each slide's are compared by themselves
    }


def _n_cores() -> int:
    """Cores that this process may use, which are fewer than the machine's under a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
