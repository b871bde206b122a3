"""One training run: from a cohort and its features to a run folder."""

import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml

from acmil import environment
from acmil.bags import BagDataset
from acmil.checkpoint import load_state, save_state, save_weights
from acmil.cohort import SPLITS, Cohort, CohortRow, describe_classes, read_cohort
from acmil.engine import Engine, TrainingJob, choose_engine, fit_jobs
from acmil.json_file import write_json
from acmil.metrics import classification_metrics, describe_metrics, few_cases, metrics_with_intervals
from acmil.models import MILModel, create_model
from acmil.precision import Precision, choose_precision
from acmil.preprocessing.atomic import write_text
from acmil.preprocessing.devices import choose_device
from acmil.preprocessing.output_folder import make_output_folder
from acmil.runs import RunError, load_run, write_predictions
from acmil.selection import EpochRecord, Selection
from acmil.splits import assign_splits, check_splits, write_splits
from acmil.training import FitResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from acmil.config import TrainConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 10.0  # between two states of a run, as an epoch may take milliseconds

# Options that may differ between a run and its resumption: no weight depends on them.
_WHERE_ONLY = {"out", "device", "mpp_tolerance", "bootstrap_samples"}
_OF_DRAWN_SPLITS = ("val_fraction", "test_fraction", "split_seed")
_BY_WHAT_IT_IS = {"cohort", "features", "precision", "engine"}  # and those compared by what they stand for


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


class Means(NamedTuple):
    """What a run is trained with on this machine."""

    device: torch.device
    precision: Precision
    engine: Engine


@dataclass(frozen=True)
class PreparedRun:
    """A run whose folder and model are made, to be trained by `acmil.engine.fit_jobs` and then finished.

    Attributes:
        config: Its options.
        cohort: Its slides, each with its split.
        bags: Its bags by split.
        origin: What their features are.
        model: What is trained; the job's.
        job: What to train.
        n_epochs_done: Epochs that an earlier attempt left.
        history: Its table of epochs; `close` it if the run fails, `finish_run` does otherwise.
    """

    config: "TrainConfig"
    cohort: Cohort
    bags: Mapping[str, BagDataset]
    origin: Mapping[str, Any]
    model: MILModel
    job: TrainingJob
    n_epochs_done: int
    history: "_History"


def train(config: "TrainConfig", *, progress: "Progress | None" = None) -> RunSummary:
    """Train one model and write its run folder; an unfinished run of the same options is resumed.

    Raises:
        CohortError: If the cohort cannot be used.
        RunError: If the folder holds a run of other options.
    """
    cohort = _split_cohort(config)
    logger.info("%s", describe_classes(cohort))
    for split in ("val", "test"):
        rows = [row for row in cohort.rows if row.split == split]
        if (too_few := few_cases([str(row.label) for row in rows], [row.case_id for row in rows])) is not None:
            logger.warning("%s set: %s", split, too_few)
    bags = BagDataset(config.features, cohort.rows, classes=cohort.classes, mpp_tolerance=config.mpp_tolerance)
    means = choose_means(config, n_features=bags.n_features, n_classes=len(cohort.classes))

    def on_epoch(record: EpochRecord) -> None:
        if progress:
            progress.advance(1, note=f"val auroc {record.val.get('auroc', float('nan')):.3f}")

    run = prepare_run(config, cohort, bags, means, on_epoch=on_epoch)
    if progress:
        progress.begin(f"training {config.model}", config.epochs - run.n_epochs_done)
    try:
        (result,) = fit_jobs([run.job], **means._asdict(), score=classification_metrics)
        if isinstance(result, Exception):
            raise result
    finally:
        run.history.close()
    if progress:
        progress.end()
    return finish_run(run, result)


def choose_means(config: "TrainConfig", *, n_features: int, n_classes: int) -> Means:
    """Choose device, precision and engine for runs of these options, and log why.

    Raises:
        ValueError: If what is asked for cannot be had here.
    """
    device = choose_device(config.device)
    precision, why_precision = choose_precision(config.precision, device)
    model = build_model(config, in_features=n_features, n_classes=n_classes)
    engine, why_engine = choose_engine(
        config.engine, device=device, model=model.name, options=model.options, batch_size=config.batch_size
    )
    logger.info("training on %s in %s: %s", device, precision, why_precision)
    logger.info("engine %s: %s", engine, why_engine)
    return Means(device, precision, engine)


