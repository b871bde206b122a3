"""A run folder read back: the model, what it was trained on, and predictions that respect both."""

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from acmil.bags import Bag, pack
from acmil.checkpoint import load_weights
from acmil.cohort import Cohort, CohortError, CohortRow, read_cohort
from acmil.models import MILModel, MILOutput, create_model
from acmil.preprocessing.devices import choose_device
from acmil.preprocessing.feature_file import UNKNOWN_PX

if TYPE_CHECKING:
    from acmil.preprocessing.feature_file import FeatureMeta

logger = logging.getLogger(__name__)

_RESOLUTION_TOLERANCE = 0.02
_USED = ("train", "val")  # splits
_DESCRIPTION = (  # of model.json
    "model", "options", "classes", "encoder", "encoder_digest", "tile_px", "tile_mpp", "n_slides"
)  # fmt: skip


class RunError(ValueError):
    """A run folder that cannot be read, resumed, or used with these features."""


class BagPrediction(NamedTuple):
    """What a model says of one bag.

    Attributes:
        probabilities: (C,) float64, sums to 1.
        attention: (K, N) float64, each row sums to 1.
        hidden: (N, L) float32, the model's instance features.
    """

    probabilities: np.ndarray
    attention: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Run:
    """A trained model with what is needed to use it rightly."""

    folder: Path
    model: MILModel
    classes: tuple[str, ...]
    encoder: str
    encoder_digest: str
    tile_mpp: tuple[float, float]  # the finest and the coarsest that it was trained on
    tile_px: int
    splits: Mapping[str, str]  # slide_id -> split
    case_splits: Mapping[str, str]  # case_id -> split
    has_cases: bool  # whether its cohort said whose a slide is
    device: torch.device

    @torch.inference_mode()
    def probabilities(self, bag: Bag) -> np.ndarray:
        """Predict one bag, without masking: (C,) float64, as `predict`, and less to copy from a GPU."""
        return self.model(pack([bag], device=self.device).features).logits[0].double().softmax(-1).cpu().numpy()

    @torch.inference_mode()
    def predict(self, bag: Bag) -> BagPrediction:
        """Predict one bag, without masking."""
        features = pack([bag], device=self.device).features  # (N, D)
        out: MILOutput = self.model(features)
        if out.attention is None:
            raise RunError(f"the model of {self.folder} has no attention.")
        return BagPrediction(
            probabilities=out.logits[0].double().softmax(-1).cpu().numpy(),
            attention=out.attention.double().cpu().numpy(),
            hidden=self.model.hidden(features).float().cpu().numpy(),
        )

    def check_features(self, metas: Iterable["FeatureMeta"], *, force: bool = False) -> str | None:
        """Refuse features of another encoder or resolution than the model was trained on.

        What is not known, as in converted files, agrees with any.

        Returns:
            What differs, if `force` let it pass.

        Raises:
            RunError: If encoder, its weights, tile size or resolution (by more than 2 % from those of the training
                slides) differ and `force` is off.
        """
        texts = [
            f"features of slide '{meta.slide_id}' do not fit the model of {self.folder}: {'; '.join(differences)}."
            for meta in metas
            if (differences := list(self._differences(meta)))
        ]
        if not texts:
            return None
        if not force:
            raise RunError(f"{texts[0]} Embed the slide with the model's encoder, or go on with --force.")
        forced = texts[0] if len(texts) == 1 else f"{texts[0]} Nor do those of {len(texts) - 1} more slides."
        logger.warning("%s Going on, as asked.", forced)
        return forced

    def tell_of_unknown_encoders(self, metas: Sequence["FeatureMeta"]) -> None:
        """Log where it cannot be checked that features are of the model's encoder."""
        unknown = [meta.slide_id for meta in metas if not (meta.encoder and self.encoder)]
        if unknown:
            slides = f"of {len(unknown)} of {len(metas)} slides, first '{unknown[0]}',"
            whose = slides if self.encoder else "of the model"
            logger.warning("the encoder %s is not known: nothing checks that features and model are of one", whose)

    def _differences(self, meta: "FeatureMeta") -> Iterator[str]:
        """What sets features apart from those that the model was trained on."""
        for name, theirs, ours in (
            ("encoder", meta.encoder, self.encoder),
            ("encoder weights", meta.encoder_digest[:12], self.encoder_digest[:12]),
            ("tile size in pixels", meta.tile_px, self.tile_px),
        ):
            if not _agree(theirs, ours):
                yield f"{name} {theirs!r}, trained on {ours!r}"
        finest, coarsest = self.tile_mpp
        in_range = finest / (1 + _RESOLUTION_TOLERANCE) <= meta.tile_mpp <= coarsest * (1 + _RESOLUTION_TOLERANCE)
        if not in_range and not (math.isnan(meta.tile_mpp) or math.isnan(finest)):  # both are known
            trained = f"{finest:.4g}" if finest == coarsest else f"{finest:.4g} to {coarsest:.4g}"
            yield f"µm per pixel {meta.tile_mpp:.4g}, trained on {trained}"

    def select(self, cohort: Cohort, split: str) -> Cohort:
        """Choose the slides of a cohort by what this run did with their cases.

        Args:
            cohort: The cohort.
            split: `train`, `val` or `test` of this run; `held-out`: every case neither trained nor selected on, by the
                cases of the run and by those of the cohort; `all`.

        Returns:
            The slides, each with the split that the run had its slide or its case in, or None.

        Raises:
            CohortError: If no slide is left.
        """
        if self.has_cases and not cohort.has_cases:
            logger.warning(
                "%s has no case_id, as the run's cohort had: new slides of patients it trained on are not told apart",
                cohort.path,
            )
        rows = [
            row.with_split(self.splits.get(row.slide_id) or self.case_splits.get(row.case_id)) for row in cohort.rows
        ]
        used = {row.case_id for row in rows if row.split in _USED}  # the cohort may know more of whose a slide is
        seen = [row for row in rows if row.case_id in used]
        if split == "held-out":
            rows = [row for row in rows if row.case_id not in used]
            self._say_what_is_left_out(len(rows), seen)
        elif split == "all":
            if seen:
                logger.warning(
                    "%d of %d slides are of cases used in training or selection: these figures flatter the model",
                    len(seen),
                    len(rows),
                )
        else:
            rows = [row for row in rows if row.split == split]
            if split in _USED and rows:
                how = "the model was trained on" if split == "train" else "chose the epoch"
                logger.warning("these are the slides that %s: the figures flatter the model", how)
        if not rows:
            raise CohortError(
                f"no slide of {cohort.path} is in '{split}' of {self.folder}. "
                "Choose another --split, or another cohort."
            )
        return Cohort(rows=tuple(rows), has_cases=cohort.has_cases, path=cohort.path)

    def _say_what_is_left_out(self, n_left: int, seen: Sequence[CohortRow]) -> None:
        logger.info("%d slides held out; %d left out, since this run used their cases", n_left, len(seen))
        new = [row for row in seen if row.slide_id not in self.splits]
        if new:
            logger.warning(
                "%d of the slides left out are new to the run, which used their cases, the first is '%s' of case '%s'. "
                "If these are other patients, give them other case ids",
                len(new),
                new[0].slide_id,
                new[0].case_id,
            )
        moved = [row for row in seen if self.splits.get(row.slide_id) == "test"]
        if moved:
            logger.warning(
                "%d test slides of the run are left out: by this cohort they are of cases that it used, the first is "
                "'%s' of case '%s'",
                len(moved),
                moved[0].slide_id,
                moved[0].case_id,
            )


