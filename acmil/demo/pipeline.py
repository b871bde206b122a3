"""The demo: the whole pipeline, from composed slides to a page of results."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmil import environment
from acmil.cohort import Cohort, read_cohort
from acmil.config import EvaluateConfig, HeatmapConfig, TrainConfig, UmapConfig
from acmil.config_file import load_config
from acmil.demo.analysis import Localisation, concentration_curves, lesion_localisation, mean_pool_auroc
from acmil.demo.page import write_page
from acmil.demo.planted import DEFAULT_DIFFICULTY, compose_cohort
from acmil.devices import choose_device
from acmil.evaluation import evaluate
from acmil.heatmaps import heatmaps
from acmil.json_file import write_json
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.job import JobSummary, preprocess
from acmil.projection import umap
from acmil.runs import load_run
from acmil.samples import fetch_sample
from acmil.training_run import train

if TYPE_CHECKING:
    from acmil.config import DemoConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

POSITIVE = "lesion"


@dataclass
class Stopwatch:
    """Seconds of each stage, in the order they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


@dataclass(frozen=True)
class DemoSummary:
    """What the demo found, as written to summary.json."""

    folder: Path
    values: dict[str, Any]

    def __str__(self) -> str:
        values = self.values
        low, high = values["test_auroc_ci"]
        return (
            f"{self.folder / 'index.html'}: test AUROC {values['test_auroc']:.3f} [{low:.3f}, {high:.3f}] on planted lesions, "
            f"lesion tile AUROC {values['lesion_tile_auroc']:.3f}, mean pooling {values['mean_pool_test_auroc']:.3f}, "
            f"{values['seconds']['total']:.0f} s"
        )


def demo(config: "DemoConfig", *, progress: "Progress | None" = None) -> DemoSummary:
    """Run the whole pipeline into `config.out`: slides, features, runs, evaluation, heatmaps, UMAP, index.html, summary.json.

    The cohort is composed from real tissue texture with planted lesions: it tests the pipeline and has no medical meaning.
    What an earlier, interrupted demo of the same options finished is not done again.
    """
    out, watch, start = config.out, Stopwatch(), time.perf_counter()
    difficulty = DEFAULT_DIFFICULTY if config.difficulty is None else config.difficulty
    with watch.stage("samples"):
        source, weights = fetch_sample("cmu-1-small-region"), fetch_sample("efficientnet-lite0")
    with watch.stage("compose"):
        compose_cohort(
            source,
            out,
            n_slides=config.n_slides,
            difficulty=difficulty,
            seed=config.cohort_seed,
            workers=config.workers,
            progress=progress,
        )
    with watch.stage("preprocess"):
        job = _preprocess(config, [out / "slides"], out / "job", weights, progress)
    with watch.stage("train"):
        _train(config, "acmil_ga", "run", progress)
    with watch.stage("train_abmil"):
        _train(config, "abmil", "run_abmil", progress)
    cohort, features = read_cohort(out / "cohort.csv"), out / "job" / "features"
    with watch.stage("evaluate"):
        evaluation = evaluate(_evaluation(config, "run", "evaluation"), progress=progress)
        abmil = evaluate(_evaluation(config, "run_abmil", "evaluation_abmil"), progress=progress)
        pooled = mean_pool_auroc(cohort, features, positive=POSITIVE)
        run = load_run(out / "run", device=config.device)
        localisation = lesion_localisation(run, cohort, features, out / "lesions", positive=POSITIVE)
        concentration = {
            name: concentration_curves(load_run(out / folder, device=config.device), cohort, features)
            for name, folder in (("ACMIL", "run"), ("ABMIL", "run_abmil"))
        }
    with watch.stage("heatmaps"):
        _heatmaps(config, _test_slides(out, cohort), features, out / "heatmaps", progress, outlines=out / "lesions")
    with watch.stage("umap"):
        umap(
            UmapConfig(
                run=out / "run", cohort=out / "cohort.csv", features=features, out=out / "umap", device=config.device
            ),
            progress=progress,
        )
    with watch.stage("real_slide"):
        real = _preprocess(config, [source], out / "cmu-1", weights, progress)
        _heatmaps(config, [source], out / "cmu-1" / "features", out / "cmu-1" / "heatmaps", progress)
    watch.seconds["total"] = round(time.perf_counter() - start, 2)
    values = _summary(
        config, cohort, job, real, evaluation.metrics, abmil.metrics, pooled, localisation, watch, difficulty
    )
    write_json(out / "summary.json", values)
    write_page(out, values, concentration, positive=POSITIVE)
    return DemoSummary(out, values)


