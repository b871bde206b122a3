"""Metrics: equal to scikit-learn's; intervals that cover what they should."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from acmil.metrics import (
    METRICS,
    bootstrap_by_case,
    class_metrics,
    classification_metrics,
    confusion_matrix,
    describe_metrics,
    few_cases,
    metrics_with_intervals,
    roc_points,
)


def example(n_slides: int, n_classes: int, seed: int, decimals: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Labels in which every class occurs, and probabilities that know something of them; few decimals make ties."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), generator.integers(n_classes, size=n_slides - n_classes)])
    logits = generator.normal(size=(n_slides, n_classes)) + 0.8 * np.eye(n_classes)[labels]
    logits = logits.round(decimals)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


def of_sklearn(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    predictions = probabilities.argmax(axis=1)
    if probabilities.shape[1] == 2:
        auroc = sklearn_metrics.roc_auc_score(labels, probabilities[:, 1])
    else:
        auroc = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    return {
        "auroc": auroc,
        "f1_macro": sklearn_metrics.f1_score(labels, predictions, average="macro"),
        "f1_micro": sklearn_metrics.f1_score(labels, predictions, average="micro"),
        "accuracy": sklearn_metrics.accuracy_score(labels, predictions),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predictions),
        "loss": sklearn_metrics.log_loss(labels, probabilities, labels=range(probabilities.shape[1])),
    }


@given(st.integers(2, 5), st.integers(0, 60), st.integers(0, 2**32), st.sampled_from([0, 1, 6]))
def test_equal_to_sklearn_ties_included(n_classes: int, n_more: int, seed: int, decimals: int) -> None:
    labels, probabilities = example(n_classes + n_more, n_classes, seed, decimals)
    expected = of_sklearn(labels, probabilities)
    found = classification_metrics(labels, probabilities)
    assert tuple(found) == METRICS
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name


def test_by_hand() -> None:
    labels = [0, 0, 1, 1, 1]
    positive = np.array([0.1, 0.6, 0.6, 0.8, 0.3])
    found = classification_metrics(labels, np.stack([1 - positive, positive], axis=1))
    assert found["auroc"] == pytest.approx((1.5 + 2 + 1) / 6)  # 0.6 beats 0.1 and ties 0.6, 0.8 beats both, 0.3 one
    assert found["accuracy"] == found["f1_micro"] == pytest.approx(3 / 5)
    assert found["f1_macro"] == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.6, 0.8, 0.3]).mean())


def test_absent_class_gives_nan_auroc_and_the_rest_stays() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    found = classification_metrics([0, 1, 1], probabilities)
    assert math.isnan(found["auroc"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert math.isnan(classification_metrics([1, 1], probabilities[:2, :2] / 0.9)["auroc"])
    interval = bootstrap_by_case([0, 1, 1], probabilities, ["a", "b", "c"], samples=50)
    assert all(math.isnan(bound) for bound in interval["auroc"])
    assert not any(math.isnan(bound) for bound in interval["accuracy"])


def test_certain_and_wrong_has_a_finite_loss() -> None:
    found = classification_metrics([0, 1], np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert found["loss"] == pytest.approx(-np.log(np.finfo(float).eps) / 2)


def test_classes_one_by_one() -> None:
    labels, probabilities = example(80, 3, seed=4)
    predictions = probabilities.argmax(axis=1)
    for c, found in enumerate(class_metrics(labels, probabilities)):
        truth, called = labels == c, predictions == c
        assert found["slides"] == truth.sum()
        assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, probabilities[:, c]))
        assert found["sensitivity"] == pytest.approx(called[truth].mean())
        assert found["specificity"] == pytest.approx((~called)[~truth].mean())
        assert found["precision"] == pytest.approx(truth[called].mean())
        assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, called))


def test_confusion_matrix_has_labels_as_rows() -> None:
    labels, predictions = [0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 2]
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, 4), expected)


def test_roc_points() -> None:
    labels, probabilities = example(50, 2, seed=1, decimals=1)
    curve = roc_points(labels, probabilities[:, 1])
    rates = (curve.false_positive_rate, curve.true_positive_rate)
    assert [rate[0] for rate in rates] == [0, 0]
    assert [rate[-1] for rate in rates] == [1, 1]
    area = (np.diff(rates[0]) * (rates[1][1:] + rates[1][:-1]) / 2).sum()
    assert area == pytest.approx(classification_metrics(labels, probabilities)["auroc"])
    assert curve.thresholds[0] == np.inf
    with pytest.raises(ValueError, match="both classes, got 2 of 2 positive"):
        roc_points([1, 1], [0.2, 0.3])


@pytest.mark.parametrize(
    ("labels", "probabilities", "said"),
    [
        ([0, 1], [[0.5, 0.5]], r"got \(2,\) and \(1, 2\)"),
        ([0], [[1.0]], r"got \(1,\) and \(1, 1\)"),
        (np.zeros(0, dtype=int), np.zeros((0, 2)), "at least 1 slide"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], r"integers in \[0, 2\), got \[0, 2\]"),
        ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], "labels must be integers"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "finite and not negative"),
        ([0, 1], [[3.0, -2.0], [0.5, 0.5]], "finite and not negative"),
        ([0, 1], [[3.0, 2.0], [0.5, 0.5]], "sum to 1"),
    ],
)
def test_refusals(labels: list, probabilities: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classification_metrics(labels, probabilities)


def test_bootstrap_options_are_checked() -> None:
    labels, probabilities = example(10, 2, seed=0)
    with pytest.raises(ValueError, match="one a slide"):
        bootstrap_by_case(labels, probabilities, ["a"])
    with pytest.raises(ValueError, match="got 10 and 1"):
        bootstrap_by_case(labels, probabilities, range(10), samples=10, level=1.0)


def slow_bootstrap(labels: np.ndarray, probabilities: np.ndarray, cases: np.ndarray, samples: int) -> dict[str, list]:
    """The definition, spelled out: rows of the drawn cases, one sample after another, figures by scikit-learn."""
    generator = np.random.default_rng(99)
    groups: dict[tuple, list] = {}
    for case in np.unique(cases):
        groups.setdefault(tuple(np.unique(labels[cases == case])), []).append(case)
    values: dict[str, list] = {name: [] for name in METRICS}
    within_classes = {"auroc", "balanced_accuracy"}
    for of_groups, names in ((list(groups.values()), within_classes), ([list(np.unique(cases))], set(METRICS))):
        for _ in range(samples):
            drawn = np.concatenate([generator.choice(members, size=len(members)) for members in of_groups])
            rows = np.concatenate([np.flatnonzero(cases == case) for case in drawn])
            for name, value in of_sklearn(labels[rows], probabilities[rows]).items():
                if name in names - (within_classes if len(of_groups) == 1 else set()):
                    values[name].append(value)
    return values


@pytest.mark.parametrize("n_classes", [2, 3])
def test_bootstrap_agrees_with_its_definition(n_classes: int) -> None:
    labels, probabilities = example(90, n_classes, seed=7)
    cases = np.random.default_rng(8).integers(40, size=90)
    slow = slow_bootstrap(labels, probabilities, cases, samples=250)
    fast = bootstrap_by_case(labels, probabilities, cases, samples=4000, seed=1)
    for name in METRICS:
        low, high = np.quantile(slow[name], (0.025, 0.975))
        spread = np.std(slow[name])
        assert fast[name][0] == pytest.approx(low, abs=0.5 * spread), name  # Monte-Carlo error of 250 samples
        assert fast[name][1] == pytest.approx(high, abs=0.5 * spread), name


def test_bootstrap_is_fixed_by_its_seed_and_not_by_the_names_of_cases() -> None:
    labels, probabilities = example(60, 2, seed=3)
    cases = np.arange(60) // 2
    first = bootstrap_by_case(labels, probabilities, cases, seed=5)
    assert first == bootstrap_by_case(labels, probabilities, [f"p{case:02d}" for case in cases], seed=5)
    assert first != bootstrap_by_case(labels, probabilities, cases, seed=6)
    for name, value in classification_metrics(labels, probabilities).items():
        assert first[name][0] < value < first[name][1]


def test_slides_of_one_case_count_once() -> None:
    """Four copies of every slide add no information: the interval stays, where drawing slides would halve it."""
    labels, probabilities = example(40, 2, seed=2)
    once = bootstrap_by_case(labels, probabilities, np.arange(40), samples=2000)
    copies = np.tile(np.arange(40), 4)
    repeated = bootstrap_by_case(labels[copies], probabilities[copies], copies, samples=2000)
    independent = bootstrap_by_case(labels[copies], probabilities[copies], np.arange(160), samples=2000)
    assert repeated["auroc"] == pytest.approx(once["auroc"])
    width = {key: value["loss"][1] - value["loss"][0] for key, value in (("once", once), ("apart", independent))}
    assert width["apart"] == pytest.approx(width["once"] / 2, rel=0.1)


def test_wider_level_gives_wider_interval() -> None:
    labels, probabilities = example(60, 2, seed=3)
    narrow, wide = (bootstrap_by_case(labels, probabilities, range(60), level=level)["auroc"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_rare_class_is_in_every_sample() -> None:
    labels = np.array([1] * 3 + [0] * 40)
    probabilities = np.stack([np.linspace(0, 1, 43), 1 - np.linspace(0, 1, 43)], axis=1)
    assert bootstrap_by_case(labels, probabilities, np.arange(43))["auroc"] == (1.0, 1.0)


def coverage(n_cases: int, *, shift: float, truth: float, level: float) -> float:
    """In which share of cohorts of normal scores, some sd apart, an interval holds the true AUROC, Φ(shift/√2)."""
    hits, n_cohorts = 0, 200
    for seed in range(n_cohorts):
        generator = np.random.default_rng(seed)
        labels = np.repeat([0, 1], n_cases)
        scores = 1 / (1 + np.exp(-generator.normal(size=2 * n_cases) - shift * labels))
        probabilities = np.stack([1 - scores, scores], axis=1)
        low, high = bootstrap_by_case(labels, probabilities, np.arange(2 * n_cases), samples=300, level=level)["auroc"]
        hits += low <= truth <= high
    return hits / n_cohorts


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    assert coverage(50, shift=1.0, truth=0.7602, level=0.9) == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize(("n_cases", "share"), [(2, 0.42), (5, 0.87), (10, 0.92)])
def test_interval_of_few_cases_covers_it_less_often(n_cases: int, share: float) -> None:
    assert coverage(n_cases, shift=1.1902, truth=0.8, level=0.95) == pytest.approx(share, abs=0.05)


def test_few_cases_are_named() -> None:
    labels = ["normal"] * 12 + ["tumor"] * 12
    cases = [f"n{i}" for i in range(12)] + [f"t{i % 9}" for i in range(12)]  # three cases with two slides each
    assert few_cases(labels, cases) is not None
    assert few_cases(labels, cases).endswith("10 cases or more of each class, there are tumor 9")
    assert few_cases(labels[:10] + labels[12:22], [*cases[:10], *(f"t{i}" for i in range(10))]) is None
    assert few_cases([], []) is None


def test_thousand_samples_of_400_slides_take_no_time() -> None:
    labels, probabilities = example(400, 4, seed=0)
    start = time.perf_counter()
    bootstrap_by_case(labels, probabilities, np.arange(400))
    assert time.perf_counter() - start < 3


def test_metrics_with_intervals_and_their_description() -> None:
    labels, probabilities = example(50, 2, seed=11)
    found = metrics_with_intervals(labels.tolist(), probabilities, list(range(50)), samples=200, seed=3)
    plain = classification_metrics(labels, probabilities)
    intervals = bootstrap_by_case(labels, probabilities, range(50), samples=200, seed=3)
    assert {name: entry["value"] for name, entry in found.items()} == plain
    assert {name: (entry["low"], entry["high"]) for name, entry in found.items()} == intervals
    line = describe_metrics(found)
    assert line.startswith(f"AUROC {plain['auroc']:.3f} [{intervals['auroc'][0]:.3f}, ")
    assert f"macro F1 {plain['f1_macro']:.3f}" in line


def test_the_interval_of_the_accuracy_of_one_answer_for_all_is_that_of_the_share_of_its_class() -> None:
    """Drawn within classes every sample would have the same accuracy: an interval without width."""
    labels = np.repeat([0, 1], [40, 20])
    low, high = bootstrap_by_case(labels, np.tile([0.9, 0.1], (60, 1)), np.arange(60), samples=4000)["accuracy"]
    assert low == pytest.approx(2 / 3 - 1.96 * (2 / 9 / 60) ** 0.5, abs=0.03)
    assert high == pytest.approx(2 / 3 + 1.96 * (2 / 9 / 60) ** 0.5, abs=0.03)
