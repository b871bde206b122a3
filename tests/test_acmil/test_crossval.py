"""`acmil crossval`: folds without leaks, runs like those of `acmil train`, resuming, and statistics that add up."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from acmil.cli import run_command_line
from acmil.cohort import CohortError, read_cohort
from acmil.config import CrossvalConfig, TrainConfig
from acmil.crossval import crossval
from acmil.metrics import METRICS, metrics_with_intervals
from acmil.runs import RunError, load_run
from acmil.splits import assign_folds
from acmil.training_run import train

FOLDS, SEEDS = 3, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def bare_cohort(feature_cohort, tmp_path_factory):
    """The synthetic cohort without its splits."""
    table = tmp_path_factory.mktemp("bare") / "cohort.csv"
    lines = feature_cohort.csv.read_text().splitlines()
    table.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in lines))
    return feature_cohort._replace(csv=table)


def options(cohort, out, **others):
    settings = {"cohort": cohort.csv, "features": cohort.features, "out": out, "epochs": 2, "device": "cpu"}
    sizes = {"n_folds": FOLDS, "n_seeds": SEEDS, "val_fraction": 0.25, "bootstrap_samples": 100}
    return CrossvalConfig(**settings | sizes | others)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder):
    """Contents of all files but those that hold times or paths."""
    skipped = {"history.csv", "config.yaml", "state.pt"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="module")
def finished(bare_cohort, tmp_path_factory):
    """A whole cross-validation; tests only read it."""
    out = tmp_path_factory.mktemp("crossval") / "out"
    assert crossval(options(bare_cohort, out)).failed == 0
    return out


def test_no_case_is_on_two_sides_and_every_slide_is_tested_once_a_seed(finished, bare_cohort):
    slides = {row.slide_id for row in read_cohort(bare_cohort.csv).rows}
    tested = []
    for fold in range(FOLDS):
        rows = read_cohort(finished / f"fold_{fold}" / "splits.csv").rows
        assert {row.slide_id for row in rows} == slides
        sides = {split: {row.case_id for row in rows if row.split == split} for split in ("train", "val", "test")}
        assert not sides["train"] & sides["val"]
        assert not sides["train"] & sides["test"]
        assert not sides["val"] & sides["test"]
        for split in sides:
            assert {row.label for row in rows if row.split == split} == {"normal", "tumour"}
        tested += [row.slide_id for row in rows if row.split == "test"]
        for seed in range(SEEDS):
            assert read_cohort(finished / f"fold_{fold}" / f"seed_{seed}" / "splits.csv").rows == rows
    assert sorted(tested) == sorted(slides)
    predictions = read_csv(finished / "predictions.csv")
    for seed in range(SEEDS):
        assert sorted(row["slide_id"] for row in predictions if row["seed"] == str(seed)) == sorted(slides)
    fold_of = {row["slide_id"]: row["fold"] for row in read_csv(finished / "folds.csv")}
    assert all(row["fold"] == fold_of[row["slide_id"]] for row in predictions)


def test_validation_cases_differ_between_folds(finished):
    """Drawn by one seed, they would be the same few cases in most folds."""
    drawn = [
        frozenset(
            row.case_id for row in read_cohort(finished / f"fold_{fold}" / "splits.csv").rows if row.split == "val"
        )
        for fold in range(FOLDS)
    ]
    assert len(set(drawn)) == FOLDS


def test_a_run_is_that_of_train(finished, bare_cohort, tmp_path):
    again = TrainConfig(
        cohort=finished / "fold_1" / "splits.csv", features=bare_cohort.features, out=tmp_path / "alone", epochs=2,
        seed=1, device="cpu", val_fraction=0.25, bootstrap_samples=100,
    )  # fmt: skip
    train(again)
    assert files_of(tmp_path / "alone") == files_of(finished / "fold_1" / "seed_1")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (finished / "fold_1" / "seed_1").iterdir()} == names
    assert load_run(finished / "fold_1" / "seed_1", device="cpu").classes == ("normal", "tumour")


def test_the_table_of_runs_holds_their_metrics(finished):
    rows = read_csv(finished / "runs.csv")
    assert [(row["fold"], row["seed"]) for row in rows] == [
        (str(f), str(s)) for f in range(FOLDS) for s in range(SEEDS)
    ]
    for row in rows:
        metrics = json.loads((finished / row["folder"] / "metrics.json").read_text())
        assert row["status"] == "done"
        assert int(row["selected_epoch"]) == metrics["selected_epoch"]
        for split in ("val", "test"):
            for name in METRICS:
                assert float(row[f"{split}_{name}"]) == metrics[split][name]["value"]


def test_statistics_equal_a_direct_computation(finished, bare_cohort):
    summary = json.loads((finished / "summary.json").read_text())
    rows = read_csv(finished / "runs.csv")
    auroc = np.array([float(row["test_auroc"]) for row in rows]).reshape(FOLDS, SEEDS)
    figures = summary["test"]["auroc"]
    assert figures["mean"] == pytest.approx(auroc.mean())
    assert figures["sd_folds"] == pytest.approx(np.std(auroc.mean(axis=1), ddof=1))
    assert figures["sd_seeds"] == pytest.approx(np.std(auroc.mean(axis=0), ddof=1))

    cohort = read_cohort(bare_cohort.csv).rows
    labels, cases = [int(row.label == "tumour") for row in cohort], [row.case_id for row in cohort]
    probability = {
        (row["seed"], row["slide_id"]): float(row["probability_tumour"])
        for row in read_csv(finished / "predictions.csv")
    }
    columns = [np.array([probability[str(seed), row.slide_id] for row in cohort]) for seed in range(SEEDS)]
    for found, positive in (
        (summary["pooled"]["one_seed"]["1"], columns[1]),
        (summary["pooled"]["mean_probability"], (columns[0] + columns[1]) / 2),
    ):
        expected = metrics_with_intervals(labels, np.stack([1 - positive, positive], 1), cases, samples=100, seed=0)
        for name in METRICS:
            assert found[name] == pytest.approx(expected[name], abs=2e-6), name


def test_finished_runs_are_kept_and_seeds_can_be_added(bare_cohort, tmp_path, monkeypatch):
    out = tmp_path / "out"
    crossval(options(bare_cohort, out, n_seeds=1, epochs=1))
    written = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    trained = []
    monkeypatch.setattr("acmil.crossval.fit_jobs", counting(trained))
    summary = crossval(options(bare_cohort, out, n_seeds=2, epochs=1))
    assert trained == [(seed, 1) for seed in [1] * FOLDS]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert summary.summary["complete_seeds"] == [0, 1]


def counting(trained):
    """`fit_jobs`, noting seed and epochs of what it is asked to train."""
    from acmil.engine import fit_jobs

    def fit(jobs, **others):
        trained.extend((job.seed, job.epochs - len(job.state["history"] if job.state else [])) for job in jobs)
        return fit_jobs(jobs, **others)

    return fit


class Killed(BaseException):
    """Stands for a kill."""


class KillAfter:
    """A progress reporter that ends the process, as it were, after some epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def begin(self, title, total): ...

    def end(self): ...

    def advance(self, steps=1, note=""):
        self.left -= 1
        if self.left == 0:
            raise Killed