def _preprocess(
    config: "DemoConfig", slides: list[Path], out: Path, weights: Path, progress: "Progress | None"
) -> JobSummary:
    options = {"slides": slides, "out": out, "weights": weights, "device": config.device}
    summary = preprocess(
        load_config(PreprocessConfig, "preprocess/demo.yaml", **options, workers=config.workers), progress=progress
    )
    if summary.failed:
        raise ValueError(f"{summary.failed} slides of the demo failed to preprocess. {out / 'slides.csv'} says why.")
    return summary


def _train(config: "DemoConfig", preset: str, run: str, progress: "Progress | None") -> None:
    options = {
        "cohort": config.out / "cohort.csv",
        "features": config.out / "job" / "features",
        "out": config.out / run,
    }
    train(
        load_config(
            TrainConfig, f"train/{preset}.yaml", **options, epochs=config.epochs, seed=config.seed, device=config.device
        ),
        progress=progress,
    )


def _evaluation(config: "DemoConfig", run: str, out: str) -> EvaluateConfig:
    return EvaluateConfig(
        run=config.out / run,
        cohort=config.out / "cohort.csv",
        features=config.out / "job" / "features",
        out=config.out / out,
        device=config.device,
    )


def _heatmaps(
    config: "DemoConfig",
    slides: list[Path],
    features: Path,
    out: Path,
    progress: "Progress | None",
    *,
    outlines: Path | None = None,
) -> None:
    options = HeatmapConfig(
        run=config.out / "run", slides=slides, features=features, out=out, outlines=outlines, device=config.device
    )
    heatmaps(options, progress=progress)


def _test_slides(out: Path, cohort: Cohort) -> list[Path]:
    return [out / "slides" / f"{row.slide_id}.tif" for row in cohort.rows if row.split == "test"]


def _summary(
    config: "DemoConfig",
    cohort: Cohort,
    job: JobSummary,
    real: JobSummary,
    metrics: dict[str, Any] | None,
    abmil: dict[str, Any] | None,
    pooled: float,
    localisation: Localisation,
    watch: Stopwatch,
    difficulty: float,
) -> dict[str, Any]:
    if metrics is None or abmil is None:
        raise ValueError(f"{cohort.path} has no labels.")
    auroc = metrics["auroc"]
    return {
        "data": "synthetic: real tissue texture with planted lesions, of no medical meaning",
        "test_auroc": auroc["value"],
        "test_auroc_ci": [auroc["low"], auroc["high"]],
        "test_metrics": metrics,
        "abmil_test_auroc": abmil["auroc"]["value"],
        "mean_pool_test_auroc": pooled,
        "lesion_tile_auroc": localisation.auroc,
        "lesion_hit_rate": localisation.hit_rate,
        "lesion_tile_auroc_by_slide": localisation.auroc_by_slide,
        "n_slides": len(cohort.rows),
        "n_cases": len({row.case_id for row in cohort.rows}),
        "n_test_slides": sum(row.split == "test" for row in cohort.rows),
        "n_tiles": job.tiles,
        "n_features": n_features,
        "n_tiles_real_slide": real.tiles,
        "seed": config.seed,
        "cohort_seed": config.cohort_seed,
        "difficulty": difficulty,
        "epochs": config.epochs,
        "seconds": watch.seconds,
        "device": str(choose_device(config.device)),
        **environment.describe(),
    }