def prepare_run(
    config: "TrainConfig",
    cohort: Cohort,
    bags: BagDataset,
    means: Means,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> PreparedRun:
    """Make a run's folder, model and job; an unfinished run of the same options is gone on with.

    Args:
        config: The run's options.
        cohort: Its slides, each with its split.
        bags: Bags of these slides, and of others if there are; runs may share them.
        means: Of `choose_means`.
        on_epoch: Called after each epoch with its record, once it is in the history.

    Raises:
        RunError: If the folder holds a run of other options, or one begun in another way.
    """
    bags = bags.select(row.slide_id for row in cohort.rows)
    state = _resume(config, cohort, bags, means)
    in_force = {"device": str(means.device), "precision": means.precision, "engine": means.engine}
    _write_inputs(config, cohort, bags, in_force=in_force)
    # Sorted: what a run becomes does not depend on the order of the table.
    slides = {split: sorted(row.slide_id for row in cohort.rows if row.split == split) for split in SPLITS}
    by_split = {split: bags.select(slide_ids) for split, slide_ids in slides.items() if slide_ids}
    model = build_model(config, in_features=bags.n_features, n_classes=len(cohort.classes))
    done = Selection.from_state(state).history if state else []
    history = _History(config.out, done=done)

    def record_epoch(record: EpochRecord) -> None:
        history.add(record)
        if on_epoch:
            on_epoch(record)

    job = TrainingJob(
        model,
        by_split["train"],
        by_split["val"],
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        min_learning_rate=config.min_learning_rate,
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        seed=config.seed,
        batch_size=config.batch_size,
        on_epoch=record_epoch,
        state=state,
        checkpoint=_Checkpoint(config.out / "state.pt", epochs=config.epochs),
    )
    return PreparedRun(config, cohort, by_split, bags.origin, model, job, len(done), history)


def finish_run(run: PreparedRun, result: FitResult) -> RunSummary:
    """Write what training left: history, weights, predictions, metrics."""
    run.history.write()
    run.history.close()
    metrics = _write_results(run, result)
    seconds = sum(record.seconds for record in result.history)
    return RunSummary(run.config.out, metrics, run.config.epochs, seconds)


def is_finished(config: "TrainConfig", cohort: Cohort, bags: BagDataset) -> bool:
    """Whether the run folder holds all that these options lead to, with the slides' bags as they are.

    Raises:
        RunError: If it holds a run of other options, slides or features.
    """
    _refuse_another_run(config, cohort, bags.select(row.slide_id for row in cohort.rows))
    return (config.out / "metrics.json").is_file()  # written last


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
    """history.csv and TensorBoard events, one row an epoch; `done` are those of the state that a run goes on from."""

    def __init__(self, folder: Path, *, done: Sequence[EpochRecord]) -> None:
        self._folder, self._n_done = folder, len(done)
        self._events: SummaryWriter | None = None  # made with the first epoch: many runs may wait for their turn
        self._rows: list[dict[str, Any]] = [record.as_row() for record in done]

    def add(self, record: EpochRecord) -> None:
        if self._events is None:
            self._events = self._begin()
        row = record.as_row()
        self._rows.append(row)
        for name, value in row.items():
            if name != "epoch":
                self._events.add_scalar(name, value, record.epoch)
        self.write()

    def write(self) -> None:
        """Write the table of all epochs, those of the state among them: a kill may have come between the two."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(self._rows[0]))
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._folder / "history.csv", table.getvalue())

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _begin(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._n_done)


class _Checkpoint:
    """Writes a run's state now and then, and after its last epoch."""

    def __init__(self, path: Path, *, epochs: int) -> None:
        self._path, self._epochs, self._written = path, epochs, time.monotonic()

    def __call__(self, state: Mapping[str, Any]) -> None:
        is_last = len(state["history"]) >= self._epochs
        if is_last or time.monotonic() - self._written >= CHECKPOINT_SECONDS:
            save_state(self._path, state)
            self._written = time.monotonic()


def _split_cohort(config: "TrainConfig") -> Cohort:
    cohort = read_cohort(config.cohort)
    if all(row.split is None for row in cohort.rows):
        cohort = assign_splits(
            cohort, val_fraction=config.val_fraction, test_fraction=config.test_fraction, seed=config.split_seed
        )
    else:
        stated = [name for name in _OF_DRAWN_SPLITS if getattr(config, name) != type(config).model_fields[name].default]
        if stated:
            logger.warning("%s has a split column: %s not used", cohort.path, " and ".join(stated))
    check_splits(cohort)
    return cohort


def _refuse_another_run(config: "TrainConfig", cohort: Cohort, bags: BagDataset) -> None:
    """Refuse a folder that holds a run of other options, slides, splits or features."""
    if not (config.out / "config.yaml").is_file():
        return
    description = _description_of(config.out / "config.yaml")
    before = description["options"]
    now = config.model_dump(mode="json")
    changed = [
        f"{key}: {before.get(key)} → {now[key]}"
        for key in now
        if key not in _WHERE_ONLY | _BY_WHAT_IT_IS and before.get(key) != now[key]
    ]
    if changed:
        raise RunError(
            f"{config.out} holds a run of other options ({'; '.join(changed)}). Give another --out, or delete it."
        )
    splits = config.out / "splits.csv"
    if splits.is_file() and set(read_cohort(splits).rows) != set(cohort.rows):
        raise RunError(
            f"{config.out} holds a run on other slides, labels, cases or splits than {cohort.path} has now. "
            "Give another --out."
        )
    refuse_other_features(config.out, description, bags)


def refuse_other_features(folder: Path, description: Mapping[str, Any], bags: BagDataset) -> None:
    """Refuse to go on in a folder whose config.yaml, as it was read, tells of other features than these bags'.

    Raises:
        RunError: If it does.
    """
    before, now = description.get("features") or {}, bags.origin
    if before.get("digest") != now["digest"]:
        changed = [f"{key}: {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]]
        raise RunError(
            f"{folder} was begun with other features than {bags.feature_dir} holds now ({'; '.join(changed)}). "
            "Give another --out, or delete it."
        )


def _resume(config: "TrainConfig", cohort: Cohort, bags: BagDataset, means: Means) -> dict[str, Any] | None:
    """The state of an unfinished run of the same options in the run folder, if there is one."""
    _refuse_another_run(config, cohort, bags)
    if not (config.out / "config.yaml").is_file() or not (config.out / "state.pt").is_file():
        return None
    state = load_state(config.out / "state.pt")
    precision, engine = state["run"]["precision"], state["run"]["engine"]
    if precision != means.precision:
        raise RunError(
            f"{config.out} was begun in {precision}, here it would go on in {means.precision}. "
            f"Give --precision {precision}."
        )
    if engine != means.engine:
        raise RunError(
            f"{config.out} was begun by engine {engine}, here it would go on by engine {means.engine}. "
            f"Give --engine {engine}."
        )
    logger.info("resuming %s after epoch %d of %d", config.out, len(state["history"]), config.epochs)
    return state


def _description_of(path: Path) -> dict[str, Any]:
    """What config.yaml of a run folder holds; other commands' folders have a file of that name as well."""
    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunError(f"{path} is damaged: not valid YAML. Give another --out, or delete that folder.") from error
    options = description.get("options") if isinstance(description, dict) else None
    if not isinstance(options, dict) or "cohort" not in options:
        raise RunError(f"--out must be a folder of its own, {path} is not that of a training run. Give another --out.")
    return description


def _write_inputs(config: "TrainConfig", cohort: Cohort, bags: BagDataset, *, in_force: Mapping[str, str]) -> None:
    make_output_folder(config.out)
    description = {
        "options": config.model_dump(mode="json"),
        "in_force": dict(in_force),
        "features": bags.origin,
        **environment.describe(),
    }
    write_text(config.out / "config.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    write_splits(config.out / "splits.csv", cohort)


def _write_results(run: PreparedRun, result: FitResult) -> dict[str, Any]:
    """Weights, model.json, predictions of every split, metrics of val and test, all of the selected epoch."""
    config, cohort, bags, model = run.config, run.cohort, run.bags, run.model
    model.load_state_dict(result.last_weights)
    save_weights(config.out / "last.safetensors", model)
    model.load_state_dict(result.best_weights)
    save_weights(config.out / "model.safetensors", model)
    origin = run.origin
    description = {
        "model": model.name,
        "options": model.options,
        "classes": list(cohort.classes),
        "selected_epoch": result.best_epoch,
        **{name: origin[name] for name in ("encoder", "encoder_digest", "tile_px", "tile_mpp")},
        "n_slides": dict(Counter(row.split for row in cohort.rows)),  # of splits.csv, which says what was trained on
    }
    write_json(config.out / "model.json", description)
    trained = load_run(config.out, device=config.device)
    metrics: dict[str, Any] = {"selected_epoch": result.best_epoch}
    rows: list[CohortRow] = []
    probabilities: list[np.ndarray] = []
    for split, dataset in bags.items():
        predicted = np.stack([trained.probabilities(bag) for bag in dataset])  # (S, C)
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
