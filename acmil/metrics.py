"""Figures of merit of a classifier, with bootstrap intervals over patients.

All figures are computed from weighted slides, one row of weights a bootstrap sample, so that a thousand samples are a
few array operations; the plain figures are those of weights that are all 1.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

METRICS = ("auroc", "f1_macro", "f1_micro", "accuracy", "balanced_accuracy", "loss")

TITLES = {"auroc": "AUROC", "f1_macro": "macro F1", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}
_WITHIN_CLASSES = ("auroc", "balanced_accuracy")  # figures that need a case of each class, whatever the classes' shares
FEW_CASES = 10  # of a class: with fewer a bootstrap interval is too narrow to be believed
_SAMPLES_AT_ONCE = 256  # bounds the memory of the bootstrap: this many weights a slide


@dataclass(frozen=True, eq=False)
class RocCurve:
    """A receiver operating characteristic.

    Attributes:
        false_positive_rate: (M,) rising from 0 to 1.
        true_positive_rate: (M,) rising from 0 to 1.
        thresholds: (M,) falling; a point counts scores at or above its threshold as positive; the first is infinite.
    """

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    thresholds: np.ndarray


def classification_metrics(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    r"""Compute the figures of merit of predicted probabilities.

    - `auroc`: area under the ROC curve, ties counting half; two classes: of class 1; more: mean over the classes, each
      against the rest. NaN when a class is absent from `labels`.
    - `f1_macro`: mean of \(F_1 = 2\,TP / (2\,TP + FP + FN)\) over the classes which occur in labels or predictions.
    - `f1_micro`: F1 of the pooled counts. With one label a slide it **equals accuracy**: published "F1" figures that
      equal the accuracy beside them are this one, and are not comparable with `f1_macro`.
    - `accuracy`: share of slides whose most probable class is their label (of equal ones, the first).
    - `balanced_accuracy`: mean sensitivity of the classes which occur in `labels`.
    - `loss`: cross entropy \(-\frac1S \sum_s \log p_{s, y_s}\) in nats, p no smaller than the double-precision epsilon.

    Args:
        labels: (S,) integers in [0, C).
        probabilities: (S, C), rows sum to 1.

    Returns:
        The figures, by the names in `METRICS`.

    Raises:
        ValueError: If shapes or values are not as described.
    """
    labels, probabilities = _checked(labels, probabilities)
    values = _weighted_metrics(labels, probabilities, np.ones((1, len(labels))))
    return {name: float(value[0]) for name, value in values.items()}


def class_metrics(labels: ArrayLike, probabilities: ArrayLike) -> list[dict[str, float]]:
    """Compute the figures of each class against the rest.

    Args:
        labels: (S,) integers in [0, C).
        probabilities: (S, C), rows sum to 1.

    Returns:
        For each class: `slides` (how many have it as label), `auroc`, `sensitivity`, `specificity`, `precision`, `f1`;
        NaN where one is not defined.
    """
    labels, probabilities = _checked(labels, probabilities)
    n_classes = probabilities.shape[1]
    counts = confusion_matrix(labels, probabilities.argmax(axis=1), n_classes).astype(float)  # (C, C)
    hits, actual, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)  # (C,) each
    rest = counts.sum() - actual
    columns = {
        "slides": actual,
        "auroc": np.array(
            [_weighted_auroc(labels == c, probabilities[:, c], np.ones((1, len(labels))))[0] for c in range(n_classes)]
        ),
        "sensitivity": _ratio(hits, actual),
        "specificity": _ratio(rest - (predicted - hits), rest),
        "precision": _ratio(hits, predicted),
        "f1": _ratio(2 * hits, actual + predicted),
    }
    return [{name: float(column[c]) for name, column in columns.items()} for c in range(n_classes)]


def bootstrap_by_case(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cases: ArrayLike,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals of the figures of merit, resampling cases.

    Slides of one patient are not independent, so whole cases are drawn, with replacement, each time as many as there
    are. For AUROC and balanced accuracy, which do not depend on the shares of the classes, they are drawn within groups
    of cases which have the same labels, so that every sample has the classes of the cohort and both are defined. The
    other figures do depend on the shares, which another cohort would have others of: for them cases are drawn from all.
    The interval runs between the (1 - level)/2 and (1 + level)/2 quantiles of the samples' figures. With a handful of
    cases in a class it is too narrow (`few_cases` says so), and with one case in a group that case is in every sample.

    Args:
        labels: (S,) integers in [0, C).
        probabilities: (S, C), rows sum to 1.
        cases: (S,) case of each slide: any values that can be compared for equality.
        samples: How many samples are drawn.
        seed: Seed of the draws; the same seed gives the same interval.
        level: Share of the samples inside the interval, in (0, 1).

    Returns:
        (low, high) of each figure of `METRICS`; (NaN, NaN) where the figure is not defined.

    Raises:
        ValueError: If shapes or values are not as described.

    Reference:
        Efron, B. & Tibshirani, R. J. (1993). An Introduction to the Bootstrap, chapters 8 and 13. Chapman & Hall.
    """
    labels, probabilities = _checked(labels, probabilities)
    cases = np.asarray(cases)
    if cases.shape != labels.shape:
        raise ValueError(f"cases must be one a slide, shape {labels.shape}, got {cases.shape}.")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples must be >= 1 and level in (0, 1), got {samples} and {level}.")
    case_of_slide = np.unique(cases, return_inverse=True)[1].reshape(-1)  # (S,)
    groups = _groups_of_cases(labels, case_of_slide)
    everyone = [np.arange(case_of_slide.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        n_draws = min(_SAMPLES_AT_ONCE, samples - start)
        # (R, S) each
        within, free = (_draw_cases(some, n_draws, generator)[:, case_of_slide] for some in (groups, everyone))
        of_shares = _weighted_metrics(labels, probabilities, free, [n for n in METRICS if n not in _WITHIN_CLASSES])
        of_classes = _weighted_metrics(labels, probabilities, within, _WITHIN_CLASSES)
        for name, values in (of_shares | of_classes).items():
            drawn[name].append(values)
    quantiles = ((1 - level) / 2, (1 + level) / 2)
    return {name: _interval(np.concatenate(values), quantiles) for name, values in drawn.items()}


def few_cases(labels: Sequence[str], cases: Sequence[str]) -> str | None:
    """Say which classes have too few cases for the intervals of `bootstrap_by_case` to be believed.

    Of 95 % intervals of the AUROC some 42 % hold the true value with two cases a class, 87 % with five, 92 % with ten
    (normal scores, true AUROC 0.8).

    Args:
        labels: (S,) names of classes.
        cases: (S,) case of each slide.

    Returns:
        A sentence that names the classes with fewer than `FEW_CASES`, or None.
    """
    counts = Counter(label for label, _ in set(zip(labels, cases, strict=True)))
    few = [f"{label} {count}" for label, count in sorted(counts.items()) if count < FEW_CASES]
    if not few:
        return None
    return (
        f"intervals are too narrow to be believed: they ask for {FEW_CASES} cases or more of each class, there are "
        f"{', '.join(few)}"
    )


def metrics_with_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cases: ArrayLike,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict[str, float]]:
    """Put the figures of merit and their intervals together, as `metrics.json` holds them.

    Args:
        labels: (S,) integers in [0, C).
        probabilities: (S, C), rows sum to 1.
        cases: (S,) case of each slide.
        samples: How many bootstrap samples are drawn.
        seed: Seed of the draws.
        level: Share of the samples inside the interval, in (0, 1).

    Returns:
        For each figure of `METRICS` its `value`, `low` and `high`; NaN where the figure is not defined.
    """
    intervals = bootstrap_by_case(labels, probabilities, cases, samples=samples, seed=seed, level=level)
    return {
        name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
        for name, value in classification_metrics(labels, probabilities).items()
    }


def describe_metrics(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Write the main figures of `metrics_with_intervals` in one line.

    >>> describe_metrics({"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}})
    'AUROC 0.900 [0.800, 1.000]'
    """
    return ", ".join(
        f"{title} {metrics[name]['value']:.3f} [{metrics[name]['low']:.3f}, {metrics[name]['high']:.3f}]"
        for name, title in TITLES.items()
        if name in metrics
    )


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, n_classes: int) -> np.ndarray:
    """Count slides by label and prediction.

    Args:
        labels: (S,) integers in [0, C).
        predictions: (S,) integers in [0, C).
        n_classes: C.

    Returns:
        (C, C) int64: row = label, column = prediction.
    """
    pairs = np.asarray(labels, dtype=np.int64) * n_classes + np.asarray(predictions, dtype=np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def roc_points(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
    """Compute the points of the ROC curve.

    Args:
        labels: (S,) of 0 and 1; for one class against the rest pass `labels == c`.
        scores: (S,) higher for class 1.

    Returns:
        The curve's corners, from (0, 0) to (1, 1).

    Raises:
        ValueError: If only one of the two classes is there.
    """
    positive = np.asarray(labels).astype(bool)
    if positive.all() or not positive.any():
        found = f"{positive.sum()} of {positive.size} positive"
        raise ValueError(f"an ROC curve needs slides of both classes, got {found}.")
    from sklearn.metrics import roc_curve

    return RocCurve(*roc_curve(positive, np.asarray(scores, dtype=np.float64)))


def _checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"labels must be (S,) and probabilities (S, C) with C >= 2, got {labels.shape} and {probabilities.shape}."
        )
    n_slides, n_classes = probabilities.shape
    if n_slides == 0:
        raise ValueError("metrics need at least 1 slide, got none.")
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels must be integers in [0, {n_classes}), got {np.unique(labels)[:10].tolist()}.")
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all()):
        raise ValueError("probabilities must be finite and not negative.")
    if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError("each row of probabilities must sum to 1. Apply a softmax to logits first.")
    return labels.astype(np.int64), probabilities


def _weighted_metrics(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, names: Sequence[str] = METRICS
) -> dict[str, np.ndarray]:
    """Figures of `METRICS`, (R,) each, under each row of `weights` (R, S)."""
    n_slides, n_classes = probabilities.shape
    cells = np.zeros((n_slides, n_classes**2))  # one-hot cell of the confusion matrix
    cells[np.arange(n_slides), labels * n_classes + probabilities.argmax(axis=1)] = 1
    counts = (weights @ cells).reshape(-1, n_classes, n_classes)  # (R, label, prediction)
    hits = np.diagonal(counts, axis1=1, axis2=2)  # (R, C)
    actual, predicted, total = counts.sum(axis=2), counts.sum(axis=1), counts.sum(axis=(1, 2))
    accuracy = hits.sum(axis=1) / total
    chosen = probabilities[np.arange(n_slides), labels]  # (S,)
    surprise = -np.log(np.maximum(chosen, np.finfo(np.float64).eps))
    figures = {
        "f1_macro": np.nanmean(_ratio(2 * hits, actual + predicted), axis=1),
        "f1_micro": accuracy,
        "accuracy": accuracy,
        "balanced_accuracy": np.nanmean(_ratio(hits, actual), axis=1),
        "loss": weights @ surprise / total,
    }
    if "auroc" in names:  # which takes most of the time
        figures["auroc"] = _mean_auroc(labels, probabilities, weights)
    return {name: figures[name] for name in METRICS if name in names}


def _mean_auroc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    n_classes = probabilities.shape[1]
    measured = [1] if n_classes == 2 else range(n_classes)
    return np.mean([_weighted_auroc(labels == c, probabilities[:, c], weights) for c in measured], axis=0)


def _weighted_auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability that a positive scores above a negative, ties counting half; NaN without one of the two; (R,)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where a new score begins: (G,)
    above = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)  # (R, G)
    below = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    ranked = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)
    return _ratio(ranked, above.sum(axis=1) * below.sum(axis=1))


def _groups_of_cases(labels: np.ndarray, case_of_slide: np.ndarray) -> list[np.ndarray]:
    """Indices of the cases which have the same set of labels."""
    present = np.zeros((case_of_slide.max() + 1, labels.max() + 1), dtype=bool)  # (cases, C)
    present[case_of_slide, labels] = True
    kind = np.unique(present, axis=0, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(kind == k) for k in range(kind.max() + 1)]


def _draw_cases(groups: list[np.ndarray], n_samples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each case is in each sample: (n_samples, cases)."""
    counts = np.empty((n_samples, sum(map(len, groups))))
    for members in groups:
        size = len(members)
        counts[:, members] = generator.multinomial(size, np.full(size, 1 / size), size=n_samples)
    return counts


def _interval(values: np.ndarray, quantiles: tuple[float, float]) -> tuple[float, float]:
    if np.isnan(values).any():  # a figure which is not defined is so in every sample: each has the cohort's classes
        return float("nan"), float("nan")
    low, high = np.quantile(values, quantiles)
    return float(low), float(high)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)
