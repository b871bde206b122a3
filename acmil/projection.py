"""UMAP of instance features: which tiles to take, the projection, and the `umap` command."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from acmil.attention_maps import relative_attention
from acmil.bags import BagDataset
from acmil.cohort import Cohort, read_cohort
from acmil.preprocessing.output_folder import output_folder
from acmil.preprocessing.progress import Progress, SilentProgress
from acmil.runs import Run, load_run

if TYPE_CHECKING:
    import pandas as pd
    from umap import UMAP

    from acmil.config import UmapConfig

logger = logging.getLogger(__name__)

PCA_DIMENSIONS = 50
SMALLEST_SAMPLE = 8
TOP_SHARE = 0.25
_SPACES = {"hidden": "model's", "encoder": "encoder's"}


class ProjectionError(ValueError):
    """Tiles that cannot be projected."""


def sample_instances(
    attention: np.ndarray, *, tiles: int, generator: np.random.Generator, top_share: float = TOP_SHARE
) -> np.ndarray:
    """Choose tiles of one slide: the most attended ones, and the rest at random.

    A purely random sample of a large slide would hold hardly any of the few tiles that decide the prediction. The
    sample therefore over-represents attended tiles: read it for where they lie, not for how many there are.

    Args:
        attention: Attention of the slide's tiles, shape (N,).
        tiles: Number of tiles to take; all are taken where there are no more.
        generator: Draws the random part.
        top_share: Share of `tiles` taken from the most attended.

    Returns:
        Indices of the chosen tiles, rising, shape (min(tiles, N),), int64.
    """
    order = np.argsort(-np.asarray(attention), kind="stable")
    if len(order) <= tiles:
        return np.sort(order)
    n_top = int(tiles * top_share)
    others = generator.choice(order[n_top:], size=tiles - n_top, replace=False)
    return np.sort(np.concatenate([order[:n_top], others]))


def project(features: np.ndarray, *, n_neighbors: int = 15, min_dist: float = 0.1, seed: int = 0) -> np.ndarray:
    """Project features to the plane with UMAP; the same input and seed give the same result on one machine.

    More than 50 dimensions are first reduced to 50 by PCA, which takes out noise and makes the neighbour search
    several times faster. Features are not standardised: a dimension that hardly varies should count hardly. The start
    is the plane of the first two principal components, so that large distances are not left to chance.

    Args:
        features: One row a tile, shape (M, D).
        n_neighbors: UMAP's neighbourhood size; lowered to M - 1 where there are too few tiles.
        min_dist: UMAP's least distance between points.
        seed: Seed of UMAP.

    Returns:
        Positions, shape (M, 2), float32.

    Raises:
        ProjectionError: If there are fewer than 8 tiles.

    Reference:
        McInnes, Healy, Melville, UMAP, arXiv 1802.03426; on the start: Kobak & Linderman, Nature Biotechnology 2021.
    """
    if len(features) < SMALLEST_SAMPLE:
        raise ProjectionError(
            f"UMAP needs at least {SMALLEST_SAMPLE} tiles, got {len(features)}. Add slides, or raise --tiles-per-slide."
        )
    if n_neighbors >= len(features):
        logger.warning("n_neighbors lowered from %d: there are only %d tiles", n_neighbors, len(features))
        n_neighbors = len(features) - 1
    reduced = _reduce(np.asarray(features, dtype=np.float32), seed)
    # With a seed UMAP runs on one thread anyway; saying so keeps it from warning.
    reducer = _umap_class()(n_neighbors=n_neighbors, min_dist=min_dist, init="pca", random_state=seed, n_jobs=1)
    with _torch_threads_kept():
        return np.asarray(reducer.fit_transform(reduced), dtype=np.float32)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Give torch its number of threads back: numba, which UMAP runs on, sets that of the OpenMP they may share.

    With another number torch picks other code for a layer, and the last bits of features are others (measured: a 1x1
    convolution of fewer than 16 images).
    """
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _umap_class() -> type["UMAP"]:
    """UMAP, imported when needed: compiling its parts takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)  # for a variant not used here
        from umap import UMAP
    return UMAP


def _reduce(features: np.ndarray, seed: int) -> np.ndarray:
    if features.shape[1] <= PCA_DIMENSIONS:
        return features
    from sklearn.decomposition import PCA

    dimensions = min(PCA_DIMENSIONS, len(features))
    return PCA(dimensions, random_state=seed).fit_transform(features)


def umap(config: "UmapConfig", *, progress: Progress | None = None) -> Path:
    """Project tiles of a cohort's slides and write umap.png and umap.csv.

    Args:
        config: Options of the command.
        progress: Told of each slide.

    Returns:
        The PNG file.

    Raises:
        ProjectionError: If there are too few tiles.
        RunError: If the features do not fit the model and `force` is off.
    """
    from acmil.figures import umap_figure

    run = load_run(config.run, device=config.device)
    cohort = run.select(read_cohort(config.cohort, require_labels=False), config.split)
    with output_folder(config.out):
        table, features = sample_cohort(config, run, cohort, progress=progress or SilentProgress())
        embedding = project(features, n_neighbors=config.n_neighbors, min_dist=config.min_dist, seed=config.seed)
        table.insert(3, "umap_1", embedding[:, 0])
        table.insert(4, "umap_2", embedding[:, 1])
        table.to_csv(config.out / "umap.csv", index=False)
        labelled = table["label"].notna().any()
        figure = umap_figure(
            embedding,
            relative_attention=table["relative_attention"].to_numpy(),
            slides=table["slide_id"].tolist(),
            labels=table["label"].fillna("no label").tolist() if labelled else None,
            branches=table["branch"].to_numpy() if table["branch"].nunique() > 1 else None,
            title=f"UMAP of the {_SPACES[config.space]} tile features, {config.split} slides",
            note=f"Of each slide up to {config.tiles_per_slide} tiles: {TOP_SHARE:.0%} of them its most attended, the "
            "others drawn at random; all of a slide that has fewer.",
        )
        figure.savefig(config.out / "umap.png", dpi=130)
    return config.out / "umap.png"


def sample_cohort(
    config: "UmapConfig", run: Run, cohort: Cohort, *, progress: Progress
) -> tuple["pd.DataFrame", np.ndarray]:
    """Predict every slide of a cohort and take a sample of its tiles.

    Args:
        config: Options of the `umap` command.
        run: The trained model.
        cohort: The slides.
        progress: Told of each slide.

    Returns:
        A table, one row a tile (slide_id, x, y in level-0 px, attention as the mean over branches, relative_attention,
        branch that attends most to the tile, label, split), and the tiles' features (M, D).
    """
    import pandas as pd

    bags = BagDataset(config.features, cohort.rows, classes=None, mpp_tolerance=None)  # which the run looks at
    run.check_features(bags.metas, force=config.force)
    run.tell_of_unknown_encoders(bags.metas)
    tables, features = [], []
    progress.begin("sampling tiles", len(bags))
    for index, (row, bag) in enumerate(zip(cohort.rows, bags, strict=True)):
        predicted = run.predict(bag)
        mean = predicted.attention.mean(axis=0)  # (N,)
        # A generator a slide: another slide in the cohort does not change which tiles this one gives.
        generator = np.random.default_rng([config.seed, *row.slide_id.encode()])
        chosen = sample_instances(mean, tiles=config.tiles_per_slide, generator=generator)
        features.append((predicted.hidden if config.space == "hidden" else np.asarray(bag.features))[chosen])
        tables.append(
            pd.DataFrame(
                {
                    "slide_id": row.slide_id,
                    "x": bag.coords[chosen, 0],
                    "y": bag.coords[chosen, 1],
                    "attention": mean[chosen],
                    "relative_attention": relative_attention(mean)[chosen],
                    "branch": predicted.attention[:, chosen].argmax(axis=0),
                    "label": row.label,
                    "split": run.splits.get(row.slide_id) or row.split,
                }
            )
        )
        progress.advance(note=f"{index + 1}: {row.slide_id}")
    progress.end()
    return pd.concat(tables, ignore_index=True), np.concatenate(features)
