"""Attention maps of slides: the `heatmap` command, and reading one slide with its attention."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from acmil.attention_maps import (
    MEAN_BRANCH,
    attention_geojson,
    percentile_rank,
    relative_attention,
    score_raster,
    select_branch,
    tile_table,
)
from acmil.bags import Bag
from acmil.overlay import ColourScale, percentile_scale, relative_scale
from acmil.preprocessing.feature_file import SUFFIX, FeatureFile, FeatureMeta, open_feature_file
from acmil.preprocessing.job_tissue import tissue_of_job
from acmil.preprocessing.output_folder import output_folder
from acmil.preprocessing.progress import Progress, SilentProgress
from acmil.preprocessing.slide import Slide, Thumbnail
from acmil.preprocessing.slide_list import SlideSource, list_slides
from acmil.preprocessing.tissue import Tissue, area_fraction
from acmil.preprocessing.tissue_outlines import Polygon, outlines_path, read_outlines
from acmil.runs import Run, load_run

if TYPE_CHECKING:
    import pandas as pd

    from acmil.config import HeatmapConfig

logger = logging.getLogger(__name__)

LARGEST_THUMBNAIL_PX = 4000  # longer side; keeps the memory of one figure under about 1 GB
DEFAULT_THUMBNAIL_PX = 1500
_USED = {  # by the split that a slide had in the run
    "train": " The model was trained on this slide.",
    "val": " This slide helped to choose the model's epoch.",
}
_PNG_DPI = (110, 400)


class HeatmapError(ValueError):
    """Slides that got no map, or a slide that does not fit its features."""


@dataclass(frozen=True, eq=False)
class SlideAttention:
    """A slide as the model saw it.

    Attributes:
        slide_id: Name of the slide.
        path: The slide file.
        meta: Where its features come from.
        classes: Names of the classes, in the order of `probabilities`.
        probabilities: (C,) float64.
        attention: (K, N) float64, each row sums to 1.
        hidden: (N, L) float32, the model's instance features.
        coords: (N, 2) int64, top-left corners in level-0 px.
        tissue_fraction: (N,) float32, NaN where it is not known.
        thumbnail: (h, w, 3) uint8.
        downsample: Level-0 px per thumbnail px.
        glass: (h, w) bool, thumbnail pixels without tissue, which stay uncoloured where they lie in a tile; none in a
            tile where no tissue was found at all.
    """

    slide_id: str
    path: Path
    meta: FeatureMeta
    classes: tuple[str, ...]
    probabilities: np.ndarray
    attention: np.ndarray
    hidden: np.ndarray
    coords: np.ndarray
    tissue_fraction: np.ndarray
    thumbnail: np.ndarray
    downsample: float
    glass: np.ndarray

    @property
    def prediction(self) -> str:
        """What the model says of the slide, in words."""
        order = np.argsort(-self.probabilities, kind="stable")
        first, *others = [f"{self.classes[i]} {self.probabilities[i]:.1%}" for i in order]
        return f"model: {first}" + (f"  ({', '.join(others[:3])})" if others else "")

    def table(self, branch: str | int = "mean") -> "pd.DataFrame":
        """The per-tile table, in the order of the feature file; ranks are those of the branch that is shown."""
        return tile_table(
            self.slide_id,
            self.attention,
            self.coords,
            tile_level0_px=self.meta.tile_level0_px,
            tissue_fraction=None if np.isnan(self.tissue_fraction).all() else self.tissue_fraction,
            branch=branch,
        )

    def scores(self, branch: str | int, scale: str) -> np.ndarray:
        """Display value of each tile, (N,): attention of a branch relative to uniform, or its percentile."""
        attention = select_branch(self.attention, branch)
        return percentile_rank(attention) if scale == "percentile" else relative_attention(attention)

    def raster(self, values: np.ndarray) -> np.ndarray:
        """Paint one value a tile over the thumbnail: (h, w) float32, NaN = no tile, or glass."""
        painted = _painted(values, self.coords, self.meta, self.downsample, self.glass.shape)
        painted[self.glass] = np.nan
        return painted


def heatmaps(config: "HeatmapConfig", *, progress: Progress | None = None) -> list[Path]:
    """Write the attention map of each slide as PNG, GeoJSON for QuPath and per-tile CSV.

    A slide that fails does not stop the others; it is named in the error at the end.

    Args:
        config: Options of the command.
        progress: Told of each slide.

    Returns:
        The PNG files, in the order of the slides.

    Raises:
        HeatmapError: If two slides share a name, there is no such folder of outlines, or, after all others are written,
            if some slides failed.
    """
    sources = _sources(config.slides)
    if config.outlines is not None and not config.outlines.is_dir():
        raise HeatmapError(f"outlines must be a folder of GeoJSON files, found none ({config.outlines}).")
    run = load_run(config.run, device=config.device)
    progress = progress or SilentProgress()
    written: list[Path] = []
    failures: list[str] = []
    with output_folder(config.out):
        progress.begin("attention maps", len(sources))
        for source in sources:
            try:
                written.append(_write_maps(config, run, source))
            except Exception as error:
                logger.debug("no attention map of %s", source.path, exc_info=True)  # the error at the end says why
                failures.append(f"{source.path.name}: {error}")
            progress.advance(note=source.slide_id)
    progress.end()
    if failures:
        count = f"{len(failures)} of {len(sources)} slides got no attention map"
        rest = f"; the others are in {config.out}" if written else ""
        raise HeatmapError(f"{count}{rest}.\n" + "\n".join(f"  {line}" for line in failures))
    return written


def read_slide_attention(
    run: Run,
    slide_path: Path,
    feature_dir: Path,
    *,
    slide_id: str | None = None,
    thumbnail_mpp: float | None = None,
    mpp_override: float | None = None,
    force: bool = False,
) -> SlideAttention:
    """Open a slide and its features, check that they belong together and to the model, and predict.

    Args:
        run: The trained model.
        slide_path: The slide.
        feature_dir: Folder of feature files; where it lies in a job folder, the job's tissue is told from glass.
        slide_id: The slide's features are `<slide_id>.h5`; the file's name without its ending by default.
        thumbnail_mpp: Resolution of the thumbnail in µm/px, made coarser where its longer side would exceed 4,000 px;
            by default such that the longer side has about 1,500 px.
        mpp_override: Level-0 resolution in µm/px; by default the one the features were made with.
        force: Go on although the features' encoder or resolution differ from the model's.

    Returns:
        The slide with its attention.

    Raises:
        HeatmapError: If there is no such slide, or no features of it, or they were made from a slide of another size.
        RunError: If the features do not fit the model.
    """
    if not slide_path.exists():  # said before its features are asked for, which a misspelt name has none of
        raise HeatmapError(f"slide file must exist, found none ({slide_path}).")
    name = slide_id or slide_path.stem
    feature_path = feature_dir / f"{name}{SUFFIX}"
    if not feature_path.is_file():
        raise HeatmapError(
            f"no features of slide '{name}': {feature_path} does not exist. Preprocess the slide first, or, where the "
            "slide goes by another name than its file's, give a CSV of path,slide_id, such as the job's slides.csv."
        )
    features = open_feature_file(feature_path)
    _check_located(features, needs_mpp=mpp_override is None)
    run.check_features([features.meta], force=force)
    with Slide.open(slide_path, mpp=mpp_override or features.meta.level0_mpp) as slide:
        _check_size(slide, features.meta, feature_path)
        if slide.is_restated:
            logger.warning(
                "slide '%s' says that level 0 has %.4g µm/px, its map is drawn with %.4g, as stated: so are the scale "
                "bar and what counts as tissue",
                *(name, slide.file_mpp, slide.mpp),
            )
        thumbnail = _thumbnail(slide, thumbnail_mpp)
        tissue = tissue_of_job(slide, feature_dir.parent)
    bag = Bag(name, features.features(), features.coords(), label=None, case_id=name)
    predicted = run.predict(bag)
    return SlideAttention(
        slide_id=name,
        path=slide_path,
        meta=features.meta,
        classes=run.classes,
        probabilities=predicted.probabilities,
        attention=predicted.attention,
        hidden=predicted.hidden,
        coords=bag.coords,
        tissue_fraction=features.tissue_fraction(),
        thumbnail=thumbnail.image,
        downsample=thumbnail.downsample,
        glass=_glass(tissue, thumbnail, features.meta, bag.coords),
    )


def _painted(
    values: np.ndarray, coords: np.ndarray, meta: FeatureMeta, downsample: float, shape: tuple[int, ...]
) -> np.ndarray:
    return score_raster(
        values,
        coords,
        tile_level0_px=meta.tile_level0_px,
        level0_size=(meta.level0_width, meta.level0_height),
        downsample=downsample,
        shape=(shape[0], shape[1]),
    )


def _glass(tissue: Tissue, thumbnail: Thumbnail, meta: FeatureMeta, coords: np.ndarray) -> np.ndarray:
    """Thumbnail pixels (h, w) that are no tissue; False all over tiles in which no tissue was found."""
    height, width = thumbnail.image.shape[:2]
    y, x = (
        ((np.arange(side) + 0.5) * thumbnail.downsample / tissue.downsample).astype(int) for side in (height, width)
    )
    y, x = y.clip(0, tissue.mask.shape[0] - 1), x.clip(0, tissue.mask.shape[1] - 1)
    glass = ~tissue.mask[y[:, None], x[None, :]]
    boxes = np.concatenate([coords, coords + meta.tile_level0_px], axis=1) / tissue.downsample
    bare = area_fraction(tissue.mask, boxes) == 0
    if bare.any():
        painted = _painted(np.ones(bare.sum()), coords[bare], meta, thumbnail.downsample, glass.shape)
        glass &= np.isnan(painted)
    return glass


def colour_scale(name: str) -> ColourScale:
    """The colour scale called `relative` or `percentile`."""
    return percentile_scale() if name == "percentile" else relative_scale()


def branch_name(branch: str | int, n_branches: int) -> str:
    """Say in words which attention is shown."""
    if n_branches == 1:
        return "attention of the only branch"
    if branch == MEAN_BRANCH:
        return f"mean attention of {n_branches} branches"
    return f"attention of branch {branch} of 0 to {n_branches - 1}"


def _write_maps(config: "HeatmapConfig", run: Run, source: SlideSource) -> Path:
    from acmil.figures import heatmap_figure

    slide = read_slide_attention(
        run,
        source.path,
        config.features,
        slide_id=source.slide_id,
        thumbnail_mpp=config.thumbnail_mpp,
        mpp_override=config.mpp_override,
        force=config.force,
    )
    scale = colour_scale(config.scale)
    scores = slide.scores(config.branch, config.scale)
    figure = heatmap_figure(
        slide.thumbnail,
        slide.raster(scores),
        downsample=slide.downsample,
        mpp=config.mpp_override or slide.meta.level0_mpp,
        title=slide.slide_id,
        prediction=slide.prediction,
        scale=scale,
        opacity=config.opacity,
        outlines=[polygon.rings for polygon in _outlines_of(config.outlines, slide.slide_id)],
        outline_label=config.outline_label,
        note=f"Shown: {branch_name(config.branch, len(slide.attention))}, {scores.size:,} tiles."
        + _USED.get(run.splits.get(slide.slide_id, ""), ""),
    )
    table = slide.table(config.branch)
    table.to_csv(config.out / f"{slide.slide_id}.csv", index=False)
    geojson = attention_geojson(table, colours=scale.colours(scores))
    (config.out / f"{slide.slide_id}.geojson").write_text(json.dumps(geojson), encoding="utf-8")
    target = config.out / f"{slide.slide_id}.png"
    figure.savefig(target, dpi=_dpi(slide.thumbnail))
    return target


def _dpi(thumbnail: np.ndarray) -> float:
    """Resolution at which a panel of about 6 inches shows the thumbnail's pixels one to one, within bounds."""
    return float(np.clip(max(thumbnail.shape[:2]) / 6, *_PNG_DPI))


