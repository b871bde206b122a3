"""Limits of quality in a job: exactly the tiles beyond them are dropped, and nothing of them is left."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.feature_file import MEASURES, open_feature_file
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.job_folder import JobError

ENCODER, TILE_PX = "test_efficientnet", 32
LIMITS = {"max_dark": 0.4, "min_focus": 0.2}

# Runs a job that kills itself as the n-th file is about to be flushed to the disk, or after it was put into place.
KILLED = """
import json, os, signal, sys
from acmil.preprocessing import atomic, job
from acmil.preprocessing.config import PreprocessConfig

at, count, flush = int(sys.argv[2]), 0, atomic._flush_to_disk

def counted(path):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

atomic._flush_to_disk = counted
job.preprocess(PreprocessConfig(**json.loads(sys.argv[1])), _beat_seconds=0.1)
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory, write_slide, make_tissue_picture) -> dict:
    """Slides with a dark stroke and a blurred part; all of `bad` is dark."""
    folder = tmp_path_factory.mktemp("limits")
    (folder / "slides").mkdir()
    torch.manual_seed(0)
    save_file(import_timm().create_model(ENCODER).state_dict(), folder / "random.safetensors")
    for seed, (name, width, height) in enumerate([("a", 400, 300), ("b", 300, 420), ("bad", 300, 300)]):
        picture = make_tissue_picture(width, height, ellipses=[(width // 2, height // 2, width // 3, height // 3)])
        grain = np.random.default_rng(seed).integers(0, 60, (height // 4 + 1, width // 4 + 1), dtype=np.uint8)
        grain = np.repeat(np.repeat(grain, 4, axis=0), 4, axis=1)[:height, :width, None]
        picture = np.where(picture.mean(axis=2, keepdims=True) < 220, picture - grain, picture).astype(np.uint8)
        half = slice(0, width // 2)
        picture[:, half] = cv2.GaussianBlur(picture[:, half], (0, 0), 4)
        # brown, as pigment is: dark, but tissue by its colour
        cv2.line(picture, (0, height // 2), (width, height // 2 + 40), (90, 60, 45), 900 if name == "bad" else 60)
        write_slide(folder / "slides" / f"{name}.tiff", picture)
    common = {"encoder": ENCODER, "weights": str(folder / "random.safetensors"), "tile_px": TILE_PX, "batch_size": 20}
    rest = {"device": "cpu", "precision": "fp32", "workers": 2, "feature_dtype": "float32"}
    return common | rest | {"slides": [str(folder / "slides")]}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """The job without limits."""
    out = tmp_path_factory.mktemp("whole") / "job"
    assert run(options, out).done == 3
    return out


def run(options, out, **changed):
    return preprocess(PreprocessConfig(**options | changed, out=out))


def rows(job) -> dict[str, dict[str, str]]:
    with (job / "slides.csv").open(encoding="utf-8", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def arrays(job, slide_id):
    file = open_feature_file(job / "features" / f"{slide_id}.h5")
    return np.asarray(file.features()), file.coords(), file.tissue_fraction(), file.quality()


def is_kept(quality):
    focus, dark = (quality[:, MEASURES.index(name)] for name in ("focus", "dark"))
    return (focus >= LIMITS["min_focus"]) & (dark <= LIMITS["max_dark"])


@pytest.mark.parametrize("batch_size", [7, 20, 64])
def test_exactly_the_tiles_beyond_the_limits_are_dropped(options, whole, tmp_path, batch_size):
    job = tmp_path / "job"
    summary = run(options, job, batch_size=batch_size, **LIMITS)
    assert (summary.done, summary.empty, summary.failed) == (2, 1, 0)
    n_kept = 0
    for name in ("a", "b"):
        features, *rest = arrays(whole, name)
        kept = is_kept(rest[-1])
        assert 5 < kept.sum() < len(kept) - 5
        found, *others = arrays(job, name)
        for array, expected in zip(others, rest, strict=True):
            np.testing.assert_array_equal(array, expected[kept])
        np.testing.assert_allclose(found, features[kept], rtol=2e-3, atol=1e-4)  # the network saw other batches
        row, row_whole = rows(job)[name], rows(whole)[name]
        assert (row["status"], int(row["tiles"]), int(row["tiles_dropped"])) == ("done", kept.sum(), (~kept).sum())
        measured = [column for column in row if column.endswith(("_median", "_mean"))]
        assert len(measured) == 6
        assert {column: row[column] for column in measured} == {column: row_whole[column] for column in measured}
        n_kept += kept.sum()
    assert summary.tiles == summary.new_tiles == n_kept


def test_a_slide_of_which_no_tile_is_left_is_empty_and_stays_so(options, whole, tmp_path):
    job = tmp_path / "job"
    run(options, job, **LIMITS)
    n_tiles = len(arrays(whole, "bad")[0])
    row = rows(job)["bad"]
    assert (row["status"], row["tiles"], row["tiles_dropped"], row["error"]) == ("empty", "0", str(n_tiles), "")
    assert f"no tile is within the limits of quality: all {n_tiles} were dropped" in row["alarms"]
    assert float(row["dark_mean"]) > 0.9
    assert sorted(path.name for path in (job / "features").iterdir()) == ["a.h5", "b.h5"]
    assert (job / "tissue/bad.geojson").is_file()
    before = rows(job)
    second = run(options, job, **LIMITS)
    assert (second.done, second.empty, second.skipped) == (0, 0, 3)
    assert rows(job) == before


def test_the_threads_change_no_byte(options, tmp_path):
    for workers in (1, 3):
        run(options, tmp_path / str(workers), workers=workers, **LIMITS)
    for name in ("a", "b"):
        one, three = ((tmp_path / workers / f"features/{name}.h5").read_bytes() for workers in ("1", "3"))
        assert one == three


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_dropped_tiles_leave_no_picture(options, tmp_path, container):
    job = tmp_path / "job"
    run(options, job, save_tiles=container, **LIMITS)
    assert sorted(path.stem for path in (job / "tiles").iterdir()) == ["a", "b"]
    if container == "folder":
        for name in ("a", "b"):
            pictures = {path.stem for path in (job / "tiles" / name).iterdir()}
            assert pictures == {f"{x}_{y}" for x, y in arrays(job, name)[1].tolist()}
    again = run(options, job, save_tiles=container, **LIMITS)
    assert (again.done, again.skipped) == (0, 3)


def test_limits_are_part_of_the_jobs_options(options, whole, tmp_path):
    with pytest.raises(JobError, match=r"min_focus: None → 0\.2; max_dark: None → 0\.4"):
        run(options, whole, **LIMITS)
    run(options, tmp_path / "job", **LIMITS)
    numbers = yaml.safe_load((tmp_path / "job/config.yaml").read_text(encoding="utf-8"))["numbers"]
    assert {name: numbers[name] for name in ("min_focus", "max_dark", "max_pen")} == LIMITS | {"max_pen": None}
    digests = {open_feature_file(job / "features/a.h5").meta.preprocessing_digest for job in (whole, tmp_path / "job")}
    assert len(digests) == 2
    with pytest.raises(JobError, match=r"min_focus: 0\.2 → 0\.3"):
        run(options, tmp_path / "job", **LIMITS | {"min_focus": 0.3})


def test_a_killed_job_ends_with_the_same_bytes(options, tmp_path):
    run(options, tmp_path / "quiet", save_tiles="folder", **LIMITS)
    job = tmp_path / "job"
    arguments = json.dumps(options | LIMITS | {"save_tiles": "folder", "out": str(job)})
    # The n-th flush of a fresh process: as its first slides' outlines, previews and features are written.
    n_temporary = 0
    for at in (9, 13, 16):
        killed = subprocess.run([sys.executable, "-c", KILLED, arguments, str(at)], capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        n_temporary += len(list(job.rglob("*.tmp")))
    assert n_temporary >= 2  # it was killed while it wrote
    summary = run(options, job, save_tiles="folder", **LIMITS)
    assert summary.done + summary.empty + summary.skipped == 3
    assert summary.skipped >= 1
    assert summary.done + summary.empty >= 1
    for folder in ("features", "tissue", "previews", "tiles"):
        names = sorted(path.relative_to(job) for path in (job / folder).rglob("*") if path.is_file())
        quiet = tmp_path / "quiet"
        assert names == sorted(path.relative_to(quiet) for path in (quiet / folder).rglob("*") if path.is_file())
        assert [(job / name).read_bytes() for name in names] == [(quiet / name).read_bytes() for name in names]
    columns = ("status", "tiles")
    found, expected = ([[row[column] for column in columns] for row in rows(out).values()] for out in (job, quiet))
    assert found == expected


def test_what_the_table_lost_is_found_again_or_left_empty(options, tmp_path):
    for name, limits in (("free", {}), ("limited", LIMITS)):
        job = tmp_path / name
        run(options, job, **limits)
        before = rows(job)["a"]
        for path in (*job.glob("rows/*"), job / "slides.csv"):
            path.unlink()
        assert run(options, job, **limits).skipped >= 2
        row = rows(job)["a"]
        assert (row["status"], row["tiles"]) == ("done", before["tiles"])
        columns = [column for column in row if column == "tiles_dropped" or column.endswith(("_median", "_mean"))]
        assert len(columns) == 7
        # Dropped tiles count too, and a file knows nothing of them.
        assert [row[column] for column in columns] == ([""] * 7 if limits else [before[column] for column in columns])


def test_of_fluorescence_no_quality_is_measured(options, tmp_path, write_slide):
    picture = np.zeros((300, 300, 3), np.uint8)
    cv2.circle(picture, (150, 150), 110, (0, 40, 160), -1)
    slide = write_slide(tmp_path / "glow.tiff", picture)
    assert run(options, tmp_path / "job", slides=[slide], tissue="dark").done == 1
    assert open_feature_file(tmp_path / "job/features/glow.h5").quality() is None
    row = rows(tmp_path / "job")["glow"]
    assert (row["tiles_dropped"], row["focus_median"], row["pen_mean"]) == ("0", "", "")