def test_a_killed_one_goes_on_with_what_is_missing(finished, bare_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("acmil.training_run.CHECKPOINT_SECONDS", 0.0)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        crossval(options(bare_cohort, out), progress=KillAfter(5))  # in the first epoch of the third run
    assert len(list(out.rglob("metrics.json"))) == 2
    trained = []
    monkeypatch.setattr("acmil.crossval.fit_jobs", counting(trained))
    assert crossval(options(bare_cohort, out)).failed == 0
    assert trained == [(0, 1), (1, 2), (0, 2), (1, 2)]
    assert {path: content for path, content in files_of(out).items() if path != "runs.csv"} == {
        path: content for path, content in files_of(finished).items() if path != "runs.csv"
    }
    assert read_csv(out / "runs.csv") == read_csv(finished / "runs.csv")


def test_a_failed_run_is_a_row_and_the_others_finish(bare_cohort, tmp_path, monkeypatch, capsys):
    from acmil import engine

    def fit(model, *arguments, seed, **others):
        if seed == 1 and not broken:
            broken.append(seed)
            raise ValueError("training loss must be finite,\ngot nan")
        return engine_fit(model, *arguments, seed=seed, **others)

    broken, engine_fit = [], engine.fit
    monkeypatch.setattr(engine, "fit", fit)
    out = tmp_path / "out"
    arguments = ["crossval", str(bare_cohort.csv), "--features", str(bare_cohort.features), "--out", str(out)]
    arguments += ["--n-folds", "2", "--n-seeds", "2", "--epochs", "1", "--device", "cpu", "--bootstrap-samples", "100"]
    assert run_command_line(arguments) == 1
    shown = capsys.readouterr().out
    assert "2 folds x 2 seeds, 3 runs done, 1 failed" in shown
    assert "fold 0 seed 1 failed: training loss must be finite, got nan" in shown
    rows = read_csv(out / "runs.csv")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1]["error"] == "training loss must be finite, got nan"
    assert rows[1]["test_auroc"] == rows[1]["selected_epoch"] == ""
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete_seeds"] == [0]
    assert summary["test"]["auroc"]["runs"] == 3
    assert summary["test"]["auroc"]["sd_seeds"] is None
    assert run_command_line(arguments) == 0
    assert [row["status"] for row in read_csv(out / "runs.csv")] == ["done"] * 4
    assert "4 runs done, 0 failed" in capsys.readouterr().out


