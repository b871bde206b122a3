"""What the runs of a cross-validation say together: means, spreads, and pooled predictions of all slides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from acmil.cohort import Cohort
from acmil.metrics import METRICS, TITLES, metrics_with_intervals

MEANING = {
    "mean": "mean over the runs: how well one model, trained on the cases that a fold leaves, does on new cases",
    "sd_folds": "standard deviation over folds of the mean over a fold's seeds: how much it depends on which cases "
    "train and test; folds share training cases, so it gives no confidence interval",
    "sd_seeds": "standard deviation over seeds of the mean over a seed's folds, of seeds with every fold: how much it "
    "depends on the chance in training alone",
    "pooled.one_seed": "test predictions of all slides, each by the one model that did not see it, taken as one test "
    "set, with bootstrap intervals over cases: how well one model does where one threshold serves all folds",
    "pooled.mean_probability": "the same of each slide's mean probability over the seeds: how well the ensemble of "
    "a fold's models does",
}


class SlidePrediction(NamedTuple):
    """The prediction of a slide by the run that tested on it."""

    slide_id: str
    case_id: str
    label: str
    fold: int
    seed: int
    probabilities: tuple[float, ...]  # C


def summarise(
    metrics: Mapping[tuple[int, int], Mapping[str, Any]],
    predictions: Sequence[SlidePrediction],
    cohort: Cohort,
    *,
    n_folds: int,
    n_seeds: int,
    samples: int,
    errors: Mapping[tuple[int, int], str],
    n_kept_out: int = 0,
) -> dict[str, Any]:
    """Put runs together.

    Args:
        metrics: What `metrics.json` holds, of each finished run by (fold, seed).
        predictions: Test predictions of the finished runs.
        cohort: All slides that were dealt into folds.
        n_folds: How many folds there are.
        n_seeds: How many seeds.
        samples: Bootstrap samples behind each interval.
        errors: Why the other runs have no result, by (fold, seed).
        n_kept_out: Slides of the table that took no part.

    Returns:
        What `summary.json` holds. Seeds that lack a fold are in `mean` and `sd_folds` alone.
    """
    complete = [seed for seed in range(n_seeds) if all((fold, seed) in metrics for fold in range(n_folds))]
    by_seed = {seed: _in_order(predictions, seed, cohort) for seed in complete}
    labels = [cohort.classes.index(str(row.label)) for row in cohort.rows]
    cases = [row.case_id for row in cohort.rows]

    def pooled(probabilities: np.ndarray) -> dict[str, dict[str, float]]:
        return metrics_with_intervals(labels, probabilities, cases, samples=samples, seed=0)

    return {
        "folds": n_folds,
        "seeds": n_seeds,
        "runs_done": len(metrics),
        "runs_failed": [{"fold": fold, "seed": seed, "error": error} for (fold, seed), error in sorted(errors.items())],
        "slides": len(cohort.rows),
        "cases": len(set(cases)),
        "slides_kept_out": n_kept_out,
        "classes": list(cohort.classes),
        "complete_seeds": complete,
        **{
            split: {name: _spread(_grid(metrics, split, name, n_folds, n_seeds)) for name in METRICS}
            for split in ("test", "val")
        },
        "pooled": {
            "one_seed": {str(seed): pooled(values) for seed, values in by_seed.items()},
            "mean_probability": pooled(np.mean(list(by_seed.values()), axis=0)) if by_seed else None,
        },
        "meaning": MEANING,
    }


def describe(folder: Path, summary: Mapping[str, Any]) -> str:
    """Write the summary as a table of the test figures."""
    failed, complete = summary["runs_failed"], summary["complete_seeds"]
    kept_out = f", {summary['slides_kept_out']} slides kept out" if summary["slides_kept_out"] else ""
    lines = [
        f"{folder}: {summary['folds']} folds x {summary['seeds']} seeds, {summary['runs_done']} runs done, "
        f"{len(failed)} failed; {summary['slides']} slides of {summary['cases']} cases{kept_out}"
    ]
    header = ["test", "mean", "sd folds", "sd seeds"]
    if complete:
        header += [f"pooled, seed {complete[0]}", f"pooled, mean of {len(complete)} seeds"]
    table = [header]
    for name, title in TITLES.items():
        figures = summary["test"][name]
        row = [title, *(_number(figures[key]) for key in ("mean", "sd_folds", "sd_seeds"))]
        if complete:
            pooled = summary["pooled"]
            row += [_interval(pooled["one_seed"][str(complete[0])][name]), _interval(pooled["mean_probability"][name])]
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    lines += [f"  fold {run['fold']} seed {run['seed']} failed: {run['error']}" for run in failed]
    return "\n".join(lines)


def _grid(
    metrics: Mapping[tuple[int, int], Mapping[str, Any]], split: str, name: str, n_folds: int, n_seeds: int
) -> np.ndarray:
    """One figure of every run, (folds, seeds); NaN where it is not defined or there is no result."""
    values = np.full((n_folds, n_seeds), np.nan)
    for place, found in metrics.items():
        value = found[split][name]["value"]
        values[place] = np.nan if value is None else value
    return values


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviations (n - 1) of a figure (folds, seeds); NaN where there are too few."""
    known = ~np.isnan(values)
    of_folds = np.array([row[there].mean() for row, there in zip(values, known, strict=True) if there.any()])
    of_seeds = values[:, known.all(axis=0)].mean(axis=0)
    return {
        "mean": float(values[known].mean()) if known.any() else np.nan,
        "sd_folds": float(of_folds.std(ddof=1)) if len(of_folds) > 1 else np.nan,
        "sd_seeds": float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else np.nan,
        "runs": int(known.sum()),
    }


def _in_order(predictions: Sequence[SlidePrediction], seed: int, cohort: Cohort) -> np.ndarray:
    """Probabilities (S, C) of one seed in the cohort's order."""
    found = {row.slide_id: row.probabilities for row in predictions if row.seed == seed}
    return np.array([found[row.slide_id] for row in cohort.rows])


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