def _agree(theirs: str | int, ours: str | int) -> bool:
    return theirs == ours or not {theirs, ours}.isdisjoint({"", UNKNOWN_PX})


def load_run(folder: Path | str, *, device: str = "auto") -> Run:
    """Read a run folder back.

    Raises:
        RunError: If it is not a finished run folder, or its model.json is damaged.
        WeightsError: If the weights do not fit the model that `model.json` describes.
    """
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ("model.json", "model.safetensors", "splits.csv")):
        if (folder / "splits.csv").is_file():
            hint = "Its training is not finished: run `acmil train` again to resume it."
        elif (folder / "folds.csv").is_file():
            hint = "It is of `acmil crossval`: give one of its run folders, such as fold_0/seed_0 in it."
        else:
            hint = "Give the --out folder of `acmil train`."
        raise RunError(
            f"{folder} is not a finished run folder (it needs model.json, model.safetensors and splits.csv). {hint}"
        )
    description = _read_description(folder / "model.json")
    model = create_model(description["model"], **description["options"])
    load_weights(folder / "model.safetensors", model)
    rows = _read_splits(folder / "splits.csv", description["n_slides"])
    chosen = choose_device(device)
    return Run(
        folder=folder,
        model=model.to(chosen).eval(),
        classes=tuple(description["classes"]),
        encoder=description["encoder"],
        encoder_digest=description["encoder_digest"],
        tile_mpp=tuple(description["tile_mpp"] or (math.nan, math.nan)),
        tile_px=description["tile_px"],
        splits={row.slide_id: str(row.split) for row in rows},
        case_splits={row.case_id: str(row.split) for row in rows},
        has_cases=any(row.case_id != row.slide_id for row in rows),
        device=chosen,
    )


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: not valid JSON ({error}). Copy the run again.") from error
    missing = [name for name in _DESCRIPTION if name not in description]
    if missing:
        raise RunError(f"{path} must hold {', '.join(_DESCRIPTION)}, missing {', '.join(missing)}. Copy the run again.")
    return description


def _read_splits(path: Path, n_slides: Mapping[str, int]) -> tuple[CohortRow, ...]:
    """The slides of a run, all of them: one that is lost would be taken for one that the run has never seen."""
    try:
        cohort = read_cohort(path)
    except CohortError as error:
        raise RunError(f"{path} is damaged: {error} Copy the run again.") from error
    found = Counter(row.split for row in cohort.rows)
    if found != Counter(n_slides) or not cohort.has_cases:
        raise RunError(
            f"{path} must list the slides and cases that the run was trained on, {dict(n_slides)}, got {dict(found)}. "
            "Copy the run again."
        )
    return cohort.rows


def write_predictions(path: Path, rows: Sequence[CohortRow], probabilities: np.ndarray, classes: Sequence[str]) -> None:
    """Write predictions.csv: slide_id, case_id, split, label, prediction, probability of each class (S, C)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["slide_id", "case_id", "split", "label", "prediction", *(f"probability_{name}" for name in classes)]
        )
        for row, values in zip(rows, probabilities, strict=True):
            writer.writerow(
                [
                    row.slide_id,
                    row.case_id,
                    row.split or "",
                    row.label or "",
                    classes[int(values.argmax())],
                    *map(repr, values.tolist()),  # as they are: rounded ones are equal where these are not
                ]
            )
