"""A stream of tiles through the encoder: one array of features a slide."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acmil.preprocessing.encoders import Encoder, EncoderError
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
    """A slide with the features of all its tiles.

    Attributes:
        prepared: The slide and its tiles.
        features: (N, D) float16 or float32, in the order of the tiles; (0, D) for a slide without tiles.
        seconds: What it took.
    """

    prepared: PreparedSlide
    features: np.ndarray
    seconds: SlideSeconds


@dataclass
class _Partial:
    features: np.ndarray  # (N, D), filled from the front
    n_filled: int = 0
    read_seconds: float = 0.0
    embed_seconds: float = 0.0


def embed(
    events: Iterable[StreamEvent],
    encoder: Encoder,
    *,
    feature_dtype: str,
    on_batch: Callable[[TileBatch], None] = lambda batch: None,
) -> Iterator[EmbeddedSlide | SlideFailure]:
    """Compute the features of a stream of tiles, slide by slide.

    Args:
        events: The stream.
        encoder: The network.
        feature_dtype: "float16" or "float32": type of the features returned.
        on_batch: Called after each batch.

    Yields:
        Each slide once all of its tiles are embedded, or its failure; a failed slide's features are dropped.
    """
    partials: dict[str, _Partial] = {}
    for event in events:
        if isinstance(event, SlideFailure):
            partials.pop(event.source.slide_id, None)
            yield event
        elif isinstance(event, PreparedSlide):
            empty = np.empty((0, encoder.n_features), feature_dtype)
            yield EmbeddedSlide(event, empty, SlideSeconds(tissue=event.seconds))
        else:
            begun = time.perf_counter()
            features = _features(encoder, event.tiles, feature_dtype)
            seconds_per_tile = (time.perf_counter() - begun) / len(features)
            yield from _handed_out(event, features, seconds_per_tile, partials)
            on_batch(event)


def write_embedded(path: Path, embedded: EmbeddedSlide, *, encoder: Encoder, preprocessing_digest: str) -> None:
    """Write a slide's features to its feature file.

    Raises:
        FeatureFileError: If a feature is NaN or infinite.
    """
    prepared = embedded.prepared
    slide, grid = prepared.slide, prepared.grid
    magnification = slide.magnification
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
        path, features=embedded.features, coords=grid.coords, tissue_fraction=grid.tissue_fraction, meta=meta
    )


def _features(encoder: Encoder, tiles: np.ndarray, feature_dtype: str) -> np.ndarray:
    try:
        features = encoder(torch.from_numpy(tiles))  # (B, D) float32
    except torch.cuda.OutOfMemoryError as error:
        raise EncoderError(
            f"a batch must fit into the GPU's memory, {len(tiles)} tiles do not: {error} Lower --batch-size."
        ) from error
    return features.to(getattr(torch, feature_dtype)).numpy()  # torch turns what float16 cannot hold into infinity


def _handed_out(
    batch: TileBatch, features: np.ndarray, seconds_per_tile: float, partials: dict[str, _Partial]
) -> Iterator[EmbeddedSlide]:
    """Give each slide its rows of the batch's features; yield the slides that are complete by it."""
    row = 0
    for segment in batch.segments:
        prepared, n_tiles = segment.prepared, segment.stop - segment.start
        slide_id, n_slide_tiles = prepared.source.slide_id, len(prepared.grid)
        if slide_id not in partials:
            partials[slide_id] = _Partial(np.empty((n_slide_tiles, features.shape[1]), features.dtype))
        partial = partials[slide_id]
        partial.features[segment.start : segment.stop] = features[row : row + n_tiles]
        partial.n_filled += n_tiles
        partial.read_seconds += segment.seconds
        partial.embed_seconds += seconds_per_tile * n_tiles
        row += n_tiles
        if partial.n_filled == n_slide_tiles:
            del partials[slide_id]
            seconds = SlideSeconds(prepared.seconds, partial.read_seconds, partial.embed_seconds)
            yield EmbeddedSlide(prepared, partial.features, seconds)
