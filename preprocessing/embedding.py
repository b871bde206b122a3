"""A stream of tiles through the encoder: one array of features a slide."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from acmil.preprocessing.batch_encoder import BatchEncoder, PendingFeatures
from acmil.preprocessing.encoders import Encoder
from acmil.preprocessing.feature_file import FeatureMeta, write_feature_file
from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.stream import SlideFailure, StreamEvent, TileBatch


@dataclass(frozen=True)
class SlideSeconds:
    """Seconds of work on one slide, those of the reader threads added up."""

    tissue: float = 0.0
    read: float = 0.0
    embed: float = 0.0

    @property
    def total(self) -> float:
        """All of them together."""
        return self.tissue + self.read + self.embed


@dataclass(frozen=True)
class EmbeddedSlide:
    """A slide with the features of its tiles.

    Attributes:
        prepared: The slide and its tiles.
        numbers: (n,) int, the tiles that have features: all but those that the stream's `keep` dropped, ascending.
        features: (n, D) float16 or float32, in their order; (0, 0) for a slide without any.
        quality: (N, Q) float32, what the stream's `examine` says of all tiles; None without it or without tiles.
        seconds: What it took.
    """

    prepared: PreparedSlide
    numbers: np.ndarray
    features: np.ndarray
    quality: np.ndarray | None
    seconds: SlideSeconds


@dataclass
class _Partial:
    features: np.ndarray  # (N, D), filled from the front; (0, 0) until the first are there
    numbers: list[np.ndarray] = field(default_factory=list)  # (b,) each
    n_embedded: int = 0
    quality: list[np.ndarray] = field(default_factory=list)  # (B, Q) each
    read_seconds: float = 0.0
    embed_seconds: float = 0.0


def embed(
    events: Iterable[StreamEvent],
    encoder: BatchEncoder,
    *,
    on_batch: Callable[[TileBatch], None] = lambda batch: None,
) -> Iterator[EmbeddedSlide | SlideFailure]:
    """Compute the features of a stream of tiles, slide by slide.

    A batch's features are asked for when the next batch is on its way, so that a GPU is never without one.

    Args:
        events: The stream.
        encoder: The network.
        on_batch: Called after each batch.

    Yields:
        Each slide once all of its tiles are embedded, or its failure; a failed slide's features are dropped.
    """
    partials: dict[str, _Partial] = {}
    under_way: tuple[TileBatch, PendingFeatures | None] | None = None
    for event in chain(events, [None]):  # None: the end
        begun = time.perf_counter()
        pending = encoder.begin(event.tiles) if isinstance(event, TileBatch) and len(event.tiles) else None
        if under_way is not None:
            batch, before = under_way
            features = None if before is None else before.result()  # None: all tiles were dropped
            yield from _handed_out(batch, features, time.perf_counter() - begun, partials)
            on_batch(batch)
        under_way = None
        if isinstance(event, SlideFailure):
            partials.pop(event.source.slide_id, None)
            yield event
        elif isinstance(event, PreparedSlide):
            none = np.empty(0, np.int64), np.empty((0, 0), np.float32)
            yield EmbeddedSlide(event, *none, None, SlideSeconds(tissue=event.seconds))
        elif event is not None:
            under_way = (event, pending)


def write_embedded(path: Path, embedded: EmbeddedSlide, *, encoder: Encoder, preprocessing_digest: str) -> None:
    """Write a slide's features to its feature file.

    Raises:
        FeatureFileError: If a feature is NaN or infinite.
    """
    prepared, numbers = embedded.prepared, embedded.numbers
    slide, grid = prepared.slide, prepared.grid
    # One that goes with another pixel pitch than the one in force says nothing.
    magnification = None if slide.is_restated else slide.magnification
    meta = FeatureMeta(
        slide_id=prepared.source.slide_id,
        encoder=encoder.name,
        encoder_digest=encoder.digest,
        preprocessing_digest=preprocessing_digest,
        tile_px=grid.tile_px,
        tile_level0_px=grid.tile_level0_px,
        overlap_px=grid.overlap_px,
        level0_width=slide.width,
        level0_height=slide.height,
        level0_mpp=slide.mpp,
        tile_mpp=grid.tile_mpp,
        level0_magnification=magnification,
        target_magnification=None if magnification is None else magnification * slide.mpp / grid.tile_mpp,
    )
    write_feature_file(
        path,
        features=embedded.features,
        coords=grid.coords[numbers],
        tissue_fraction=grid.tissue_fraction[numbers],
        meta=meta,
        quality=None if embedded.quality is None else embedded.quality[numbers],
    )


def _handed_out(
    batch: TileBatch, features: np.ndarray | None, embed_seconds: float, partials: dict[str, _Partial]
) -> Iterator[EmbeddedSlide]:
    """Put a batch's features, if it has any, into its slide's; yield the slide if it is complete by them."""
    prepared, slide_id = batch.prepared, batch.prepared.source.slide_id
    n_slide_tiles = len(prepared.grid)
    partial = partials.setdefault(slide_id, _Partial(np.empty((0, 0), np.float32)))
    if features is not None:
        if not len(partial.features):
            partial.features = np.empty((n_slide_tiles, features.shape[1]), features.dtype)
        partial.features[partial.n_embedded : partial.n_embedded + len(features)] = features
        partial.n_embedded += len(features)
    partial.numbers.append(batch.numbers)
    if batch.quality is not None:
        partial.quality.append(batch.quality)
    partial.read_seconds += batch.seconds
    partial.embed_seconds += embed_seconds
    if batch.stop == n_slide_tiles:
        del partials[slide_id]
        seconds = SlideSeconds(prepared.seconds, partial.read_seconds, partial.embed_seconds)
        quality = np.concatenate(partial.quality) if partial.quality else None
        embedded = partial.features[: partial.n_embedded]
        yield EmbeddedSlide(prepared, np.concatenate(partial.numbers), embedded, quality, seconds)
