"""`acmil train`: the run folder, what it learns, resuming, and refusals."""

import csv
import json
import shutil

import h5py
import numpy as np
import pytest
import yaml

from acmil.checkpoint import load_state, save_state
from acmil.config import TrainConfig
from acmil.runs import RunError, load_run
from acmil.training_run import train


def options(cohort, out, **others):
    return TrainConfig(
        **{"cohort": cohort.csv, "features": cohort.features, "out": out, "epochs": 3, "device": "cpu"} | others
    )


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_csv(path)]


def test_the_run_folder_holds_what_it_should(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names == {
        "config.yaml",
        "splits.csv",
        "history.csv",
        "model.safetensors",
        "last.safetensors",
        "model.json",
        "state.pt",
        "metrics.json",
        "predictions.csv",
        "tensorboard",
    }
    history = read_csv(trained_run / "history.csv")
    assert len(history) == 40
    assert {
        "epoch",
        "learning_rate",
        "train_loss",
        "train_loss_bag",
        "train_loss_branch",
        "train_loss_diversity",
        "val_loss",
        "val_auroc",
        "val_f1_macro",
        "attention_entropy",
        "attention_top10_mass",
    } <= set(history[0])
    for row in history:
        total = sum(float(row[f"train_loss_{term}"]) for term in ("bag", "branch", "diversity"))
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-4)
    stored = yaml.safe_load((trained_run / "config.yaml").read_text())
    assert stored["options"]["weight_decay"] == 1e-5
    assert stored["versions"]["torch"]
    assert list(trained_run.glob("tensorboard/events*"))


def test_it_learns_the_planted_rule_and_attention_finds_it(trained_run, feature_cohort):
    metrics = json.loads((trained_run / "metrics.json").read_text())
    assert metrics["test"]["auroc"]["value"] == 1.0
    assert metrics["test"]["auroc"]["low"] <= 1.0 <= metrics["test"]["auroc"]["high"]
    run = load_run(trained_run, device="cpu")
    from acmil.bags import BagDataset
    from acmil.cohort import read_cohort

    rows = [row for row in read_cohort(feature_cohort.csv).rows if row.split == "test" and row.label == "tumour"]
    for bag in BagDataset(feature_cohort.features, rows, classes=run.classes):
        top = run.predict(bag).attention.mean(axis=0).argmax()
        assert top in feature_cohort.witnesses[bag.slide_id]


def test_predictions_agree_with_the_metrics_and_the_model(trained_run, feature_cohort):
    from sklearn.metrics import f1_score, roc_auc_score

    rows = [row for row in read_csv(trained_run / "predictions.csv") if row["split"] == "val"]
    truth = np.array([row["label"] == "tumour" for row in rows])
    probability = np.array([float(row["probability_tumour"]) for row in rows])
    called = np.array([row["prediction"] == "tumour" for row in rows])
    metrics = json.loads((trained_run / "metrics.json").read_text())["val"]
    assert metrics["auroc"]["value"] == pytest.approx(roc_auc_score(truth, probability), abs=1e-6)
    assert metrics["f1_macro"]["value"] == pytest.approx(f1_score(truth, called, average="macro"), abs=1e-6)
    assert (called == (probability > 0.5)).all()


def test_selected_epoch_is_the_best_by_validation(trained_run):
    history = read_csv(trained_run / "history.csv")
    score = [float(row["val_f1_macro"]) + float(row["val_auroc"]) for row in history]
    chosen = json.loads((trained_run / "model.json").read_text())["selected_epoch"]
    row = next(row for row in history if int(row["epoch"]) == chosen)
    assert float(row["val_f1_macro"]) + float(row["val_auroc"]) == max(score)


