"""What the exploration notebook calls: one run, one slide, one branch and one threshold at a time."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from acmil.attention_maps import (
    MEAN_BRANCH,
    attention_entropy,
    descending_rank,
    relative_attention,
    select_branch,
    top_k_mass,
)
from acmil.figures import heatmap_figure, top_tiles_figure, umap_slide_figure
from acmil.heatmaps import SlideAttention, branch_name, read_slide_attention
from acmil.preprocessing.feature_file import SUFFIX
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.slide_list import list_slides
from acmil.preprocessing.tissue_outlines import Polygon, inside_outlines, read_outlines
from acmil.runs import Run, load_run

FOLDER_VARIABLE = "ACMIL_DEMO"
_TILE_PX = 192
_UNSEEN_FIRST = {"test": 0, "val": 1, "train": 2}


class ExplorationError(ValueError):
    """A folder without what the exploration needs."""


@dataclass
class Exploration:
    """A trained model and slides, opened to look at.

    Attributes:
        run: The trained model.
        slides: Slide files by name, those the model never saw first.
        features: Folder of their feature files.
        umap_folder: What `acmil umap` left, None where it did not run.
        outlines_folder: Outlines of lesions, `<slide_id>.geojson`, None where there are none.
    """

    run: Run
    slides: dict[str, Path]
    features: Path
    umap_folder: Path | None = None
    outlines_folder: Path | None = None
    _views: dict[str, SlideAttention] = field(default_factory=dict, repr=False)

    @property
    def slide_ids(self) -> list[str]:
        """Names of the slides; those that training never saw come first."""
        return list(self.slides)

    @property
    def branches(self) -> list[str]:
        """What can be shown as a branch: the mean, or the number of one."""
        first = self.view(self.slide_ids[0])
        return [MEAN_BRANCH, *(str(k) for k in range(len(first.attention)))]

    @cached_property
    def umap(self) -> pd.DataFrame:
        """The sampled tiles of the cohort with their place in the UMAP, as `acmil umap` wrote them."""
        if self.umap_folder is None or not (self.umap_folder / "umap.csv").is_file():
            raise ExplorationError(
                f"a UMAP needs what `acmil umap` leaves, got {self.umap_folder or 'no folder'}. Run it on the cohort, "
                "and name its folder: open_run(..., umap=FOLDER)."
            )
        return pd.read_csv(self.umap_folder / "umap.csv", dtype={"slide_id": str})

    def predictions(self) -> pd.DataFrame:
        """What the model says of every slide, as training wrote it; those that training never saw come first."""
        table = pd.read_csv(self.run.folder / "predictions.csv", dtype={"slide_id": str})
        return table.sort_values("split", key=lambda split: split.map(_UNSEEN_FIRST), kind="stable", ignore_index=True)

    def view(self, slide_id: str) -> SlideAttention:
        """One slide with its attention; read once, then remembered."""
        if slide_id not in self.slides:
            raise ExplorationError(
                f"slide must be one of the {len(self.slides)} that were opened, got {slide_id!r}. See `slide_ids`."
            )
        if slide_id not in self._views:
            slide = self.slides[slide_id]
            self._views[slide_id] = read_slide_attention(self.run, slide, self.features, slide_id=slide_id)
        return self._views[slide_id]

    def outlines(self, slide_id: str) -> tuple[Polygon, ...]:
        """Outlines of the slide's lesions in level-0 px; none for a slide without."""
        path = self.outlines_folder / f"{slide_id}.geojson" if self.outlines_folder else None
        return read_outlines(path) if path is not None and path.is_file() else ()

    def map_figure(self, slide_id: str, *, branch: str = MEAN_BRANCH, threshold: float = 0.0) -> Figure:
        """The attention map; tiles below the threshold (a multiple of the uniform share) stay uncoloured."""
        slide = self.view(slide_id)
        values = slide.scores(branch, "relative")
        shown = np.where(values >= threshold, values, np.nan)
        which = f"the {np.sum(values >= threshold):,} of {len(values):,} tiles with at least {threshold:g}×"
        tiles = which if threshold > 0 else f"all {len(values):,} tiles"
        return heatmap_figure(
            slide.thumbnail,
            slide.raster(shown),
            downsample=slide.downsample,
            mpp=slide.meta.level0_mpp,
            title=slide_id,
            prediction=slide.prediction,
            outlines=[polygon.rings for polygon in self.outlines(slide_id)],
            outline_label="lesion",
            note=f"Shown: {branch_name(branch, len(slide.attention))}, {tiles}.",
        )

    def tiles_figure(self, slide_id: str, *, branch: str = MEAN_BRANCH, count: int = 12) -> Figure:
        """The most attended tiles, at the resolution the model saw."""
        slide = self.view(slide_id)
        values = slide.scores(branch, "relative")
        top = np.argsort(descending_rank(values))[:count]
        side = slide.meta.tile_level0_px
        with Slide.open(slide.path, mpp=slide.meta.level0_mpp) as pixels:
            tiles = [
                pixels.read_tile(x, y, size_level0_px=side, out_px=min(_TILE_PX, side))
                for x, y in slide.coords[top].tolist()
            ]
        title = f"{slide_id}: tiles of highest attention ({branch_name(branch, len(slide.attention))})"
        return top_tiles_figure(tiles, values[top], tile_um=side * slide.meta.level0_mpp, title=title)

    def umap_figure(self, slide_id: str, *, branch: str = MEAN_BRANCH, threshold: float = 1.0) -> Figure:
        """Where the slide's tiles lie among those of all slides; those at or above the threshold are ringed."""
        table = self.umap
        in_slide = (table["slide_id"] == slide_id).to_numpy()
        values = table["relative_attention"].to_numpy().copy()
        values[in_slide] = self._scores_at(slide_id, branch, table.loc[in_slide, ["x", "y"]].to_numpy())
        count = f"{int(in_slide.sum())} tiles of {slide_id}" if in_slide.any() else f"{slide_id} is not in the UMAP"
        return umap_slide_figure(
            table[["umap_1", "umap_2"]].to_numpy(),
            relative_attention=values,
            in_slide=in_slide,
            attended=values >= threshold,
            title=f"{count}, ringed from {threshold:g}×",
        )

    def _scores_at(self, slide_id: str, branch: str, corners: np.ndarray) -> list[float]:
        slide = self.view(slide_id)
        of_tile = dict(zip(map(tuple, slide.coords.tolist()), slide.scores(branch, "relative").tolist(), strict=True))
        try:
            return [of_tile[x, y] for x, y in corners.tolist()]
        except KeyError as error:
            raise ExplorationError(
                f"umap.csv must list tiles of the slide's features, got {error} of '{slide_id}' ({self.umap_folder}). "
                "The features are newer: run `acmil umap` again."
            ) from error

    def facts(self, slide_id: str, *, branch: str = MEAN_BRANCH) -> pd.Series:
        """How concentrated the attention is, and how much of it lies on the outlined lesions."""
        slide = self.view(slide_id)
        attention = select_branch(slide.attention, branch)
        facts: dict[str, Any] = {
            "tiles": len(attention),
            "tiles the attention is worth (exp of entropy)": round(float(np.exp(attention_entropy(attention))), 1),
            "attention on the 10 most attended tiles": f"{top_k_mass(attention, 10):.1%}",
            "highest attention relative to uniform": f"{relative_attention(attention).max():.1f}×",
        }
        outlines = self.outlines(slide_id)
        if outlines:
            inside = inside_outlines(slide.coords + slide.meta.tile_level0_px / 2, outlines)
            facts["tiles whose centre is in a lesion"] = f"{inside.mean():.1%}"
            facts["attention on them"] = f"{attention[inside].sum():.1%}"
        return pd.Series(facts, name=slide_id)


