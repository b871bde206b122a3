"""The demo: the whole pipeline, from composed slides to a page of results."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from acmil import environment
from acmil.bags import BagDataset
from acmil.cohort import Cohort, read_cohort
from acmil.config import EvaluateConfig, HeatmapConfig, TrainConfig, UmapConfig
from acmil.config_file import load_config
from acmil.demo.analysis import concentration_curves, lesion_localisation, mean_pool_auroc
from acmil.demo.manifest import composing_options, read_manifest
from acmil.demo.page import write_page
from acmil.demo.planted import DEFAULT_DIFFICULTY, POSITIVE, compose_cohort
from acmil.evaluation import evaluate
from acmil.heatmaps import heatmaps
from acmil.json_file import write_json
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.devices import choose_device
from acmil.preprocessing.job import JobSummary, preprocess
from acmil.preprocessing.output_folder import make_output_folder
from acmil.projection import umap
from acmil.runs import load_run
from acmil.samples import fetch_sample
from acmil.training_run import train

if TYPE_CHECKING:
    from acmil.config import DemoConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

RUNS = {"ACMIL": ("run", "demo"), "ABMIL": ("run_abmil", "abmil")}  # name on the page → folder, preset
_MADE_OF_SLIDES = ("job", "heatmaps", *(folder for folder, _ in RUNS.values()))

Result = TypeVar("Result")


@dataclass(frozen=True)
class DemoSummary:
    """What the demo found, as written to summary.json."""

    folder: Path
    values: dict[str, Any]

    def __str__(self) -> str:
        values = self.values
        low, high = values["test_auroc_ci"]
        return (
            f"{self.folder / 'index.html'}: planted lesions: test AUROC {values['test_auroc']:.3f} "
            f"[{low:.3f}, {high:.3f}], mean pooling {values['mean_pool_test_auroc']:.3f}; "
            f"lesion tile AUROC {values['lesion_tile_auroc']:.3f}; {values['seconds']['total']:.0f} s"
        )


def demo(config: "DemoConfig", *, progress: "Progress | None" = None) -> DemoSummary:
    """Run the whole pipeline into `config.out`, from composed slides to index.html and summary.json.

    The cohort is composed of real tissue texture with planted lesions: it tests the pipeline, and means nothing
    medically. Stages that an earlier, interrupted demo of the same options finished are not done again.
    """
    return _Demo(config, progress).run()


class _Demo:
    """The stages of one demo, each timed."""

    def __init__(self, config: "DemoConfig", progress: "Progress | None") -> None:
        self.config, self.progress, self.out = config, progress, config.out
        self.features = self.out / "job" / "features"
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoSummary:
        start = time.perf_counter()
        make_output_folder(self.out)
        source = self.stage("samples", lambda: fetch_sample("cmu-1-small-region"))
        weights = self.stage("samples", lambda: fetch_sample("efficientnet-lite0"))
        self.stage("compose", lambda: self.compose(source))
        job = self.stage("preprocess", lambda: self.preprocess([self.out / "slides"], self.out / "job", weights))
        for name, (folder, preset) in RUNS.items():
            self.stage(f"train {name}", partial(self.train, folder, preset))
        cohort = read_cohort(self.out / "cohort.csv")
        values = self.stage("evaluate", lambda: self.evaluate(cohort))
        test = [self.out / "slides" / f"{row.slide_id}.tif" for row in cohort.rows if row.split == "test"]
        self.stage("heatmaps", lambda: self.heatmaps(test, self.features, self.out / "heatmaps", self.out / "lesions"))
        self.stage("umap", self.umap)
        real = self.stage("real slide", lambda: self.real_slide(source, weights))
        self.seconds["total"] = time.perf_counter() - start
        values |= {"n_tiles": job.tiles, "n_tiles_real_slide": real.tiles, **self.circumstances()}
        write_json(self.out / "summary.json", values)
        write_page(self.out, values, self.concentration(cohort), positive=POSITIVE)
        return DemoSummary(self.out, values)

    def stage(self, name: str, work: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    @property
    def difficulty(self) -> float:
        return DEFAULT_DIFFICULTY if self.config.difficulty is None else self.config.difficulty

    def compose(self, source: Path) -> None:
        cohort: dict[str, Any] = {
            "n_slides": self.config.n_slides,
            "difficulty": self.difficulty,
            "seed": self.config.cohort_seed,
        }
        before = read_manifest(self.out)
        if before is not None and before.options != composing_options(source, **cohort):
            logger.info("%s holds a demo of other slides: these are composed anew, and what was made of them", self.out)
            for folder in _MADE_OF_SLIDES:  # before the slides: an interrupted demo must not go on from them
                shutil.rmtree(self.out / folder, ignore_errors=True)
        compose_cohort(source, self.out, **cohort, workers=self.config.workers, progress=self.progress)

    def preprocess(self, slides: list[Path], out: Path, weights: Path) -> JobSummary:
        options = {"slides": slides, "out": out, "weights": weights, "device": self.config.device}
        config = load_config(PreprocessConfig, "preprocess/demo.yaml", **options, workers=self.config.workers)
        summary = preprocess(config, progress=self.progress)
        if summary.failed:
            raise ValueError(
                f"{summary.failed} slides of the demo failed to preprocess. {out / 'slides.csv'} says why."
            )
        return summary

    def train(self, folder: str, preset: str) -> None:
        # float32 everywhere: on so few slides a machine's bf16 may choose another epoch.
        options = self.inputs() | {"epochs": self.config.epochs, "seed": self.config.seed, "precision": "fp32"}
        config = load_config(TrainConfig, f"train/{preset}.yaml", **options, out=self.out / folder)
        train(config, progress=self.progress)

    def evaluate(self, cohort: Cohort) -> dict[str, Any]:
        """Figures of merit of both models and of mean pooling, and attention against the planted outlines."""
        metrics = {name: self.evaluate_run(folder) for name, (folder, _) in RUNS.items()}
        run = load_run(self.out / "run", device=self.config.device)
        found = lesion_localisation(run, cohort, self.features, self.out / "lesions", positive=POSITIVE)
        auroc = metrics["ACMIL"]["auroc"]
        return {
            "data": "synthetic: real texture, planted lesions, made to test the pipeline; no medical meaning",
            "test_auroc": auroc["value"],
            "test_auroc_ci": [auroc["low"], auroc["high"]],
            "test_metrics": metrics["ACMIL"],
            "abmil_test_auroc": metrics["ABMIL"]["auroc"]["value"],
            "mean_pool_test_auroc": mean_pool_auroc(cohort, self.features, positive=POSITIVE),
            "lesion_tile_auroc": found.auroc,
            "lesion_tile_auroc_by_slide": found.auroc_by_slide,
            "lesion_hit_rate": found.hit_rate,
            "n_slides": len(cohort.rows),
            "n_cases": len({row.case_id for row in cohort.rows}),
            "n_test_slides": sum(row.split == "test" for row in cohort.rows),
            "n_features": BagDataset(self.features, cohort.rows[:1], classes=None).n_features,
        }

    def evaluate_run(self, folder: str) -> dict[str, Any]:
        out = self.out / folder.replace("run", "evaluation")
        summary = evaluate(EvaluateConfig(run=self.out / folder, out=out, **self.inputs()), progress=self.progress)
        if summary.metrics is None:
            raise ValueError(f"{self.out / 'cohort.csv'} has no labels. Delete it to have it composed again.")
        return summary.metrics

    def inputs(self) -> dict[str, Any]:
        return {"cohort": self.out / "cohort.csv", "features": self.features, "device": self.config.device}

    def heatmaps(self, slides: list[Path], features: Path, out: Path, outlines: Path | None = None) -> None:
        config = load_config(
            HeatmapConfig,
            run=self.out / "run",
            slides=slides,
            features=features,
            out=out,
            outlines=outlines,
            outline_label="planted lesion (synthetic)",
            thumbnail_mpp=2.0,  # the slides are small
            device=self.config.device,
        )
        heatmaps(config, progress=self.progress)

    def umap(self) -> None:
        umap(UmapConfig(run=self.out / "run", out=self.out / "umap", **self.inputs()), progress=self.progress)

    def real_slide(self, source: Path, weights: Path) -> JobSummary:
        out = self.out / "cmu-1"
        summary = self.preprocess([source], out, weights)
        self.heatmaps([source], out / "features", out / "heatmaps")
        return summary

    def concentration(self, cohort: Cohort) -> dict[str, list[np.ndarray]]:
        runs = {name: load_run(self.out / folder, device=self.config.device) for name, (folder, _) in RUNS.items()}
        return {name: concentration_curves(run, cohort, self.features) for name, run in runs.items()}

    def circumstances(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "cohort_seed": self.config.cohort_seed,
            "difficulty": self.difficulty,
            "epochs": self.config.epochs,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "device": str(choose_device(self.config.device)),
            **environment.describe(),
        }
