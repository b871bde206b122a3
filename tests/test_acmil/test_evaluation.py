"""`acmil evaluate` and reading a run: held-out slides, unlabelled cohorts, refusals."""

import csv
import json
import shutil

import numpy as np
import pytest

from acmil.bags import BagDataset, BagError
from acmil.cohort import CohortError, read_cohort
from acmil.config import EvaluateConfig, TrainConfig
from acmil.evaluation import evaluate
from acmil.runs import RunError, load_run
from acmil.training_run import train


def options(run, cohort, out, **others):
    return EvaluateConfig(
        **{"run": run, "cohort": cohort.csv, "features": cohort.features, "out": out, "device": "cpu"} | others
    )


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(cohort, tmp_path, change):
    rows = read_csv(cohort.csv)
    rows = [new for row in rows if (new := change(row)) is not None]
    table = tmp_path / "changed.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return cohort._replace(csv=table)


def test_held_out_is_what_the_run_did_not_see(trained_run, feature_cohort, tmp_path, caplog):
    summary = evaluate(options(trained_run, feature_cohort, tmp_path))
    assert summary.n_slides == 8
    assert {row["split"] for row in read_csv(tmp_path / "predictions.csv")} == {"test"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    of_training = json.loads((trained_run / "metrics.json").read_text())["test"]
    assert metrics["metrics"]["auroc"]["value"] == of_training["auroc"]["value"]
    assert metrics["n_cases"] == 4
    assert "intervals are too narrow to be believed" in caplog.text
    assert (tmp_path / "roc.png").stat().st_size > 5000


def test_a_slide_of_a_training_case_is_not_held_out_by_what_the_cohort_says(
    trained_run, feature_cohort, tmp_path, caplog
):
    """A test slide of the run that turns out to be of a patient it trained on."""

    def move(row):
        return row | {"case_id": "c000"} if row["slide_id"] == "s012" else row

    assert next(row["split"] for row in read_csv(feature_cohort.csv) if row["slide_id"] == "s012") == "test"
    summary = evaluate(options(trained_run, rewrite(feature_cohort, tmp_path, move), tmp_path / "out"))
    assert summary.n_slides == 7
    assert "1 test slides of the run are left out" in caplog.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n_left_out"] == 25


def test_cases_that_the_run_was_not_told_of_are_kept_apart(feature_cohort, tmp_path):
    """Trained without case_id, evaluated with it: no slide is of a case that was trained or selected on."""
    bare = rewrite(feature_cohort, tmp_path, lambda row: {name: row[name] for name in ("slide_id", "label")})
    train(TrainConfig(cohort=bare.csv, features=bare.features, out=tmp_path / "run", epochs=1, device="cpu"))
    used = {row["slide_id"] for row in read_csv(tmp_path / "run" / "splits.csv") if row["split"] != "test"}
    cases = {row["slide_id"]: row["case_id"] for row in read_csv(feature_cohort.csv)}
    cohort = rewrite(feature_cohort, tmp_path, lambda row: row | {"split": ""})
    run = load_run(tmp_path / "run", device="cpu")
    rows = run.select(read_cohort(cohort.csv), "all").rows
    clean = {row.slide_id for row in rows} - {s for s in cases if cases[s] in {cases[slide] for slide in used}}
    if clean:
        assert {row.slide_id for row in run.select(read_cohort(cohort.csv), "held-out").rows} == clean
    else:
        with pytest.raises(CohortError, match="no slide"):
            run.select(read_cohort(cohort.csv), "held-out")


def test_new_slides_left_out_for_their_case_alone_are_told_of(trained_run, feature_cohort, tmp_path, caplog):
    new = rewrite(feature_cohort, tmp_path, lambda row: row | {"slide_id": "x" + row["slide_id"]})
    rows = load_run(trained_run, device="cpu").select(read_cohort(new.csv), "held-out").rows
    assert len(rows) == 8
    assert "24 of the slides left out are new to the run" in caplog.text
    bare = rewrite(feature_cohort, tmp_path, lambda row: {"slide_id": row["slide_id"]})
    load_run(trained_run, device="cpu").select(read_cohort(bare.csv, require_labels=False), "held-out")
    assert "has no case_id, as the run's cohort had" in caplog.text


def test_the_folder_of_a_run_is_refused(trained_run, feature_cohort):
    before = {path.name: path.read_bytes() for path in trained_run.iterdir() if path.is_file()}
    with pytest.raises(RunError, match=r"holds model\.json. Give another --out"):
        evaluate(options(trained_run, feature_cohort, trained_run))
    assert {path.name: path.read_bytes() for path in trained_run.iterdir() if path.is_file()} == before


def test_nothing_of_an_earlier_call_is_left(trained_run, feature_cohort, tmp_path):
    evaluate(options(trained_run, feature_cohort, tmp_path / "out"))
    bare = rewrite(feature_cohort, tmp_path, lambda row: {"slide_id": row["slide_id"], "case_id": row["case_id"]})
    evaluate(options(trained_run, bare, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_predictions_are_written_as_they_are(trained_run, feature_cohort, tmp_path):
    evaluate(options(trained_run, feature_cohort, tmp_path / "out"))
    run = load_run(trained_run, device="cpu")
    for row in read_csv(tmp_path / "out" / "predictions.csv"):
        bags = BagDataset(feature_cohort.features, read_cohort(feature_cohort.csv).rows, classes=run.classes)
        expected = run.probabilities(bags.select([row["slide_id"]])[0])
        assert [float(row[f"probability_{name}"]) for name in run.classes] == expected.tolist()
        break


def test_an_absent_class_is_named(trained_run, feature_cohort, tmp_path, caplog):
    normal = rewrite(feature_cohort, tmp_path, lambda row: row if row["label"] == "normal" else None)
    evaluate(options(trained_run, normal, tmp_path / "out"))
    assert "no slide of class tumour: AUROC is not defined" in caplog.text


def test_all_warns_that_training_slides_flatter(trained_run, feature_cohort, tmp_path, caplog):
    assert evaluate(options(trained_run, feature_cohort, tmp_path, split="all")).n_slides == 32
    assert "flatter the model" in caplog.text


def test_without_labels_predictions_only(trained_run, feature_cohort, tmp_path):
    bare = rewrite(feature_cohort, tmp_path, lambda row: {"slide_id": row["slide_id"], "case_id": row["case_id"]})
    summary = evaluate(options(trained_run, bare, tmp_path / "out"))
    assert summary.metrics is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.csv"}
    assert len(read_csv(tmp_path / "out" / "predictions.csv")) == 8


def test_a_label_that_the_run_does_not_know(trained_run, feature_cohort, tmp_path):
    strange = rewrite(
        feature_cohort, tmp_path, lambda row: row | {"label": "benign"} if row["label"] == "normal" else row
    )
    with pytest.raises(CohortError, match=r"classes \(normal, tumour\), got 'benign'"):
        evaluate(options(trained_run, strange, tmp_path / "out"))


def test_an_unknown_slide_is_named(trained_run, feature_cohort, tmp_path):
    unknown = rewrite(
        feature_cohort, tmp_path, lambda row: row | {"slide_id": "nobody"} if row["slide_id"] == "s012" else row
    )
    with pytest.raises(ValueError, match="nobody"):
        evaluate(options(trained_run, unknown, tmp_path / "out"))


def test_features_of_another_encoder_or_resolution_are_refused_unless_forced(trained_run, tmp_path, other_cohort):
    other = other_cohort(tmp_path, encoder="another", tile_mpp=0.25)
    with pytest.raises(
        RunError, match=r"encoder 'another', trained on 'synthetic'.*µm per pixel 0.25, trained on 0.5.*--force"
    ):
        evaluate(options(trained_run, other, tmp_path / "out"))
    assert evaluate(options(trained_run, other, tmp_path / "out", force=True)).n_slides == 8
    forced = json.loads((tmp_path / "out" / "metrics.json").read_text())["forced"]
    assert "encoder 'another', trained on 'synthetic'" in forced
    assert "Nor do those of 7 more slides." in forced


def test_what_cannot_be_checked_is_told(trained_run, other_cohort, tmp_path, caplog):
    unknown = other_cohort(tmp_path, encoder="")
    evaluate(options(trained_run, unknown, tmp_path / "out"))
    assert "the encoder of 8 of 8 slides, first 's012', is not known: nothing checks" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_figures_of_slides_that_made_the_model_are_called_so(trained_run, feature_cohort, tmp_path, split, caplog):
    evaluate(options(trained_run, feature_cohort, tmp_path / "out", split=split))
    assert "the figures flatter the model" in caplog.text


def test_a_run_that_lost_slides_of_its_splits_is_refused(trained_run, feature_cohort, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    splits = tmp_path / "run" / "splits.csv"
    lines = splits.read_text().splitlines(keepends=True)
    without_cases = "".join(lines).replace("case_id", "cas_id", 1)
    for text in ("".join(lines[:20]), lines[0], "", without_cases):
        splits.write_text(text)
        with pytest.raises(RunError, match=r"splits\.csv (must list the slides|is damaged).*Copy the run again"):
            evaluate(options(tmp_path / "run", feature_cohort, tmp_path / "out"))


def test_slides_of_several_scanners_are_trained_on_when_it_is_stated(other_cohort, tmp_path, caplog):
    cohort = other_cohort(tmp_path / "in", tile_mpp=0.5)
    coarser = other_cohort(tmp_path / "coarser", tile_mpp=0.55)
    ids = [row["slide_id"] for row in read_csv(cohort.csv)]
    for slide_id in ids[::2]:
        shutil.copy(coarser.features / f"{slide_id}.h5", cohort.features)
    stated = {"cohort": cohort.csv, "features": cohort.features, "out": tmp_path / "run", "epochs": 2, "device": "cpu"}
    with pytest.raises(BagError, match=r"within 0\.01 of each other \(mpp_tolerance\).*0\.5 .*0\.55 .*: 0\.1\."):
        train(TrainConfig(**stated))
    assert not (tmp_path / "run").exists()
    train(TrainConfig(**stated, mpp_tolerance=0.12))
    assert "not of one resolution: 0.5 µm/px" in caplog.text
    assert json.loads((tmp_path / "run" / "model.json").read_text())["tile_mpp"] == [0.5, 0.55]
    assert evaluate(options(tmp_path / "run", cohort, tmp_path / "out", split="all")).n_slides == len(ids)
    finer = other_cohort(tmp_path / "finer", tile_mpp=0.48)
    with pytest.raises(RunError, match=r"µm per pixel 0\.48, trained on 0\.5 to 0\.55"):
        evaluate(options(tmp_path / "run", finer, tmp_path / "out"))


def test_not_a_run_folder(tmp_path):
    with pytest.raises(RunError, match="not a finished run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("{}", "missing model, options"), ("[]", "missing model, options")]
)
def test_a_damaged_description_of_the_model_is_named(trained_run, tmp_path, text, message):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "model.json").write_text(text)
    with pytest.raises(RunError, match=rf"model\.json.*{message}"):
        load_run(run, device="cpu")


def test_prediction_is_the_models_own(trained_run, feature_cohort):
    from acmil.bags import BagDataset
    from acmil.cohort import read_cohort

    run = load_run(trained_run, device="cpu")
    bag = BagDataset(feature_cohort.features, read_cohort(feature_cohort.csv).rows[:1], classes=run.classes)[0]
    prediction = run.predict(bag)
    assert prediction.attention.shape == (5, len(bag.features))
    np.testing.assert_allclose(prediction.attention.sum(axis=1), 1, rtol=1e-5)
    assert prediction.probabilities.sum() == pytest.approx(1)
    assert prediction.hidden.shape == (len(bag.features), 8)
    assert prediction.hidden.min() >= 0
