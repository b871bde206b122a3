"""What planted truth allows to ask: does attention find the lesions, and does a mean of features tell as much?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from acmil.attention_maps import concentration_curve
from acmil.bags import Bag, BagDataset
from acmil.cohort import Cohort
from acmil.demo.lesion_truth import tile_lesion_fraction
from acmil.runs import Run

LESION_TILE_FRACTION = 0.5  # a tile is lesion when at least half of it lies in an outline, normal when none does


@dataclass(frozen=True)
class Localisation:
    """Attention against the planted outlines, over the positive test slides.

    Attributes:
        auroc: Mean over slides of the tile AUROC of the mean attention: lesion tiles against tiles without any lesion.
        auroc_by_slide: The same, slide by slide; slides without a whole lesion tile are left out.
        hit_rate: Share of slides whose most attended tile touches a lesion.
    """

    auroc: float
    auroc_by_slide: dict[str, float]
    hit_rate: float


def lesion_localisation(run: Run, cohort: Cohort, features: Path, lesions: Path, *, positive: str) -> Localisation:
    """Compare attention with the planted outlines on the test slides that carry lesions."""
    rows = [row for row in cohort.rows if row.split == "test" and row.label == positive]
    bags = BagDataset(features, rows, classes=cohort.classes)
    by_slide, hits = {}, []
    for bag, meta in zip(bags, bags.metas, strict=True):
        attention = run.predict(bag).attention.mean(axis=0)  # (N,)
        share = tile_lesion_fraction(lesions / f"{bag.slide_id}.geojson", bag.coords, meta.tile_level0_px)  # (N,)
        hits.append(bool(share[attention.argmax()] > 0))
        score = tile_auroc(attention, share)
        if score is not None:
            by_slide[bag.slide_id] = score
    return Localisation(float(np.mean(list(by_slide.values()))), by_slide, float(np.mean(hits)))


def tile_auroc(attention: np.ndarray, lesion_share: np.ndarray) -> float | None:
    """AUROC of attention (N,) for lesion tiles against tiles without lesion; tiles in between are left out.

    Returns:
        The AUROC; None where one of the two kinds is missing.
    """
    clear = (lesion_share >= LESION_TILE_FRACTION) | (lesion_share == 0)
    truth = lesion_share[clear] >= LESION_TILE_FRACTION
    if truth.all() or not truth.any():
        return None
    return float(roc_auc_score(truth, attention[clear]))


def mean_pool_auroc(cohort: Cohort, features: Path, *, positive: str) -> float:
    """Test AUROC of logistic regression on the mean of each slide's features: the floor that MIL must clear.

    It is fitted on the training and validation slides together, since it selects nothing.
    """

    def pooled(splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in cohort.rows if row.split in splits]
        bags = BagDataset(features, rows, classes=cohort.classes)
        return np.stack([mean_feature(bag) for bag in bags]), np.array([row.label == positive for row in rows])

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(*pooled(("train", "val")))
    test_features, test_labels = pooled(("test",))
    return float(roc_auc_score(test_labels, model.decision_function(test_features)))


def mean_feature(bag: Bag) -> np.ndarray:
    """Mean of a bag's features: (D,) float64."""
    return np.asarray(bag.features, dtype=np.float64).mean(axis=0)


def concentration_curves(run: Run, cohort: Cohort, features: Path) -> list[np.ndarray]:
    """Attention concentration of each test slide, the paper's own measure (Zhang et al., ECCV 2024).

    Returns:
        For each test slide the cumulative share of its tiles in falling order of attention, (N,), rising to 1.
    """
    bags = BagDataset(features, [row for row in cohort.rows if row.split == "test"], classes=cohort.classes)
    return [concentration_curve(run.predict(bag).attention.mean(axis=0)) for bag in bags]
