"""Cross-validation: folds by patient times seeds, each an ordinary run folder, and what they say together."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from acmil import environment
from acmil.bags import BagDataset
from acmil.checkpoint import WeightsError
from acmil.cohort import Cohort, CohortError, describe_classes, read_cohort
from acmil.config import TrainConfig
from acmil.crossval_summary import SlidePrediction, describe, summarise
from acmil.engine import fit_jobs
from acmil.json_file import write_json
from acmil.metrics import METRICS, classification_metrics, few_cases
from acmil.preprocessing.atomic import write_text
from acmil.preprocessing.output_folder import make_output_folder
from acmil.runs import RunError
from acmil.selection import EpochRecord
from acmil.splits import assign_folds, assign_splits, check_splits, write_splits
from acmil.training import FitResult
from acmil.training_run import (
    Means,
    PreparedRun,
    choose_means,
    finish_run,
    is_finished,
    prepare_run,
    refuse_other_features,
)

if TYPE_CHECKING:
    from acmil.config import CrossvalConfig
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

FOLD_COLUMNS = ("slide_id", "case_id", "label", "fold")

# Between a call and the one that goes on; cohort and features are compared by what they are.
_MAY_DIFFER = {
    *("cohort", "features", "out", "device", "precision", "engine", "n_seeds", "mpp_tolerance", "bootstrap_samples"),
}


class CrossvalSummary(NamedTuple):
    """What `acmil crossval` leaves; `failed` counts the runs that did not finish."""

    folder: Path
    summary: dict[str, Any]
    failed: int

    def __str__(self) -> str:
        return describe(self.folder, self.summary)


class _Entry(NamedTuple):
    """One run of the grid."""

    fold: int
    seed: int
    config: TrainConfig
    cohort: Cohort


def crossval(config: "CrossvalConfig", *, progress: "Progress | None" = None) -> CrossvalSummary:
    """Train every fold with every seed and put their test predictions together.

    What is finished in the folder is kept; a run that fails is a row of `runs.csv`, and the others go on.

    Raises:
        CohortError: If the cohort cannot be dealt into folds.
        RunError: If the folder holds a cross-validation of other options or slides.
    """
    cohort, n_kept_out = _to_cross_validate(read_cohort(config.cohort))
    logger.info("%s", describe_classes(cohort))
    too_few = few_cases([str(row.label) for row in cohort.rows], [row.case_id for row in cohort.rows])
    if too_few is not None:
        logger.warning("%s", too_few)
    fold_of = assign_folds(cohort, n_folds=config.n_folds, seed=config.split_seed)
    folds = [split_fold(cohort, fold_of, fold, config) for fold in range(config.n_folds)]
    bags = BagDataset(config.features, cohort.rows, classes=cohort.classes, mpp_tolerance=config.mpp_tolerance)
    _refuse_another(config, cohort, fold_of, bags)
    entries = [
        _Entry(fold, seed, _run_config(config, fold, seed), folds[fold])
        for fold in range(config.n_folds)
        for seed in range(config.n_seeds)
    ]
    beyond = sorted(path for path in config.out.glob("fold_*/seed_*") if _number(path) >= config.n_seeds)
    if beyond:
        logger.warning("%d runs of seeds from %d on are in %s and not counted", len(beyond), config.n_seeds, config.out)
    means = choose_means(entries[0].config, n_features=bags.n_features, n_classes=len(cohort.classes))
    _write_inputs(config, cohort, fold_of, folds, bags)
    errors = _train(entries, bags, means, progress)
    return _write_summary(config, cohort, entries, errors, n_kept_out)


def _number(path: Path) -> int:
    number = path.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


def split_fold(cohort: Cohort, fold_of: Mapping[str, int], fold: int, config: "CrossvalConfig") -> Cohort:
    """Splits of one fold: its cases are the test set, of the others some are drawn for validation."""
    others = replace(cohort, rows=tuple(row for row in cohort.rows if fold_of[row.case_id] != fold))
    drawn = assign_splits(
        others, val_fraction=config.val_fraction, test_fraction=0, seed=_validation_seed(config.split_seed, fold)
    )
    split_of = {row.slide_id: row.split for row in drawn.rows}
    result = replace(cohort, rows=tuple(row.with_split(split_of.get(row.slide_id, "test")) for row in cohort.rows))
    check_splits(result)
    return result


def _to_cross_validate(cohort: Cohort) -> tuple[Cohort, int]:
    """The slides to deal into folds; those that the table holds out for a test are left out, and counted."""
    held_out = {row.case_id for row in cohort.rows if row.split == "test"}
    rows = tuple(row.with_split(None) for row in cohort.rows if row.split != "test")
    n_kept_out = len(cohort.rows) - len(rows)
    leaks = sorted(held_out & {row.case_id for row in rows})
    if leaks:
        raise CohortError(
            f"all slides of a case must be in one split, case {leaks[0]!r} has some in test and some not "
            f"({cohort.path}). Move them together, or remove the split column to cross-validate all slides."
        )
    if not rows:
        raise CohortError(
            f"cross-validation needs slides whose split is not test, got none ({cohort.path}). "
            "Remove the split column to cross-validate all slides."
        )
    if n_kept_out:
        logger.warning(
            "%d slides whose split is test are kept out, neither trained nor tested on; "
            "remove the split column to cross-validate all slides (%s)",
            n_kept_out,
            cohort.path,
        )
    return replace(cohort, rows=rows), n_kept_out


def _validation_seed(seed: int, fold: int) -> int:
    """A seed of its own for each fold: by one seed for all, most folds would draw the same cases."""
    return int.from_bytes(hashlib.sha256(f"validation\0{seed}\0{fold}".encode()).digest()[:8], "big")


def _run_config(config: "CrossvalConfig", fold: int, seed: int) -> TrainConfig:
    """Options by which `acmil train` makes the same run."""
    shared = {name: getattr(config, name) for name in TrainConfig.model_fields if hasattr(config, name)}
    folder = config.out / f"fold_{fold}"
    return TrainConfig(**shared | {"cohort": folder / "splits.csv", "out": folder / f"seed_{seed}", "seed": seed})


def _train(
    entries: Sequence[_Entry], bags: BagDataset, means: Means, progress: "Progress | None"
) -> dict[tuple[int, int], str]:
    """Train what is not finished; return why runs failed."""
    errors: dict[tuple[int, int], str] = {}
    going: list[tuple[_Entry, PreparedRun]] = []
    differing = 0
    for entry in entries:
        if not is_finished(entry.config, entry.cohort, bags):
            try:
                run = prepare_run(entry.config, entry.cohort, bags, means, on_epoch=_reporter(entry, progress))
            except WeightsError as error:  # a state that cannot be read is the end of its run alone
                errors[entry.fold, entry.seed] = f"{error}"
                logger.error("fold %d seed %d failed: %s", entry.fold, entry.seed, error)
                continue
            going.append((entry, run))
        else:
            differing += _in_force(entry.config.out) != (means.precision, means.engine)
    n_finished = len(entries) - len(going) - len(errors)
    if n_finished:
        logger.info("%d of %d runs are finished already", n_finished, len(entries))
    if differing and going:
        logger.warning(
            "%d of the finished runs were trained in another precision or by another engine than the others will be "
            "(%s, %s): figures of the seeds do not quite compare",
            differing,
            means.precision,
            means.engine,
        )
    if not going:
        return errors

    def finish(number: int, result: FitResult | Exception) -> None:
        entry, run = going[number]
        name = f"fold {entry.fold} seed {entry.seed}"
        try:
            if isinstance(result, Exception):
                raise result
            logger.info("%s", finish_run(run, result))
        except Exception as error:  # whatever ends one run is its row, and the others go on
            run.history.close()
            errors[entry.fold, entry.seed] = " ".join(f"{error}".split()) or type(error).__name__
            logger.error("%s failed: %s", name, error, exc_info=logger.isEnabledFor(logging.DEBUG))

    if progress:
        progress.begin(f"training {len(going)} runs", sum(e.config.epochs - run.n_epochs_done for e, run in going))
    jobs = [run.job for _, run in going]
    try:
        fit_jobs(jobs, **means._asdict(), score=classification_metrics, on_result=finish)
    finally:
        for _, run in going:
            run.history.close()
    if progress:
        progress.end()
    return errors


def _in_force(run: Path) -> tuple[str, str]:
    """Precision and engine of a finished run."""
    in_force = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["in_force"]
    return in_force["precision"], in_force["engine"]


def _reporter(entry: _Entry, progress: "Progress | None") -> Callable[[EpochRecord], None]:
    def on_epoch(record: EpochRecord) -> None:
        if progress:
            auroc = record.val.get("auroc", float("nan"))
            progress.advance(1, note=f"fold {entry.fold} seed {entry.seed}, val auroc {auroc:.3f}")

    return on_epoch


def _refuse_another(config: "CrossvalConfig", cohort: Cohort, fold_of: Mapping[str, int], bags: BagDataset) -> None:
    """Refuse a folder that holds a cross-validation of other options, slides or features, or something else."""
    path = config.out / "config.yaml"
    if not path.is_file():
        return
    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunError(f"{path} is damaged: not valid YAML. Give another --out, or delete that folder.") from error
    before = description.get("options") if isinstance(description, dict) else None
    if not isinstance(before, dict) or "n_folds" not in before:
        raise RunError(
            f"--out must be a folder of its own, {path} is not that of a cross-validation. Give another --out."
        )
    now = config.model_dump(mode="json")
    changed = [
        f"{key}: {before.get(key)} → {now[key]}"
        for key in now
        if key not in _MAY_DIFFER and before.get(key) != now[key]
    ]
    if changed:
        raise RunError(
            f"{config.out} holds a cross-validation of other options ({'; '.join(changed)}). "
            "Give another --out, or delete it."
        )
    folds = config.out / "folds.csv"
    if folds.is_file() and folds.read_text(encoding="utf-8") != _fold_table(cohort, fold_of):
        raise RunError(
            f"{config.out} holds a cross-validation of other slides, labels or cases than {cohort.path} has now. "
            "Give another --out."
        )
    refuse_other_features(config.out, description, bags)


def _write_inputs(
    config: "CrossvalConfig", cohort: Cohort, fold_of: Mapping[str, int], folds: Sequence[Cohort], bags: BagDataset
) -> None:
    make_output_folder(config.out)
    description = {  # the runs say how they trained
        "options": config.model_dump(mode="json"),
        "features": bags.origin,
        **environment.describe(),
    }
    write_text(config.out / "config.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    write_text(config.out / "folds.csv", _fold_table(cohort, fold_of))
    for fold, splits in enumerate(folds):
        make_output_folder(config.out / f"fold_{fold}")
        write_splits(config.out / f"fold_{fold}" / "splits.csv", splits)


def _fold_table(cohort: Cohort, fold_of: Mapping[str, int]) -> str:
    lines = ((row.slide_id, row.case_id, str(row.label), fold_of[row.case_id]) for row in cohort.rows)
    return _table(FOLD_COLUMNS, sorted(lines))


def _write_summary(
    config: "CrossvalConfig",
    cohort: Cohort,
    entries: Sequence[_Entry],
    errors: dict[tuple[int, int], str],
    n_kept_out: int,
) -> CrossvalSummary:
    """Write runs.csv, predictions.csv and summary.json from what the run folders hold; damaged ones become errors."""
    metrics: dict[tuple[int, int], dict[str, Any]] = {}
    predictions: list[SlidePrediction] = []
    for entry in entries:
        if (entry.fold, entry.seed) not in errors:
            try:
                of_run = json.loads((entry.config.out / "metrics.json").read_text("utf-8"))
                of_test = _test_predictions(entry, cohort.classes)
            except (OSError, ValueError, KeyError, TypeError) as error:
                text = (
                    f"metrics.json or predictions.csv is damaged ({type(error).__name__}: {error}). "
                    f"Delete {entry.config.out}: the same command makes it anew."
                )
                logger.error("fold %d seed %d: %s", entry.fold, entry.seed, text)
                errors[entry.fold, entry.seed] = text
                continue
            metrics[entry.fold, entry.seed] = of_run
            predictions += of_test
    place = {row.slide_id: number for number, row in enumerate(cohort.rows)}
    predictions.sort(key=lambda row: (row.seed, place[row.slide_id]))
    _write_runs(config.out, entries, metrics, errors)
    _write_predictions(config.out / "predictions.csv", predictions, cohort.classes)
    summary = summarise(
        metrics,
        predictions,
        cohort,
        n_folds=config.n_folds,
        n_seeds=config.n_seeds,
        samples=config.bootstrap_samples,
        errors=errors,
        n_kept_out=n_kept_out,
    )
    write_json(config.out / "summary.json", summary)
    return CrossvalSummary(config.out, summary, len(errors))


def _test_predictions(entry: _Entry, classes: Sequence[str]) -> list[SlidePrediction]:
    with (entry.config.out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return [
            SlidePrediction(
                row["slide_id"],
                row["case_id"],
                row["label"],
                entry.fold,
                entry.seed,
                tuple(float(row[f"probability_{name}"]) for name in classes),
            )
            for row in csv.DictReader(file)
            if row["split"] == "test"
        ]


def _write_runs(
    folder: Path,
    entries: Sequence[_Entry],
    metrics: Mapping[tuple[int, int], dict[str, Any]],
    errors: Mapping[tuple[int, int], str],
) -> None:
    figures = [(split, name) for split in ("val", "test") for name in METRICS]
    rows = []
    for entry in entries:
        key = (entry.fold, entry.seed)
        found = metrics.get(key, {})
        values = [found.get(split, {}).get(name, {}).get("value") for split, name in figures]
        rows.append(
            [
                *key,
                "failed" if key in errors else "done",
                errors.get(key, ""),
                found.get("selected_epoch", ""),
                *("" if value is None else value for value in values),
                entry.config.out.relative_to(folder).as_posix(),
            ]
        )
    header = ("fold", "seed", "status", "error", "selected_epoch", *(f"{s}_{name}" for s, name in figures), "folder")
    write_text(folder / "runs.csv", _table(header, rows))


def _write_predictions(path: Path, predictions: Sequence[SlidePrediction], classes: Sequence[str]) -> None:
    header = (
        "slide_id",
        "case_id",
        "label",
        "fold",
        "seed",
        "prediction",
        *(f"probability_{name}" for name in classes),
    )
    rows = (
        (
            row.slide_id,
            row.case_id,
            row.label,
            row.fold,
            row.seed,
            classes[max(range(len(classes)), key=row.probabilities.__getitem__)],
            *map(repr, row.probabilities),
        )
        for row in predictions
    )
    write_text(path, _table(header, rows))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue()
