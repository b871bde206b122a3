"""The whole job on small slides: what is written, what fails and stays alone, what is not done twice."""

import csv
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
import yaml
from safetensors.torch import save_file

from acmil.preprocessing.batch_encoder import BatchEncoder
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders import Encoder, EncoderError, create_encoder
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.feature_file import FeatureFileError, open_feature_file
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.job_folder import JobError
from acmil.preprocessing.job_run import JobRun
from acmil.preprocessing.quality import tile_quality
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.slide_list import SlideListError

ENCODER, N_FEATURES = "test_efficientnet", 256
TILE_PX = 64


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(import_timm().create_model(ENCODER).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def good_slides(tmp_path_factory, write_slide, make_tissue_picture) -> Path:
    """Three slides with tissue, of other sizes and resolutions."""
    folder = tmp_path_factory.mktemp("good")
    for name, width, height, mpp in (("a", 512, 384, 0.5), ("b", 700, 500, 0.25), ("c", 300, 600, 0.5)):
        ellipses = [(width // 2, height // 2, width // 3, height // 3)]
        write_slide(
            folder / f"{name}.tiff", make_tissue_picture(width, height, ellipses=ellipses, seed=ord(name)), mpp=mpp
        )
    return folder


@pytest.fixture
def slides(tmp_path, good_slides) -> Path:
    """A copy of the good slides that a test may add to and break."""
    return Path(shutil.copytree(good_slides, tmp_path / "slides"))


@pytest.fixture
def configured(tmp_path, weights):
    """Make a config for slides; the job folder is `job` unless another is given."""

    def make(*slides: Path, **options) -> PreprocessConfig:
        defaults = {"out": tmp_path / "job", "encoder": ENCODER, "weights": weights, "tile_px": TILE_PX}
        common = {"device": "cpu", "precision": "fp32", "batch_size": 16, "workers": 2}
        return PreprocessConfig(slides=list(slides), **defaults | common | options)

    return make


def rows(job: Path) -> dict[str, dict[str, str]]:
    with (job / "slides.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == [
            *("slide_id", "path", "status", "tiles", "mpp", "seconds", "error", "ink_removed", "alarms"),
            *("tiles_dropped", "focus_median", "pen_mean", "fold_mean", "blood_mean", "dark_mean", "stain_mean"),
            *("file_bytes", "mpp_given"),
        ]
        return {row["slide_id"]: row for row in reader}


def contents(job: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the job with its time of change, but for the table, its rows and the options in force."""
    return {
        str(path.relative_to(job)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in job.rglob("*")
        if path.is_file() and path.name not in ("slides.csv", "config.yaml") and path.parent.name != "rows"
    }


def test_a_job_writes_the_features_of_each_tile(slides, configured, weights, tmp_path):
    config = configured(slides, feature_dtype="float32")
    summary = preprocess(config)
    job = tmp_path / "job"
    assert sorted(path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()) == sorted(
        ["config.yaml", "slides.csv"]
        + [
            f"{kind}/{name}.{end}"
            for name in "abc"
            for kind, end in (("tissue", "geojson"), ("previews", "jpg"), ("features", "h5"), ("rows", "json"))
        ]
    )
    encoder = create_encoder(ENCODER, weights=weights, device="cpu", precision="fp32")
    n_tiles = 0
    for name, mpp in (("a", 0.5), ("b", 0.25), ("c", 0.5)):
        file = open_feature_file(job / "features" / f"{name}.h5")
        meta, side = file.meta, round(TILE_PX * 0.5 / mpp)
        assert (file.n_features, file.dtype, meta.tile_level0_px, meta.tile_px) == (
            N_FEATURES,
            np.float32,
            side,
            TILE_PX,
        )
        assert meta.level0_mpp == pytest.approx(mpp, rel=1e-4)
        assert meta.tile_mpp == pytest.approx(side * meta.level0_mpp / TILE_PX, rel=1e-12)
        assert (meta.slide_id, meta.encoder, meta.encoder_digest) == (name, ENCODER, encoder.digest)
        with Slide.open(slides / f"{name}.tiff") as slide:
            assert (meta.level0_width, meta.level0_height) == (slide.width, slide.height)
            tiles = np.stack(
                [slide.read_tile(x, y, size_level0_px=side, out_px=TILE_PX) for x, y in file.coords().tolist()]
            )
        expected = encoder(torch.from_numpy(tiles)).numpy()
        np.testing.assert_allclose(file.features(), expected, rtol=1e-3, atol=1e-5)
        assert (np.lexsort(file.coords().T) == np.arange(file.n_tiles)).all()  # by y, then by x
        assert file.tissue_fraction().min() >= 0.25
        np.testing.assert_array_equal(file.quality(), tile_quality(tiles))
        row = rows(job)[name]
        assert (row["status"], int(row["tiles"]), row["error"]) == ("done", file.n_tiles, "")
        assert row["path"] == str(slides / f"{name}.tiff")
        assert float(row["mpp"]) == pytest.approx(mpp, rel=1e-4)
        assert row["tiles_dropped"] == "0"
        means = file.quality().mean(axis=0)
        assert float(row["focus_median"]) == pytest.approx(np.median(file.quality()[:, 0]), abs=1e-4)
        names = ("pen_mean", "fold_mean", "blood_mean", "dark_mean", "stain_mean")
        assert [float(row[name]) for name in names] == pytest.approx(means[1:], abs=1e-4)
        assert float(row["stain_mean"]) > 0.2
        n_tiles += file.n_tiles
        outlines = json.loads((job / "tissue" / f"{name}.geojson").read_text())
        assert outlines["features"]
        assert cv2.imread(str(job / "previews" / f"{name}.jpg")).shape[2] == 3
    assert (summary.done, summary.empty, summary.failed, summary.skipped) == (3, 0, 0, 0)
    assert summary.tiles == summary.new_tiles == n_tiles > 20
    assert set(summary.seconds) == {"setup", "warm_up", "tissue", "read", "embed", "write", "total"}
    assert summary.seconds["total"] > summary.seconds["embed"] > 0
    assert f"{n_tiles} tiles" in str(summary)


def test_config_yaml_says_what_was_in_force(slides, configured, tmp_path, weights):
    preprocess(configured(slides, device="auto", workers=None))
    stored = yaml.safe_load((tmp_path / "job" / "config.yaml").read_text(encoding="utf-8"))
    assert set(stored["options"]) == set(PreprocessConfig.model_fields)
    assert stored["options"]["tile_mpp"] == 0.5
    assert stored["options"]["workers"] >= 1
    assert stored["options"]["device"] in ("cpu", "cuda")
    encoder = create_encoder(ENCODER, weights=weights, device="cpu", precision="fp32")
    assert stored["numbers"]["encoder_digest"] == encoder.digest
    file = open_feature_file(tmp_path / "job" / "features" / "a.h5")
    assert file.meta.preprocessing_digest == stored["preprocessing_digest"]
    assert stored["versions"]["torch"] == torch.__version__
    readers = {"openslide-python", "openslide-bin", "simplejpeg", "pillow", "cucim-cu12", "cucim-cu13"}
    assert set(stored["versions"]) == {"acmil", "torch", "timm", "numpy", "opencv-python-headless", *readers}
    assert stored["versions"]["pillow"] == PIL.__version__


def test_threads_and_company_change_nothing(slides, configured, tmp_path):
    preprocess(configured(slides, out=tmp_path / "one", workers=1))
    preprocess(configured(slides, out=tmp_path / "four", workers=4))
    preprocess(configured(slides, out=tmp_path / "six", workers=6))  # processes, on Linux
    for name in ("a", "b", "c"):
        alone = (tmp_path / "one/features" / f"{name}.h5").read_bytes()
        assert (tmp_path / "four/features" / f"{name}.h5").read_bytes() == alone
        assert (tmp_path / "six/features" / f"{name}.h5").read_bytes() == alone
    preprocess(configured(slides / "b.tiff", out=tmp_path / "alone"))
    assert (tmp_path / "alone/features/b.h5").read_bytes() == (tmp_path / "one/features/b.h5").read_bytes()
    preprocess(configured(slides / "b.tiff", out=tmp_path / "fives", batch_size=5))
    fives, together = (open_feature_file(tmp_path / job / "features/b.h5").features() for job in ("fives", "one"))
    np.testing.assert_allclose(fives, together, rtol=2e-3, atol=1e-4)


def add_bad_slides(slides: Path, write_slide, make_tissue_picture) -> None:
    picture = make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)])
    (slides / "broken.svs").write_text("this is no slide\n" * 60)
    (slides / "empty_file.svs").touch()
    write_slide(slides / "tiny.tiff", picture[:16, :16], downsamples=(1,), tile_px=16)
    write_slide(slides / "no_mpp.tiff", picture, mpp=None)
    write_slide(slides / "absurd.tiff", picture, mpp=352.78)
    write_slide(slides / "too_coarse.tiff", picture, mpp=2.0)
    write_slide(slides / "glass.tiff", make_tissue_picture(512, 384, ellipses=[]))


def test_bad_slides_are_rows_and_the_good_ones_are_done(slides, configured, tmp_path, write_slide, make_tissue_picture):
    add_bad_slides(slides, write_slide, make_tissue_picture)
    summary = preprocess(configured(slides))
    job = tmp_path / "job"
    statuses = {name: row["status"] for name, row in rows(job).items()}
    failed = {"broken", "empty_file", "no_mpp", "absurd", "too_coarse"}
    assert statuses == dict.fromkeys("abc", "done") | dict.fromkeys(failed, "failed") | {
        "tiny": "empty",
        "glass": "empty",
    }
    assert (summary.done, summary.empty, summary.failed, summary.skipped) == (3, 2, 5, 0)
    errors = {name: rows(job)[name]["error"] for name in failed}
    assert "not a slide" in errors["broken"]
    assert "--mpp-override" in errors["no_mpp"]
    assert "352.7" in errors["absurd"]
    assert "tile_mpp" in errors["too_coarse"]
    assert all(name in errors[name] for name in failed)
    assert {path.stem for path in (job / "features").iterdir()} == {"a", "b", "c"}
    assert {path.stem for path in (job / "tissue").iterdir()} == {"a", "b", "c", "tiny", "glass"}
    assert {path.stem for path in (job / "previews").iterdir()} == {"a", "b", "c", "tiny", "glass"}


def test_a_second_run_does_nothing_twice_and_tries_failed_slides_again(
    slides, configured, tmp_path, write_slide, make_tissue_picture
):
    add_bad_slides(slides, write_slide, make_tissue_picture)
    first = preprocess(configured(slides))
    before, table = contents(tmp_path / "job"), rows(tmp_path / "job")
    shutil.copy(slides / "a.tiff", slides / "no_mpp.tiff")
    second = preprocess(configured(slides))
    assert (second.done, second.empty, second.failed, second.skipped) == (1, 0, 4, 5)
    after = contents(tmp_path / "job")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"features/no_mpp.h5", "tissue/no_mpp.geojson", "previews/no_mpp.jpg"}
    again = rows(tmp_path / "job")
    assert again["no_mpp"]["status"] == "done"
    assert {name: row for name, row in again.items() if name != "no_mpp"} == {
        name: row for name, row in table.items() if name != "no_mpp"
    }
    assert second.tiles == first.tiles + int(again["no_mpp"]["tiles"])
    assert second.new_tiles == int(again["no_mpp"]["tiles"])


def test_damaged_and_lost_feature_files_are_made_again(slides, configured, tmp_path):
    preprocess(configured(slides))
    features = tmp_path / "job" / "features"
    before = {name: (features / f"{name}.h5").read_bytes() for name in "abc"}
    (features / "a.h5").write_bytes(before["a"][:-100])
    (features / "b.h5").unlink()
    (features / ".c.h5.0123456789ab-7-5-00000000.tmp").write_bytes(b"left by a killed run on another machine")
    os.utime(features / ".c.h5.0123456789ab-7-5-00000000.tmp", (0, 0))
    (features / ".c.h5.0123456789ab-7-5-ffffffff.tmp").write_bytes(b"being written elsewhere, as far as is known")
    summary = preprocess(configured(slides))
    assert (summary.done, summary.skipped) == (2, 1)
    (features / ".c.h5.0123456789ab-7-5-ffffffff.tmp").unlink()
    assert {path.name for path in features.iterdir()} == {"a.h5", "b.h5", "c.h5"}
    assert {name: (features / f"{name}.h5").read_bytes() for name in "abc"} == before


def test_slides_added_later_join_the_table(slides, configured, tmp_path):
    preprocess(configured(slides / "c.tiff"))
    summary = preprocess(configured(slides / "a.tiff"))
    assert (summary.done, summary.skipped) == (1, 0)
    assert {name: row["status"] for name, row in rows(tmp_path / "job").items()} == {"c": "done", "a": "done"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tile_px": 128}, "tile_px: 64 → 128"),
        ({"tile_mpp": 1.0, "min_tissue": 0.5}, "tile_mpp: 0.5 → 1.0; min_tissue: 0.25 → 0.5"),
        ({"precision": "bf16"}, "precision: fp32 → bf16"),
        ({"tissue": "dark", "remove_ink": False}, "tissue: brightfield → dark; remove_ink: True → False"),
        ({"mpp_override": 0.25}, r"mpp_override: None → 0.25.*CSV with a column mpp"),
    ],
)
def test_other_options_on_the_same_folder_are_refused(slides, configured, tmp_path, changed, message):
    preprocess(configured(slides / "a.tiff"))
    before, config = contents(tmp_path / "job"), (tmp_path / "job" / "config.yaml").read_bytes()
    with pytest.raises(JobError, match=message):
        preprocess(configured(slides / "a.tiff", **changed))
    assert contents(tmp_path / "job") == before
    assert (tmp_path / "job" / "config.yaml").read_bytes() == config


def test_other_weights_are_refused(slides, configured, tmp_path, weights):
    preprocess(configured(slides / "a.tiff"))
    torch.manual_seed(1)
    save_file(import_timm().create_model(ENCODER).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(JobError, match=r"encoder_digest: [0-9a-f]{64} → [0-9a-f]{64}"):
        preprocess(configured(slides / "a.tiff", weights=tmp_path / "other.safetensors"))


def test_options_that_change_no_numbers_may_change(slides, configured):
    preprocess(configured(slides / "a.tiff"))
    summary = preprocess(configured(slides / "a.tiff", workers=1, batch_size=3, previews=False))
    assert (summary.done, summary.skipped) == (0, 1)


def test_a_job_that_only_failed_may_be_given_other_options(configured, tmp_path, write_slide, make_tissue_picture):
    slide = write_slide(
        tmp_path / "no_mpp.tiff", make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)]), mpp=None
    )
    assert preprocess(configured(slide)).failed == 1
    summary = preprocess(configured(slide, mpp_override=0.5))
    assert (summary.done, summary.failed) == (1, 0)
    assert open_feature_file(tmp_path / "job/features/no_mpp.h5").meta.level0_mpp == 0.5


def test_a_resolution_stated_in_the_list_wins_and_is_done_anew_when_changed(slides, configured, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,slide_id,mpp\nslides/b.tiff,patient_1,0.5\nslides/c.tiff,,\n", encoding="utf-8")
    assert preprocess(configured(table)).done == 2
    job = tmp_path / "job"
    assert open_feature_file(job / "features/patient_1.h5").meta.tile_level0_px == TILE_PX
    assert (rows(job)["patient_1"]["mpp"], rows(job)["c"]["mpp"]) == ("0.5", "0.5")
    assert preprocess(configured(table)).skipped == 2
    table.write_text("path,slide_id,mpp\nslides/b.tiff,patient_1,0.25\nslides/c.tiff,,\n", encoding="utf-8")
    summary = preprocess(configured(table))
    assert (summary.done, summary.skipped) == (1, 1)
    assert open_feature_file(job / "features/patient_1.h5").meta.tile_level0_px == 2 * TILE_PX
    assert (rows(job)["patient_1"]["mpp_given"], rows(job)["c"]["mpp_given"]) == ("true", "false")


def test_a_resolution_that_is_not_stated_any_more_gives_way_to_the_slides_own(
    slides, configured, tmp_path, caplog, make_tissue_picture, write_slide
):
    picture = make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)])
    write_slide(slides / "no_mpp.tiff", picture, mpp=None)
    table, job = tmp_path / "list.csv", tmp_path / "job"
    table.write_text("path,mpp\nslides/a.tiff,0.5\nslides/b.tiff,0.5\nslides/no_mpp.tiff,0.5\n", encoding="utf-8")
    assert preprocess(configured(table)).done == 3
    assert rows(job)["b"]["mpp"] == "0.5"
    table.write_text("path\nslides/a.tiff\nslides/b.tiff\nslides/no_mpp.tiff\n", encoding="utf-8")
    summary = preprocess(configured(table))  # a states the same, no_mpp nothing: both stay
    assert (summary.done, summary.skipped) == (1, 2)
    assert caplog.text.count("b: was done at 0.5 µm/px, which is not given any more, and the slide states 0.25") == 1
    assert open_feature_file(job / "features/b.h5").meta.tile_level0_px == 2 * TILE_PX
    assert rows(job)["b"]["mpp_given"] == "false"
    assert preprocess(configured(table)).skipped == 3


def test_another_slide_of_the_same_name_is_done_anew_by_the_next_job_too(slides, configured, tmp_path, monkeypatch):
    """Where a job ends before it comes to that slide."""
    preprocess(configured(slides / "a.tiff"))
    (tmp_path / "other").mkdir()
    other = shutil.copy(slides / "b.tiff", tmp_path / "other/a.tiff")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobRun, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(configured(other))
    assert preprocess(configured(other)).done == 1
    assert open_feature_file(tmp_path / "job/features/a.h5").meta.tile_level0_px == 2 * TILE_PX


def test_another_slide_of_the_same_name_is_done_anew_and_a_moved_one_is_not(slides, configured, tmp_path, caplog):
    job, moved, other = tmp_path / "job", tmp_path / "moved", tmp_path / "other"
    preprocess(configured(slides / "a.tiff"))
    before = (job / "features/a.h5").read_bytes()
    for folder, name in ((moved, "a.tiff"), (other, "b.tiff")):
        folder.mkdir()
        shutil.copy(slides / name, folder / "a.tiff")
    assert preprocess(configured(moved / "a.tiff")).skipped == 1
    assert rows(job)["a"]["path"] == str(moved / "a.tiff")
    assert "is not the slide that was done under this name" not in caplog.text
    assert preprocess(configured(other / "a.tiff")).done == 1
    assert "is not the slide that was done under this name" in caplog.text
    assert (job / "features/a.h5").read_bytes() != before
    assert open_feature_file(job / "features/a.h5").meta.level0_mpp == 0.25
    assert preprocess(configured(other / "a.tiff")).skipped == 1


def test_right_features_stay_when_a_slide_is_done_again_for_its_pictures_and_fails(slides, configured, tmp_path):
    job = tmp_path / "job"
    preprocess(configured(slides / "a.tiff"))
    before = (job / "features/a.h5").read_bytes()
    size = (slides / "a.tiff").stat().st_size
    (slides / "a.tiff").write_bytes(bytes(size))
    assert preprocess(configured(slides / "a.tiff", save_tiles="tar")).failed == 1
    assert (job / "features/a.h5").read_bytes() == before


def test_features_that_cannot_be_read_today_are_kept(slides, configured, tmp_path, monkeypatch):
    """Locked by another program, say: the slide is a failed row, and its file is as it was."""
    job = tmp_path / "job"
    preprocess(configured(slides))
    before = (job / "features/b.h5").read_bytes()

    def locked(path, **options):
        if path.name != "b.h5":
            return open_feature_file(path, **options)
        raise FeatureFileError(f"cannot open {path}") from BlockingIOError(errno.EAGAIN, "unable to lock file")

    monkeypatch.setattr("acmil.preprocessing.job_folder.open_feature_file", locked)
    summary = preprocess(configured(slides))
    assert (summary.done, summary.failed, summary.skipped) == (0, 1, 2)
    assert rows(job)["b"]["status"] == "failed"
    assert (job / "features/b.h5").read_bytes() == before
    monkeypatch.undo()
    assert preprocess(configured(slides)).skipped == 3
    assert rows(job)["b"]["status"] == "done"


def test_the_table_of_a_job_is_a_list_of_slides(slides, configured, tmp_path, caplog):
    preprocess(configured(slides))
    caplog.clear()
    summary = preprocess(configured(tmp_path / "job" / "slides.csv"))
    assert summary.skipped == 3
    assert "are not used" not in caplog.text


def test_what_is_not_the_jobs_own_is_left_alone(slides, configured, tmp_path):
    job = tmp_path / "job"
    (job / ".mydata.tmp").mkdir(parents=True)
    (job / ".notes.tmp").write_text("mine")
    for path in (job / ".mydata.tmp", job / ".notes.tmp"):
        os.utime(path, (1e9, 1e9))
    preprocess(configured(slides / "a.tiff"))
    assert (job / ".mydata.tmp").is_dir()
    assert (job / ".notes.tmp").read_text() == "mine"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("options: {cohort: c.csv}\n")
    with pytest.raises(JobError, match=r"config\.yaml must be as the job wrote it"):
        preprocess(configured(slides / "a.tiff", out=run))
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_slide_that_fails_midway_leaves_nothing(slides, configured, tmp_path, monkeypatch):
    read_tile = Slide.read_tile
    reads = []

    def failing(self, x, y, **options):
        reads.append(self.slide_id)
        if self.slide_id == "b" and reads.count("b") == 20:
            raise SlideError("slide 'b': damaged here")
        return read_tile(self, x, y, **options)

    monkeypatch.setattr(Slide, "read_tile", failing)
    summary = preprocess(configured(slides, tile_px=32, batch_size=4))
    job = tmp_path / "job"
    assert (summary.done, summary.failed) == (2, 1)
    assert rows(job)["b"]["error"] == "slide 'b': damaged here"
    assert sorted(path.name for path in (job / "features").iterdir()) == ["a.h5", "c.h5"]
    assert not (job / "tissue/b.geojson").exists()
    monkeypatch.undo()
    assert preprocess(configured(slides, tile_px=32, batch_size=4)).done == 1
    assert int(rows(job)["b"]["tiles"]) > 20


def test_an_interrupted_job_goes_on_where_it_was(slides, configured, tmp_path):
    class Impatient:
        def begin(self, title, total):
            assert (title, total) == ("slides", 3)

        def advance(self, steps=1, note=""):
            if steps:
                assert note.startswith("a: done")
                raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        preprocess(configured(slides), progress=Impatient())
    statuses = {name: row["status"] for name, row in rows(tmp_path / "job").items()}
    n_done = list(statuses.values()).count("done")  # those that were with the writing thread are done too
    assert statuses["a"] == "done"
    assert set(statuses.values()) <= {"done", "pending"}
    assert list((tmp_path / "job/leases").iterdir()) == []
    summary = preprocess(configured(slides))
    assert (summary.done, summary.skipped) == (3 - n_done, n_done)


def test_features_that_float16_cannot_hold_fail_the_slide(slides, configured, tmp_path, weights):
    from acmil.preprocessing.encoders.weights import read_weights

    huge = {
        name: tensor * 1e6 if name.startswith("bn2.") and tensor.is_floating_point() else tensor
        for name, tensor in read_weights(weights).items()
    }
    huge["bn2.bias"] = torch.full_like(huge["bn2.bias"], 1e6)
    save_file(huge, tmp_path / "huge.safetensors")
    summary = preprocess(configured(slides / "a.tiff", weights=tmp_path / "huge.safetensors"))
    assert (summary.done, summary.failed, summary.new_tiles) == (0, 1, 0)
    assert "NaN or infinity" in rows(tmp_path / "job")["a"]["error"]
    assert "float32" in rows(tmp_path / "job")["a"]["error"]
    assert [path.name for path in (tmp_path / "job").rglob("*") if path.is_file() and "a." in path.name] == ["a.json"]


def test_what_is_wrong_at_the_start_is_raised_before_anything_is_written(slides, configured, tmp_path):
    (tmp_path / "none").mkdir()
    for given, options, error in (
        (tmp_path / "no.svs", {}, SlideListError),
        (tmp_path / "none", {}, SlideListError),
        (slides, {"weights": tmp_path / "no.pth"}, EncoderError),
        (slides, {"encoder": "resnet_18", "weights": None}, EncoderError),
    ):
        with pytest.raises(error):
            preprocess(configured(given, **options))
    assert not (tmp_path / "job").exists()


def test_a_folder_with_other_things_is_refused(slides, configured, tmp_path):
    preprocess(configured(slides / "a.tiff"))
    job = tmp_path / "job"
    config = (job / "config.yaml").read_text()
    (job / "config.yaml").write_text("tile_px: 64\n")
    with pytest.raises(JobError, match=r"config\.yaml must be as the job wrote it"):
        preprocess(configured(slides / "a.tiff"))
    (job / "config.yaml").write_text(config)
    (job / "slides.csv").write_text("name,label\n")
    with pytest.raises(ValueError, match=r"slides\.csv must have the columns slide_id,path"):
        preprocess(configured(slides / "a.tiff"))


def test_progress_counts_slides(slides, configured):
    told = []

    class Listener:
        def begin(self, title, total):
            told.append((title, total))

        def advance(self, steps=1, note=""):
            told.append(steps)

        def end(self):
            told.append("end")

    preprocess(configured(slides), progress=Listener())
    assert told[0] == ("slides", 3)
    assert told[-1] == "end"
    assert sum(steps for steps in told[1:-1]) == 3
    told.clear()
    preprocess(configured(slides), progress=Listener())
    assert told == []


def test_the_real_slides_and_the_edge_cases_in_one_job(shared_data, configured, tmp_path):
    summary = preprocess(configured(shared_data / "slides", tile_px=224))
    statuses = {name: row["status"] for name, row in rows(tmp_path / "job").items()}
    dapi = statuses.pop("test3-DAPI-2-(387)")  # fluorescence: the tissue finder is not made for it
    assert dapi in ("done", "empty")
    assert statuses == {
        "CMU-1-Small-Region": "done",
        "boxes_0": "empty",
        "boxes": "failed",
        "broken": "failed",
        "small": "empty",
        "unopenable": "failed",
        "unreadable": "failed",
        "tcga-cr-7395-01a-01-ts1": "failed",
    }
    errors = {name: row["error"] for name, row in rows(tmp_path / "job").items()}
    assert "352.778" in errors["boxes"]
    assert "no resolution" in errors["tcga-cr-7395-01a-01-ts1"]
    assert "Unsupported TIFF compression" in errors["unopenable"]
    assert "Bogus marker length" in errors["unreadable"]
    assert summary.failed == 5
    file = open_feature_file(tmp_path / "job/features/CMU-1-Small-Region.h5")
    assert 40 <= file.n_tiles <= 70  # about a third to a half of 117 tiles of 224 px
    assert (file.meta.level0_width, file.meta.level0_height, file.meta.level0_mpp) == (2220, 2967, 0.499)
    assert file.meta.level0_magnification == 20.0
    assert file.meta.target_magnification == pytest.approx(20.0 * 0.499 / file.meta.tile_mpp)


def test_the_encoder_warms_up_while_the_first_slide_is_opened(slides, configured, monkeypatch):
    """Opening waits until the warm-up has begun, and the warm-up until a slide has been opened."""
    warming, opened = threading.Event(), threading.Event()
    open_slide = Slide.open

    def opening(*arguments, **options):
        assert warming.wait(20)
        opened.set()
        return open_slide(*arguments, **options)

    def warm_up(encoder, tile_px):
        assert tile_px == TILE_PX
        warming.set()
        assert opened.wait(20)

    monkeypatch.setattr(Slide, "open", opening)
    monkeypatch.setattr(BatchEncoder, "warm_up", warm_up)
    monkeypatch.setattr(Encoder, "is_compiled", True)
    summary = preprocess(configured(slides))
    assert summary.done == 3
    assert summary.seconds["warm_up"] > 0
