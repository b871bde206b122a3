"""One training run: from a cohort and its features to a run folder."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml

from acmil import environment
from acmil.bags import BagDataset
from acmil.checkpoint import load_state, save_state, save_weights
from acmil.cohort import SPLITS, Cohort, CohortRow, read_cohort
from acmil.json_file import write_json
from acmil.metrics import classification_metrics, describe_metrics, metrics_with_intervals
from acmil.models import MILModel, create_model
from acmil.preprocessing.atomic import write_text
from acmil.preprocessing.devices import choose_device
from acmil.preprocessing.output_folder import make_output_folder
from acmil.runs import RunError, load_run, write_predictions
from acmil.splits import assign_splits, check_splits, write_splits
from acmil.training import EpochRecord, FitResult, fit

if TYPE_CHECKING:
    from acmil.config import TrainConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

_WHERE_ONLY = {"out", "device"}  # options that may differ between a run and its resumption


class RunSummary(NamedTuple):
    """What `acmil train` leaves."""

    folder: Path
    metrics: dict[str, Any]
    epochs: int
    seconds: float

    def __str__(self) -> str:
        selected = f"epoch {self.metrics['selected_epoch']} of {self.epochs} selected"
        lines = [f"{self.folder}: {selected}, {self.seconds:.0f} s of training"]
        lines += [
            f"  {split}: {describe_metrics(self.metrics[split])}" for split in ("val", "test") if split in self.metrics
        ]
        return "\n".join(lines)


def train(config: "TrainConfig", *, progress: "Progress | None" = None) -> RunSummary:
    """Train one model and write its run folder; an unfinished run of the same options is resumed.

    Raises:
        CohortError: If the cohort cannot be used.
        RunError: If the folder holds a run of other options.
    """
    cohort = _split_cohort(config)
    bags = {
        split: _bags(config.features, cohort, split)
        for split in SPLITS
        if any(row.split == split for row in cohort.rows)
    }
    device = choose_device(config.device)
    state = _resume(config, cohort)
    _write_inputs(config, cohort, bags["train"])
    model = build_model(config, in_features=bags["train"].n_features, n_classes=len(cohort.classes))
    if progress:
        progress.begin(f"training {config.model}", config.epochs)
    with _History(config.out, n_epochs_done=len(state["history"]) if state else 0) as history:

        def on_epoch(record: EpochRecord) -> None:
            history.add(record)
            if progress:
                progress.advance(1, note=f"val auroc {record.val.get('auroc', float('nan')):.3f}")

        result = fit(
            model,
            bags["train"],
            bags["val"],
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            min_learning_rate=config.min_learning_rate,
            warmup_epochs=config.warmup_epochs,
            weight_decay=config.weight_decay,
            seed=config.seed,
            device=device,
            score=classification_metrics,
            on_epoch=on_epoch,
            state=state,
            checkpoint=lambda new_state: save_state(config.out / "state.pt", new_state),
        )
    if progress:
        progress.end()
    metrics = _write_results(config, cohort, bags, model, result)
    return RunSummary(config.out, metrics, config.epochs, sum(record.seconds for record in result.history))


def build_model(config: "TrainConfig", *, in_features: int, n_classes: int) -> MILModel:
    """Create the model of a config with weights drawn from its seed, leaving the global generator as it was."""
    options = (
        {"attention_features": config.attention_features}
        if config.model == "acmil_ga"
        else {"n_heads": config.n_heads, "dropout": config.dropout}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return create_model(
            config.model,
            in_features=in_features,
            n_classes=n_classes,
            n_branches=config.n_branches,
            mask_top_k=config.mask_top_k,
            mask_ratio=config.mask_ratio,
            hidden_features=config.hidden_features,
            **options,
        )


class _History:
    """history.csv and TensorBoard events, one row an epoch, kept whole when a run is resumed."""

    def __init__(self, folder: Path, *, n_epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "history.csv"
        self._keep = n_epochs_done
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=n_epochs_done)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "_History":
        if self._keep and self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                self._rows = list(csv.DictReader(file))[: self._keep]
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def add(self, record: EpochRecord) -> None:
        row = record.as_row()
        self._rows.append(row)
        for name, value in row.items():
            if name != "epoch":
                self._events.add_scalar(name, value, record.epoch)
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self._rows)


def _split_cohort(config: "TrainConfig") -> Cohort:
    cohort = read_cohort(config.cohort)
    if all(row.split is None for row in cohort.rows):
        cohort = assign_splits(
            cohort, val_fraction=config.val_fraction, test_fraction=config.test_fraction, seed=config.split_seed
        )
    check_splits(cohort)
    return cohort


def _bags(features: Path, cohort: Cohort, split: str) -> BagDataset:
    return BagDataset(features, [row for row in cohort.rows if row.split == split], classes=cohort.classes)


def _resume(config: "TrainConfig", cohort: Cohort) -> dict[str, Any] | None:
    """The state of an unfinished run of the same options in the run folder, if there is one."""
    if not (config.out / "config.yaml").is_file():
        return None
    before = _options_of(config.out / "config.yaml")
    now = config.model_dump(mode="json")
    changed = [
        f"{key}: {before.get(key)} → {now[key]}"
        for key in now
        if key not in _WHERE_ONLY and before.get(key) != now[key]
    ]
    if changed:
        raise RunError(
            f"{config.out} holds a run of other options ({'; '.join(changed)}). Give another --out, or delete it."
        )
    if (config.out / "splits.csv").is_file() and read_cohort(config.out / "splits.csv").rows != cohort.rows:
        raise RunError(
            f"{config.out} holds a run on other slides or splits than {cohort.path} has now. Give another --out."
        )
    if not (config.out / "state.pt").is_file():
        return None
    state = load_state(config.out / "state.pt")
    logger.info("resuming %s after epoch %d of %d", config.out, len(state["history"]), config.epochs)
    return state


def _options_of(path: Path) -> dict[str, Any]:
    """The options in the config.yaml of a run folder; other commands' folders have a file of that name as well."""
    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunError(f"{path} is damaged: not valid YAML. Give another --out, or delete that folder.") from error
    options = description.get("options") if isinstance(description, dict) else None
    if not isinstance(options, dict) or "cohort" not in options:
        raise RunError(f"--out must be a folder of its own, {path} is not that of a training run. Give another --out.")
    return options