def _outlines_of(folder: Path | None, slide_id: str) -> tuple[Polygon, ...]:
    path = outlines_path(folder, slide_id) if folder else None
    return read_outlines(path) if path is not None and path.is_file() else ()


def _thumbnail(slide: Slide, mpp: float | None) -> Thumbnail:
    if mpp is None:
        return slide.thumbnail_within(DEFAULT_THUMBNAIL_PX)
    if max(slide.width, slide.height) * slide.mpp / mpp > LARGEST_THUMBNAIL_PX:
        return slide.thumbnail_within(LARGEST_THUMBNAIL_PX)
    return slide.thumbnail(mpp)


def _check_located(features: FeatureFile, *, needs_mpp: bool) -> None:
    """Files converted from formats that state less may not say where the tiles lie."""
    needed = ["tile_level0_px", "level0_width", "level0_height", *(["level0_mpp"] if needs_mpp else [])]
    missing = [name for name in needed if name in features.meta.unknown]
    missing = missing if features.has_coords() else ["coords", *missing]
    if missing:
        raise HeatmapError(
            f"a map needs to know where the tiles lie, not known: {', '.join(missing)} ({features.path}). "
            "Convert the features again with `acmil features convert --slides`, or preprocess the slide."
        )


def _check_size(slide: Slide, meta: FeatureMeta, feature_path: Path) -> None:
    if (slide.width, slide.height) != (meta.level0_width, meta.level0_height):
        raise HeatmapError(
            f"slide '{slide.slide_id}' must have the size its features were made from, "
            f"{meta.level0_width} x {meta.level0_height} px, "
            f"got {slide.width} x {slide.height} px ({slide.path}, {feature_path}). "
            "They are different slides of one name, or the slide was exported anew: preprocess it again."
        )


def _sources(slides: list[Path]) -> list[SlideSource]:
    """The slides of files, folders and lists; a file that is missing is an error of its own, when its turn comes."""
    sources: list[SlideSource] = []
    for path in slides:
        is_list = path.is_dir() or (path.suffix.lower() == ".csv" and path.is_file())
        sources += list_slides([path], with_tiles=True) if is_list else [SlideSource(path.stem, path)]
    seen: dict[str, Path] = {}
    for source in sources:
        if source.slide_id in seen:
            raise HeatmapError(
                f"slides must differ in name, got '{source.slide_id}' twice ({seen[source.slide_id]}, {source.path}). "
                "Files are named after the slide: map them one after the other into two folders."
            )
        seen[source.slide_id] = source.path
    return sources