def test_slides_marked_test_are_kept_out(feature_cohort, tmp_path, caplog):
    result = crossval(options(feature_cohort, tmp_path / "out", n_folds=3, n_seeds=1, epochs=1))
    held_out = {row.slide_id for row in read_cohort(feature_cohort.csv).rows if row.split == "test"}
    assert result.summary["slides_kept_out"] == len(held_out) == 8
    assert f"{len(held_out)} slides whose split is test are kept out" in caplog.text
    for path in (tmp_path / "out").rglob("splits.csv"):
        assert held_out.isdisjoint(row.slide_id for row in read_cohort(path).rows)
    assert "8 slides kept out" in str(result)


def cohort_file(folder, rows):
    path = folder / "cohort.csv"
    path.write_text("slide_id,label,case_id,split\n" + "".join(",".join(row) + "\n" for row in rows))
    return path


def test_folds_are_balanced_and_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = [(f"s{i}-{k}", "b" if i < 13 else "a", f"p{i}", "") for i in range(53) for k in range(1 + i % 2)]
    cohort = read_cohort(cohort_file(tmp_path, rows))
    fold_of = assign_folds(cohort, n_folds=5, seed=0)
    for cases in ([f"p{i}" for i in range(13)], [f"p{i}" for i in range(13, 53)], list(fold_of)):
        sizes = np.bincount([fold_of[case] for case in cases], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert assign_folds(read_cohort(cohort_file(tmp_path, rows[::-1])), n_folds=5, seed=0) == fold_of
    assert assign_folds(cohort, n_folds=5, seed=1) != fold_of


def test_a_draw_of_folds_is_fixed_for_good(tmp_path):
    cohort = read_cohort(cohort_file(tmp_path, [(f"s{i}", "ab"[i % 2], f"p{i}", "") for i in range(12)]))
    fold_of = assign_folds(cohort, n_folds=3, seed=0)
    assert "".join(str(fold_of[f"p{i}"]) for i in range(12)) == "020011222011"


@pytest.mark.parametrize(
    ("n_cases", "n_folds", "message"),
    [
        (3, 5, r"at least 5 cases for 5 folds, class 'b' has 3 .*cohort.csv.*give --n-folds 3\."),
        (2, 5, r"at least 5 cases for 5 folds, class 'b' has 2 .*or drop the class\."),
        (3, 2, r"at least 4 cases for 2 folds, class 'b' has 3 .*give --n-folds 3\."),
    ],
)
def test_more_folds_than_cases_of_a_class(tmp_path, n_cases, n_folds, message):
    rows = [(f"a{i}", "a", f"a{i}", "") for i in range(9)] + [(f"b{i}", "b", f"b{i % n_cases}", "") for i in range(9)]
    with pytest.raises(CohortError, match=message):
        assign_folds(read_cohort(cohort_file(tmp_path, rows)), n_folds=n_folds, seed=0)


def test_a_fold_without_a_class_is_refused(tmp_path):
    """The cases of class a count for the rarer class b, and seed 0 deals two of them into one fold."""
    rows = [(f"a{i}", "a", f"p{i // 4}", "") for i in range(16)] + [(f"b{i}", "b", f"p{i}", "") for i in range(8)]
    with pytest.raises(CohortError, match=r"class 'a' has no case in fold \d .*few of its cases.*another --split-seed"):
        assign_folds(read_cohort(cohort_file(tmp_path, rows)), n_folds=4, seed=0)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["test", "train", "test", "train"], "case 'p0' has some in test and some not"),
        (["test"] * 4, "needs slides whose split is not test, got none"),
    ],
)
def test_splits_that_cannot_be_kept_out(tmp_path, splits, message):
    rows = [(f"s{i}", "ab"[i % 2], f"p{i // 2}", split) for i, split in enumerate(splits)]
    config = CrossvalConfig(cohort=cohort_file(tmp_path, rows), features=tmp_path, out=tmp_path / "out")
    with pytest.raises(CohortError, match=message):
        crossval(config)