def open_demo(folder: str | Path | None = None) -> Exploration:
    """Open the outputs of `acmil demo`.

    Args:
        folder: The demo folder; by default the environment variable ACMIL_DEMO, or else the first `demo` folder here
            or in a folder above.

    Raises:
        ExplorationError: If there is no finished demo.
    """
    folder = Path(folder) if folder else _find_demo()
    slides = {path.stem: path for path in sorted((folder / "slides").glob("*.tif"))}
    if not slides or not (folder / "umap" / "umap.csv").is_file():
        raise ExplorationError(
            f"{folder} is not a finished demo (it needs slides/*.tif and umap/umap.csv). Run `acmil demo`."
        )
    return open_run(
        folder / "run",
        slides=slides.values(),
        features=folder / "job" / "features",
        umap=folder / "umap",
        outlines=folder / "lesions",
    )


def open_run(
    run: str | Path,
    *,
    slides: str | Path | Iterable[str | Path],
    features: str | Path,
    umap: str | Path | None = None,
    outlines: str | Path | None = None,
) -> Exploration:
    """Open a run of your own, and the slides to look at.

    Args:
        run: Run folder of `acmil train`.
        slides: Slide files, folders of them, or a CSV with path and slide_id, such as the job's slides.csv. Those
            without features are left out.
        features: Folder of the feature files.
        umap: Folder of `acmil umap`, for the UMAP.
        outlines: Folder of outlines of lesions in level-0 px, `<slide_id>.geojson`, to draw and to count.

    Raises:
        ExplorationError: If none of the slides has features.
        RunError: If there is no such run.
        SlideListError: If slides are named that do not exist, or no slide is found.
    """
    opened, features = load_run(Path(run)), Path(features)
    given = [Path(slides)] if isinstance(slides, str | Path) else [Path(slide) for slide in slides]
    found = {slide.slide_id: slide.path for slide in list_slides(given, with_tiles=True)}
    usable = {name: path for name, path in found.items() if (features / f"{name}{SUFFIX}").is_file()}
    if not usable:
        raise ExplorationError(
            f"slides must have features in {features}, got none of the {len(found)} ({', '.join(list(found)[:3])}, …). "
            "A file whose slide goes by another name is named in a CSV of path,slide_id."
        )
    ordered = sorted(usable, key=lambda name: (_UNSEEN_FIRST.get(opened.splits.get(name, ""), 0), name))
    return Exploration(
        run=opened,
        slides={name: usable[name] for name in ordered},
        features=features,
        umap_folder=None if umap is None else Path(umap),
        outlines_folder=None if outlines is None else Path(outlines),
    )


