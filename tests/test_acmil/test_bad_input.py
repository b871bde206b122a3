"""Bad input at the command line: what a user gets wrong is said in a line or two, and nothing is lost."""

import csv

import numpy as np
import pytest
import tifffile

from acmil.cli import run_command_line
from acmil.models import create_model


def write_slide(path, *, side_px=1024, mpp=0.5):
    """A tiled TIFF with a dark square of 'tissue' on white; without resolution tags where `mpp` is None."""
    image = np.full((side_px, side_px, 3), 245, np.uint8)
    inner = slice(side_px // 8, side_px - side_px // 8)
    image[inner, inner] = np.random.default_rng(0).integers(90, 170, size=image[inner, inner].shape, dtype=np.uint8)
    image[inner, inner, 1] //= 2  # purple: saturated, as stained tissue is
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", **resolution)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a tiny backbone."""
    import torch

    from acmil.preprocessing.encoders.torchvision_schemas import import_timm

    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(import_timm().create_model("test_efficientnet", pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def preprocess(tmp_path, weights):
    """Run `acmil preprocess` on some inputs; the job folder is tmp_path/job."""

    def run(*inputs, **options):
        flags = {
            "encoder": "test_efficientnet",
            "weights": weights,
            "tile-px": 64,
            "device": "cpu",
            "out": tmp_path / "job",
        } | options
        return run_command_line(
            ["preprocess", *map(str, inputs), *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
        )

    return run


def rows_of(job):
    with (job / "slides.csv").open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert len(lines) - errors[0] <= 2, "an error is one or two lines"
    return "\n".join(lines[errors[0] :])


def test_no_such_file(preprocess, tmp_path, capsys):
    assert preprocess(tmp_path / "absent.svs") == 1
    assert "absent.svs" in error_of(capsys)
    assert not (tmp_path / "job" / "slides.csv").exists()


def test_empty_folder(preprocess, tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    assert preprocess(tmp_path / "slides") == 1
    message = error_of(capsys)
    assert "no slides" in message
    assert ".svs" in message


def test_bad_slides_are_rows_and_the_rest_goes_on(preprocess, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    write_slide(folder / "good.tif")
    write_slide(folder / "small.tif", side_px=16)
    write_slide(folder / "without_mpp.tif", mpp=None)
    write_slide(folder / "absurd.tif", mpp=352.78)
    (folder / "text.svs").write_text("not a slide\n")
    assert preprocess(folder) == 1
    assert "3 failed" in capsys.readouterr().out
    rows = rows_of(tmp_path / "job")
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "done",
        "small": "empty",
        "without_mpp": "failed",
        "absurd": "failed",
        "text": "failed",
    }
    assert int(rows["good"]["tiles"]) > 50
    assert (tmp_path / "job" / "features" / "good.h5").is_file()
    assert "without_mpp" in rows["without_mpp"]["error"]
    assert "--mpp-override" in rows["without_mpp"]["error"]
    assert "352" in rows["absurd"]["error"]
    assert "text" in rows["text"]["error"]
    assert "the slide is 16 x 16 px, smaller than a tile of" in rows["small"]["alarms"]


def test_the_mend_for_missing_mpp_works(preprocess, tmp_path):
    slide = write_slide(tmp_path / "without_mpp.tif", mpp=None)
    assert preprocess(slide) == 1
    assert preprocess(slide, **{"mpp-override": 0.5, "out": tmp_path / "again"}) == 0
    assert rows_of(tmp_path / "again")["without_mpp"]["status"] == "done"


def test_weights_of_the_wrong_shape(preprocess, tmp_path, capsys):
    assert preprocess(write_slide(tmp_path / "a.tif"), encoder="test_resnet") == 1
    assert "tiny.pth" in error_of(capsys)


def train(table, features, out, *more):
    return run_command_line(
        ["train", str(table), "--features", str(features), "--out", str(out), "--epochs", "1", "--device", "cpu", *more]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("label", "diagnosis", 1), "label"),
        (lambda text: text.replace("s000,", "s999,", 1), "s999"),
        (lambda text: text.replace("tumour", "normal"), "2 classes"),
        (lambda text: text.replace("s000,normal,c000,train", "s000,normal,c000,val", 1), "c000"),
    ],
    ids=["missing column", "unknown slide", "one class only", "a case in two splits"],
)
def test_cohorts(feature_cohort, tmp_path, capsys, change, message):
    table = tmp_path / "cohort.csv"
    table.write_text(change(feature_cohort.csv.read_text()))
    assert train(table, feature_cohort.features, tmp_path / "run") == 1
    assert message in error_of(capsys)


def test_config_key_misspelt(feature_cohort, tmp_path, capsys):
    options = tmp_path / "options.yaml"
    options.write_text("n_branchs: 3\n")
    assert train(feature_cohort.csv, feature_cohort.features, tmp_path / "run", "--config", str(options)) == 2
    message = error_of(capsys)
    assert "'n_branchs'" in message
    assert "options.yaml" in message
    assert "'n_branches'" in message


def test_feature_file_cut_short(feature_cohort, other_cohort, tmp_path, capsys):
    cut = other_cohort(tmp_path / "cut")
    file = cut.features / "s000.h5"
    file.write_bytes(file.read_bytes()[:-500])
    assert train(cut.csv, cut.features, tmp_path / "run") == 1
    assert "s000.h5" in error_of(capsys)


def test_model_weights_of_the_wrong_shape(trained_run, feature_cohort, tmp_path, capsys):
    import shutil

    from acmil.checkpoint import save_weights

    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    save_weights(run / "model.safetensors", create_model("acmil_ga", in_features=24, n_classes=2, hidden_features=8))
    arguments = [
        "evaluate",
        str(run),
        str(feature_cohort.csv),
        "--features",
        str(feature_cohort.features),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run_command_line([*arguments, "--device", "cpu"]) == 1
    message = error_of(capsys)
    assert "reduction.weight" in message
    assert "(8, 16)" in message
    assert "(8, 24)" in message


def test_a_slide_without_a_map_is_said_once(trained_run, feature_cohort, tmp_path, capsys):
    arguments = ["heatmap", str(trained_run), str(tmp_path / "s001.tif"), "--features", str(feature_cohort.features)]
    assert run_command_line([*arguments, "--out", str(tmp_path / "maps")]) == 1
    assert capsys.readouterr().err.count("slide file must exist, found none") == 1


@pytest.mark.parametrize("command", ["preprocess", "train", "evaluate", "heatmap", "umap", "convert", "demo", "fetch"])
def test_out_that_is_a_file_is_said_alike_by_every_command(
    command, trained_run, feature_cohort, preprocess, tmp_path, capsys
):
    file = tmp_path / "results.txt"
    file.write_text("kept")
    features, cohort = str(feature_cohort.features), str(feature_cohort.csv)
    arguments = {
        "train": ["train", cohort, "--features", features],
        "evaluate": ["evaluate", str(trained_run), cohort, "--features", features],
        "heatmap": ["heatmap", str(trained_run), "s001.tif", "--features", features],
        "umap": ["umap", str(trained_run), cohort, "--features", features],
        "convert": ["features", "convert", features, "--to", "trident"],
        "demo": ["demo"],
        "fetch": ["samples", "fetch", "cmu-1-small-region"],
    }
    if command == "preprocess":
        status = preprocess(write_slide(tmp_path / "a.tif"), out=file)
    else:
        status = run_command_line([*arguments[command], "--out", str(file)])
    assert status == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: out must be a folder, got a path where the file {file} is ({file}). "
        "Choose another --out, or move the file away."
    )
    assert file.read_text() == "kept"