def test_a_folder_of_other_options_slides_or_kind_is_refused(finished, bare_cohort, trained_run, tmp_path):
    with pytest.raises(RunError, match="epochs: 2 → 5"):
        crossval(options(bare_cohort, finished, epochs=5))
    fewer = tmp_path / "cohort.csv"
    fewer.write_text(bare_cohort.csv.read_text().rsplit("\n", 3)[0] + "\n")
    with pytest.raises(RunError, match="other slides, labels or cases"):
        crossval(options(bare_cohort._replace(csv=fewer), finished))
    with pytest.raises(RunError, match="not that of a cross-validation"):
        crossval(options(bare_cohort, trained_run))
    with pytest.raises(RunError, match="give one of its run folders, such as fold_0/seed_0"):
        load_run(finished)


def test_the_pooled_interval_can_be_made_anew_and_the_rows_turned(finished, bare_cohort, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "out")
    header, *lines = bare_cohort.csv.read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    turned = bare_cohort._replace(csv=tmp_path / "turned.csv")
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    crossval(options(turned, tmp_path / "out", bootstrap_samples=300))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")} == weights
    assert "intervals are too narrow to be believed" in caplog.text


def test_fewer_seeds_than_there_are_are_told_of(finished, bare_cohort, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "out")
    crossval(options(bare_cohort, out))
    assert "not counted" not in caplog.text
    crossval(options(bare_cohort, out, n_seeds=1))
    assert f"{FOLDS} runs of seeds from 1 on are in {out} and not counted" in caplog.text


@pytest.mark.parametrize(("name", "content"), [("predictions.csv", "a,b\n1,2\n"), ("metrics.json", "junk")])
def test_a_damaged_result_of_a_run_is_a_row(finished, bare_cohort, tmp_path, name, content):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "fold_1" / "seed_0" / name).write_text(content)
    assert crossval(options(bare_cohort, out)).failed == 1
    rows = {(row["fold"], row["seed"]): row for row in read_csv(out / "runs.csv")}
    assert rows["1", "0"]["status"] == "failed"
    assert f"Delete {out / 'fold_1' / 'seed_0'}: the same" in rows["1", "0"]["error"]
    shutil.rmtree(out / "fold_1" / "seed_0")
    assert crossval(options(bare_cohort, out)).failed == 0
    assert files_of(out)["summary.json"] == files_of(finished)["summary.json"]


def test_seeds_on_other_features_are_refused(bare_cohort, other_cohort, tmp_path):
    crossval(options(bare_cohort, tmp_path / "out", n_seeds=1, epochs=1))
    other = bare_cohort._replace(features=other_cohort(tmp_path / "other", encoder="another").features)
    with pytest.raises(RunError, match=r"begun with other features .*encoder: synthetic → another"):
        crossval(options(other, tmp_path / "out", epochs=1))


def test_a_state_that_cannot_be_read_is_a_row_and_the_others_finish(bare_cohort, tmp_path):
    crossval(options(bare_cohort, tmp_path / "out", n_seeds=1, epochs=1))
    damaged = tmp_path / "out" / "fold_1" / "seed_0"
    (damaged / "metrics.json").unlink()
    (damaged / "state.pt").write_bytes(b"damaged")
    assert crossval(options(bare_cohort, tmp_path / "out", epochs=1)).failed == 1
    rows = {(row["fold"], row["seed"]): row for row in read_csv(tmp_path / "out" / "runs.csv")}
    assert rows["1", "0"]["status"] == "failed"
    assert "Delete it to start the run afresh" in rows["1", "0"]["error"]
    assert [row["status"] for row in rows.values()].count("done") == FOLDS * SEEDS - 1


def test_runs_of_another_engine_are_told_of(bare_cohort, tmp_path, caplog):
    crossval(options(bare_cohort, tmp_path / "out", n_seeds=1, epochs=1, precision="bf16"))
    crossval(options(bare_cohort, tmp_path / "out", n_seeds=2, epochs=1, precision="fp32"))
    assert "3 of the finished runs were trained in another precision" in caplog.text