def test_same_seed_same_run_and_another_seed_another(feature_cohort, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(options(feature_cohort, tmp_path / name, seed=seed))
    assert without_time(tmp_path / "a" / "history.csv") == without_time(tmp_path / "b" / "history.csv")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert without_time(tmp_path / "a" / "history.csv") != without_time(tmp_path / "c" / "history.csv")


class Interruption(Exception):  # noqa: N818
    """Stands for a kill."""


class InterruptAfter:
    """A progress reporter that stops the run after some epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def begin(self, title, total): ...

    def end(self): ...

    def advance(self, steps=1, note=""):
        self.left -= 1
        if self.left == 0:
            raise Interruption


@pytest.mark.parametrize("model", ["acmil_ga", "acmil_mha"])
def test_an_interrupted_run_resumes_to_the_same_end(feature_cohort, tmp_path, model, monkeypatch):
    monkeypatch.setattr("acmil.training_run.CHECKPOINT_SECONDS", 0.0)
    train(options(feature_cohort, tmp_path / "whole", epochs=6, model=model))
    with pytest.raises(Interruption):
        train(options(feature_cohort, tmp_path / "cut", epochs=6, model=model), progress=InterruptAfter(3))
    with pytest.raises(RunError, match=r"not a finished run folder.*run `acmil train` again"):
        load_run(tmp_path / "cut")
    train(options(feature_cohort, tmp_path / "cut", epochs=6, model=model))
    for name in ("model.safetensors", "last.safetensors", "predictions.csv", "metrics.json", "splits.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert without_time(tmp_path / "cut" / "history.csv") == without_time(tmp_path / "whole" / "history.csv")


def test_the_order_of_the_table_does_not_matter(feature_cohort, tmp_path):
    header, *lines = feature_cohort.csv.read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    turned = feature_cohort._replace(csv=tmp_path / "turned.csv")
    train(options(feature_cohort, tmp_path / "a"))
    train(options(turned, tmp_path / "b"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    train(options(turned, tmp_path / "a"))  # the same run


def test_the_history_of_a_resumed_run_is_that_of_its_state(feature_cohort, tmp_path, monkeypatch):
    """A kill between the two leaves a state with an epoch more than the table."""
    monkeypatch.setattr("acmil.training_run.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interruption):
        train(options(feature_cohort, tmp_path, epochs=5), progress=InterruptAfter(3))
    n_done = len(load_state(tmp_path / "state.pt")["history"])
    lines = (tmp_path / "history.csv").read_text().splitlines(keepends=True)
    (tmp_path / "history.csv").write_text("".join(lines[:n_done]))  # the header and all epochs but one
    train(options(feature_cohort, tmp_path, epochs=5))
    whole = (tmp_path / "history.csv").read_text()
    assert [row["epoch"] for row in read_csv(tmp_path / "history.csv")] == ["0", "1", "2", "3", "4"]
    # The same behind the last epoch, which nothing is trained after.
    (tmp_path / "history.csv").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    (tmp_path / "metrics.json").unlink()
    train(options(feature_cohort, tmp_path, epochs=5))
    assert (tmp_path / "history.csv").read_text() == whole


def test_more_bootstrap_samples_need_no_training(feature_cohort, tmp_path):
    kept = ("history.csv", "model.safetensors", "predictions.csv")
    train(options(feature_cohort, tmp_path, bootstrap_samples=100))
    before = [(tmp_path / name).read_bytes() for name in kept]
    train(options(feature_cohort, tmp_path, bootstrap_samples=400))
    assert [(tmp_path / name).read_bytes() for name in kept] == before
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["options"]["bootstrap_samples"] == 400


def test_a_folder_of_other_options_is_refused_with_the_differences(trained_run, feature_cohort):
    with pytest.raises(RunError, match="epochs: 40 → 3"):
        train(options(feature_cohort, trained_run, learning_rate=1e-3))


def test_a_run_begun_by_another_engine_is_refused(feature_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("acmil.training_run.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interruption):
        train(options(feature_cohort, tmp_path), progress=InterruptAfter(1))
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["options"]["engine"] == "auto"
    assert stored["in_force"]["engine"] == "eager"
    state = load_state(tmp_path / "state.pt")
    save_state(tmp_path / "state.pt", state | {"run": state["run"] | {"engine": "resident"}})
    with pytest.raises(RunError, match=r"by engine resident, here .* by engine eager. Give --engine resident\."):
        train(options(feature_cohort, tmp_path))
    with pytest.raises(ValueError, match=r"engine resident cannot be had: .*Give engine auto or eager"):
        train(options(feature_cohort, tmp_path, engine="resident"))


def test_states_are_written_now_and_then_and_at_the_end(feature_cohort, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("acmil.training_run.save_state", lambda path, state: written.append(len(state["history"])))
    train(options(feature_cohort, tmp_path / "rarely", epochs=4))
    assert written == [4]
    monkeypatch.setattr("acmil.training_run.CHECKPOINT_SECONDS", 0.0)
    train(options(feature_cohort, tmp_path / "often", epochs=4))
    assert written == [4, 1, 2, 3, 4]


def test_batches_are_an_option(feature_cohort, tmp_path):
    train(options(feature_cohort, tmp_path / "run", batch_size=4))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["options"]["batch_size"] == 4
    with pytest.raises(RunError, match="batch_size: 4 → 1"):
        train(options(feature_cohort, tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{[", "not valid YAML"), ("options: {tile_px: 256}\n", "not that of a training run"), ("", "not that of")],
)
def test_a_folder_of_something_else_is_refused(feature_cohort, tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=message):
        train(options(feature_cohort, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_cohort_that_changed_under_the_run_is_refused(feature_cohort, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_bytes(feature_cohort.csv.read_bytes())
    changed = feature_cohort._replace(csv=table)
    train(options(changed, tmp_path / "run", epochs=1))
    table.write_text(table.read_text().replace("s000,normal,c000,train\n", ""))
    with pytest.raises(RunError, match="other slides, labels, cases or splits"):
        train(options(changed, tmp_path / "run", epochs=1))


def test_features_that_changed_under_the_run_are_refused_and_moved_ones_are_not(feature_cohort, other_cohort, tmp_path):
    """Finished or not: the weights are those of the features that the run began with."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(feature_cohort.features, moved)
    cohort = feature_cohort._replace(features=moved)
    train(options(feature_cohort, tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "model.json").read_bytes()
    train(options(cohort, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "model.json").read_bytes() == before
    shutil.rmtree(moved)
    shutil.copytree(other_cohort(tmp_path / "other", encoder="another", tile_mpp=1.0).features, moved)
    with pytest.raises(RunError, match=r"other features than .*elsewhere holds now \(encoder: synthetic → another"):
        train(options(cohort, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "model.json").read_bytes() == before


def test_what_one_file_does_not_say_of_its_features_others_do(feature_cohort, tmp_path):
    shutil.copytree(feature_cohort.features, tmp_path / "features")
    with h5py.File(tmp_path / "features" / "s000.h5", "r+") as file:
        file.attrs["encoder"] = file.attrs["encoder_digest"] = ""  # not known, as in converted files
    train(options(feature_cohort._replace(features=tmp_path / "features"), tmp_path / "run", epochs=1))
    description = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (description["encoder"], description["encoder_digest"]) == ("synthetic", "0" * 64)
    assert (description["tile_px"], description["tile_mpp"]) == (224, [0.5, 0.5])


def test_a_cohort_without_splits_is_split_by_case(feature_cohort, tmp_path):
    table = tmp_path / "cohort.csv"
    with feature_cohort.csv.open(newline="") as file:
        table.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in file))
    bare = feature_cohort._replace(csv=table)
    train(options(bare, tmp_path / "run", epochs=1, val_fraction=0.25, test_fraction=0.25))
    splits = {}
    for row in read_csv(tmp_path / "run" / "splits.csv"):
        splits.setdefault(row["case_id"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "val", "test"}


def test_abmil_is_one_branch_without_masking(feature_cohort, tmp_path):
    train(options(feature_cohort, tmp_path / "run", n_branches=1, mask_top_k=0))
    for row in read_csv(tmp_path / "run" / "history.csv"):
        assert float(row["train_loss"]) == pytest.approx(float(row["train_loss_bag"]), rel=1e-6)


def test_options_of_drawn_splits_are_told_of_where_there_are_splits(feature_cohort, tmp_path, caplog):
    train(options(feature_cohort, tmp_path, epochs=1, val_fraction=0.3))
    assert "has a split column: val_fraction not used" in caplog.text