def _write_inputs(config: "TrainConfig", cohort: Cohort, bags: BagDataset) -> None:
    make_output_folder(config.out)
    description = {"options": config.model_dump(mode="json"), **environment.describe()}
    write_text(config.out / "config.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    write_splits(config.out / "splits.csv", cohort)


def _write_results(
    config: "TrainConfig", cohort: Cohort, bags: Mapping[str, BagDataset], model: MILModel, result: FitResult
) -> dict[str, Any]:
    """Weights, model.json, predictions of every split, metrics of val and test, all of the selected epoch."""
    model.load_state_dict(result.last_weights)
    save_weights(config.out / "last.safetensors", model)
    model.load_state_dict(result.best_weights)
    save_weights(config.out / "model.safetensors", model)
    meta = bags["train"].metas[0]
    description = {
        "model": model.name,
        "options": model.options,
        "classes": list(cohort.classes),
        "selected_epoch": result.best_epoch,
        "encoder": meta.encoder,
        "encoder_digest": meta.encoder_digest,
        "tile_px": meta.tile_px,
        "tile_mpp": meta.tile_mpp,
    }
    write_json(config.out / "model.json", description)
    run = load_run(config.out, device=config.device)
    metrics: dict[str, Any] = {"selected_epoch": result.best_epoch}
    rows: list[CohortRow] = []
    probabilities: list[np.ndarray] = []
    for split, dataset in bags.items():
        predicted = np.stack([run.predict(bag).probabilities for bag in dataset])  # (S, C)
        split_rows = [row for row in cohort.rows if row.split == split]
        rows += split_rows
        probabilities.append(predicted)
        if split != "train":
            metrics[split] = metrics_with_intervals(
                [cohort.classes.index(str(row.label)) for row in split_rows],
                predicted,
                [row.case_id for row in split_rows],
                samples=config.bootstrap_samples,
                seed=config.seed,
            )
    write_predictions(config.out / "predictions.csv", rows, np.concatenate(probabilities), cohort.classes)
    write_json(config.out / "metrics.json", metrics)
    return metrics