def _find_demo() -> Path:
    if FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    here = Path.cwd()
    for parent in (here, *here.parents):
        if (parent / "demo" / "slides").is_dir():
            return parent / "demo"
    raise ExplorationError(
        f"no demo folder in {here} or above it. Run `acmil demo`, or name the folder in the variable {FOLDER_VARIABLE}."
    )


def interact(show: Callable[..., Any], **choices: Sequence[Any] | tuple[float, float, float]) -> None:
    """Display controls that call `show` at each change; without ipywidgets, call it once with the first of each choice.

    Nothing is shown before the first change: a notebook executed without a front end, which has nobody to choose, does
    no work here.

    Args:
        show: Takes each name in `choices` and displays something.
        choices: A list to choose from, or (low, high, step) for a number, which starts at `low`.
    """
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError:
        show(**{name: values[0] for name, values in choices.items()})
        return
    controls = {name: _control(ipywidgets, name, values) for name, values in choices.items()}
    output = ipywidgets.Output()

    def redraw(_: Any) -> None:
        output.clear_output(wait=True)
        with output:
            show(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(redraw, names="value")
    display(ipywidgets.VBox([*controls.values(), output]))


def _control(ipywidgets: Any, name: str, values: Sequence[Any]) -> Any:
    if isinstance(values, tuple):
        low, high, step = values
        return ipywidgets.FloatSlider(min=low, max=high, step=step, description=name, continuous_update=False)
    return ipywidgets.Dropdown(options=list(values), description=name)
