"""Evaluation of a run on a cohort: metrics with intervals, predictions, plots."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from acmil.bags import BagDataset
from acmil.cohort import Cohort, CohortError, read_cohort
from acmil.json_file import write_json
from acmil.metrics import describe_metrics, few_cases, metrics_with_intervals, roc_points
from acmil.preprocessing.output_folder import make_output_folder
from acmil.runs import Run, RunError, load_run, write_predictions

if TYPE_CHECKING:
    from acmil.config import EvaluateConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

_DPI = 120


class EvaluationSummary(NamedTuple):
    """What `acmil evaluate` leaves; `metrics` is None where the cohort has no labels."""

    folder: Path
    n_slides: int
    metrics: dict[str, Any] | None

    def __str__(self) -> str:
        figures = describe_metrics(self.metrics) if self.metrics else "no labels, predictions only"
        return f"{self.folder}: {self.n_slides} slides: {figures}"


def evaluate(config: "EvaluateConfig", *, progress: "Progress | None" = None) -> EvaluationSummary:
    """Evaluate a run on the slides of a cohort; without labels, write predictions only.

    Raises:
        CohortError: If labels are partly missing, or are not classes of the run.
        RunError: If the features are not of the model's encoder and resolution (unless forced), or `out` is the folder
            of a run.
    """
    run = load_run(config.run, device=config.device)
    whole = read_cohort(config.cohort, require_labels=False)
    cohort = run.select(whole, config.split)
    n_left_out = len(whole.rows) - len(cohort.rows)
    labels = _labels(cohort, run)
    classes = run.classes if labels is not None else None
    bags = BagDataset(config.features, cohort.rows, classes=classes, mpp_tolerance=None)  # which the run looks at
    forced = run.check_features(bags.metas, force=config.force)
    run.tell_of_unknown_encoders(bags.metas)
    _refuse_run_folder(config.out)
    make_output_folder(config.out)
    probabilities = predict_all(run, bags, progress=progress)  # (S, C)
    for name in ("predictions.csv", "metrics.json", "roc.png"):  # of an earlier call: not all are written again
        (config.out / name).unlink(missing_ok=True)
    rows = cohort.rows
    write_predictions(config.out / "predictions.csv", rows, probabilities, run.classes)
    if labels is None:
        return EvaluationSummary(config.out, len(rows), None)
    cases = [row.case_id for row in rows]
    metrics = metrics_with_intervals(labels, probabilities, cases, samples=config.bootstrap_samples, seed=config.seed)
    description = {
        "run": str(config.run),
        "cohort": str(config.cohort),
        "split": config.split,
        "n_slides": len(rows),
        "n_left_out": n_left_out,
        "n_cases": len(set(cases)),
        **({} if forced is None else {"forced": forced}),
    }
    write_json(config.out / "metrics.json", {**description, "metrics": metrics})
    if (too_few := few_cases([str(row.label) for row in rows], cases)) is not None:
        logger.warning("%s", too_few)
    absent = [name for index, name in enumerate(run.classes) if index not in labels]
    if absent:
        logger.warning("no slide of class %s: AUROC is not defined", ", ".join(absent))
    _write_roc(config.out / "roc.png", run, np.asarray(labels), probabilities, metrics)
    return EvaluationSummary(config.out, len(rows), metrics)


def _refuse_run_folder(folder: Path) -> None:
    """Refuse the folder of a run or a cross-validation, whose own results would be lost."""
    for name in ("model.json", "splits.csv", "folds.csv", "state.pt"):
        if (folder / name).is_file():
            raise RunError(f"--out must not be the folder of a run, {folder} holds {name}. Give another --out.")


def predict_all(run: Run, bags: BagDataset, *, progress: "Progress | None" = None) -> np.ndarray:
    """Predict every bag: (S, C) float64 probabilities, in the order of the bags."""
    if progress:
        progress.begin("predicting", len(bags))
    probabilities = []
    for bag in bags:
        probabilities.append(run.probabilities(bag))
        if progress:
            progress.advance(1, note=bag.slide_id)
    if progress:
        progress.end()
    return np.stack(probabilities)


def _labels(cohort: Cohort, run: Run) -> list[int] | None:
    """Class indices of the slides; None where the cohort has no labels at all."""
    missing = [row.slide_id for row in cohort.rows if row.label is None]
    if len(missing) == len(cohort.rows):
        return None
    if missing:
        raise CohortError(
            f"label is missing for {len(missing)} of {len(cohort.rows)} slides of {cohort.path}, first '{missing[0]}'. "
            "Label all of them, or leave the column out."
        )
    strange = sorted({str(row.label) for row in cohort.rows} - set(run.classes))
    if strange:
        raise CohortError(
            f"label must be one of the run's classes ({', '.join(run.classes)}), got '{strange[0]}' in {cohort.path}. "
            "Map the labels to the classes trained on."
        )
    return [run.classes.index(str(row.label)) for row in cohort.rows]


def _write_roc(path: Path, run: Run, labels: np.ndarray, probabilities: np.ndarray, metrics: dict[str, Any]) -> None:
    from acmil.figures import roc_figure

    shown = [1] if len(run.classes) == 2 else range(len(run.classes))
    curves = {}
    for index in shown:
        truth = (labels == index).astype(int)
        if 0 < truth.sum() < len(truth):
            curve = roc_points(truth, probabilities[:, index])
            rest = run.classes[0] if len(run.classes) == 2 else "the rest"
            curves[f"{run.classes[index]} against {rest}"] = (curve.false_positive_rate, curve.true_positive_rate)
    if not curves:
        logger.warning("no ROC curve: the slides are all of one class")
        return
    note = f"{len(labels)} slides; 95 % interval by bootstrap over cases"
    roc_figure(curves, title=_describe_auroc(metrics), note=note).savefig(path, dpi=_DPI)


def _describe_auroc(metrics: dict[str, Any]) -> str:
    auroc = metrics["auroc"]
    return f"AUROC {auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]"
