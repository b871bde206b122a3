"""The tissue options in a whole job: alarms in the table, outlines put back, resuming after an edit."""

import csv
import json
import logging

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.feature_file import open_feature_file
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.job_folder import JobError

ENCODER = "test_efficientnet"


@pytest.fixture
def configured(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "random.safetensors"
    save_file(import_timm().create_model(ENCODER).state_dict(), weights)

    def make(*slides, **options):
        fixed = {"encoder": ENCODER, "weights": weights, "tile_px": 64, "device": "cpu", "precision": "fp32"}
        return PreprocessConfig(slides=list(slides), **{"out": tmp_path / "job", "workers": 1} | fixed | options)

    return make


def rows(job):
    with (job / "slides.csv").open(encoding="utf-8", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def outline(folder, slide_id, left, top, right, bottom):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    folder.mkdir(exist_ok=True)
    document = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (folder / f"{slide_id}.geojson").write_text(json.dumps(document), encoding="utf-8")


def test_alarms_stand_in_the_table_and_stay_there(configured, tmp_path, write_slide, caplog):
    picture = np.zeros((384, 512, 3), np.uint8)
    cv2.circle(picture, (256, 192), 120, (0, 0, 150), -1)
    slide = write_slide(tmp_path / "glow.tiff", picture)
    with caplog.at_level(logging.WARNING):
        preprocess(configured(slide))
    advice = "the slide is dark: if it is fluorescence, use --tissue dark"
    assert f"glow: {advice}" in caplog.messages
    assert rows(tmp_path / "job")["glow"]["alarms"].startswith(advice)
    assert preprocess(configured(slide)).skipped == 1
    assert rows(tmp_path / "job")["glow"]["alarms"].startswith(advice)
    summary = preprocess(configured(slide, tissue="dark", out=tmp_path / "dark"))
    assert (summary.done, rows(tmp_path / "dark")["glow"]["alarms"]) == (1, "")


def test_edited_outlines_decide_the_tiles_and_an_edit_is_done_anew(
    configured, tmp_path, write_slide, make_tissue_picture
):
    picture = make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)])
    slides = [write_slide(tmp_path / f"{name}.tiff", picture) for name in ("a", "b", "c", "d")]
    edited = tmp_path / "edited"
    outline(edited, "a", 0, 0, 128, 64)
    outline(edited, "b", 64, 64, 192, 192)
    (edited / "c.geojson").write_text("{")
    summary = preprocess(configured(*slides, tissue_from=edited))
    assert (summary.done, summary.failed) == (2, 2)
    job = tmp_path / "job"
    assert open_feature_file(job / "features/a.h5").coords().tolist() == [[0, 0], [64, 0]]
    assert open_feature_file(job / "features/b.h5").coords().tolist() == [[64, 64], [128, 64], [64, 128], [128, 128]]
    assert "outlines must be GeoJSON polygons" in rows(job)["c"]["error"]
    assert "found no d.geojson" in rows(job)["d"]["error"]
    outline(edited, "a", 0, 0, 64, 64)
    outline(edited, "d", 0, 0, 8, 8)
    summary = preprocess(configured(*slides, tissue_from=edited))
    assert (summary.done, summary.empty, summary.skipped, summary.failed) == (1, 1, 1, 1)
    assert open_feature_file(job / "features/a.h5").coords().tolist() == [[0, 0]]
    assert rows(job)["d"]["alarms"] == "only 0.00% of the slide is tissue; no tile holds enough tissue"
    outline(edited, "d", 0, 0, 64, 64)
    assert preprocess(configured(*slides, tissue_from=edited)).done == 1
    with pytest.raises(JobError, match="tissue_from: outlines → None"):
        preprocess(configured(*slides))


def test_only_what_outlines_enclose_decides_whether_a_slide_is_done_anew(
    configured, tmp_path, write_slide, make_tissue_picture
):
    slide = write_slide(tmp_path / "a.tiff", make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)]))
    edited, copied = tmp_path / "edited", tmp_path / "copied"
    outline(edited, "a", 0, 0, 192, 192)
    assert preprocess(configured(slide, tissue_from=edited)).done == 1
    shape = json.loads((edited / "a.geojson").read_text())
    copied.mkdir()
    (copied / "a.geojson").write_text(json.dumps(shape["geometry"], indent=2))  # the same, from elsewhere
    assert preprocess(configured(slide, tissue_from=copied)).skipped == 1
    before = open_feature_file(tmp_path / "job/features/a.h5").meta.preprocessing_digest
    hole = [[64, 64], [128, 64], [128, 128], [64, 128], [64, 64]]
    shape["geometry"]["coordinates"].append(hole)
    (copied / "a.geojson").write_text(json.dumps(shape))
    assert preprocess(configured(slide, tissue_from=copied)).done == 1
    assert [64, 64] not in open_feature_file(tmp_path / "job/features/a.h5").coords().tolist()
    assert open_feature_file(tmp_path / "job/features/a.h5").meta.preprocessing_digest != before
    (tmp_path / "job/tissue/a.geojson").unlink()  # nothing says any more what the features are of
    assert preprocess(configured(slide, tissue_from=copied)).done == 1


def test_a_folder_of_outlines_that_cannot_be_used_stops_the_job(configured, tmp_path, write_slide, make_tissue_picture):
    slide = write_slide(tmp_path / "a.tiff", make_tissue_picture(512, 384, ellipses=[(256, 192, 150, 100)]))
    with pytest.raises(JobError, match="must be a folder"):
        preprocess(configured(slide, tissue_from=tmp_path / "none"))
    assert not (tmp_path / "job").exists()
    preprocess(configured(slide))
    with pytest.raises(JobError, match="must not be the job's own folder"):
        preprocess(configured(slide, tissue_from=tmp_path / "job" / "tissue"))
    assert (tmp_path / "job/tissue/a.geojson").exists()


def test_a_resolution_that_contradicts_the_slide_is_an_alarm(configured, tmp_path, write_slide):
    picture = np.full((384, 512, 3), 240, np.uint8)
    cv2.circle(picture, (256, 192), 120, (150, 60, 120), -1)
    slide = write_slide(tmp_path / "a.tiff", picture, mpp=0.5)
    preprocess(configured(slide, mpp_override=0.25))
    assert rows(tmp_path / "job")["a"]["alarms"].startswith("level 0 is stated to have 0.25 µm/px, the slide says 0.5")
    preprocess(configured(slide, mpp_override=0.5, out=tmp_path / "same"))
    assert rows(tmp_path / "same")["a"]["alarms"] == ""
