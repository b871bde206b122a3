"""The tissue that a job took a slide to have, read back."""

import json
import logging

import numpy as np
import pytest
import yaml

from acmil.preprocessing.job_tissue import tissue_of_job
from acmil.preprocessing.tissue_outlines import OutlineError


@pytest.fixture
def glowing(make_memory_slide):
    """A fluorescence slide: a bright square of 800 px on black."""
    image = np.zeros((2000, 2000, 3), np.uint8)
    image[400:1200, 600:1400] = (20, 60, 180)
    return make_memory_slide(image)


def job(folder, **numbers):
    (folder / "tissue").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"numbers": numbers}))
    return folder


def test_the_jobs_outlines_are_the_tissue(glowing, tmp_path):
    folder = job(tmp_path / "job", tissue="dark", tissue_mpp=5.0, tissue_from="outlines")
    ring = [[0, 0], [500, 0], [500, 300], [0, 300], [0, 0]]
    (folder / "tissue" / "memory.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    tissue = tissue_of_job(glowing, folder)
    assert tissue.downsample == 10.0
    assert tissue.mask.sum() == 50 * 30
    assert tissue.mask[:30, :50].all()
    (folder / "tissue" / "memory.geojson").write_text("{")
    with pytest.raises(OutlineError, match=r"memory\.geojson"):
        tissue_of_job(glowing, folder)


def test_without_outlines_the_jobs_options_find_it(glowing, tmp_path, caplog):
    tissue = tissue_of_job(glowing, job(tmp_path / "job", tissue="dark", tissue_mpp=5.0, remove_ink=True))
    assert tissue.downsample == 10.0
    assert tissue.mask[45:115, 65:135].all()
    assert tissue.fraction == pytest.approx(0.16, abs=0.02)
    assert not caplog.records


def test_ink_stays_tissue_where_the_job_kept_it(make_memory_slide, tmp_path):
    image = np.full((4000, 4000, 3), 245, np.uint8)
    image[1000:3000, 1000:3000] = (40, 70, 200)  # as blue as ink
    slide = make_memory_slide(image)
    kept = tissue_of_job(slide, job(tmp_path / "kept", tissue="brightfield", tissue_mpp=8.0, remove_ink=False))
    removed = tissue_of_job(slide, job(tmp_path / "removed", tissue="brightfield", tissue_mpp=8.0, remove_ink=True))
    assert kept.fraction == pytest.approx(0.25, abs=0.01)
    assert removed.fraction < 0.01


@pytest.mark.parametrize("content", [None, "numbers: 3", "learning_rate: 0.1", "{"])
def test_a_folder_that_is_no_jobs_gives_the_defaults_and_says_so(glowing, tmp_path, caplog, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with caplog.at_level(logging.INFO):
        tissue = tissue_of_job(glowing, tmp_path)
    assert tissue.downsample == 16.0
    assert f"{tmp_path} has no config.yaml of a job" in caplog.text
