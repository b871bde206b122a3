"""The notebooks run from top to bottom, on a folder laid out like the demo's or on one slide, and show pictures."""

import json
import shutil
import sys
import tarfile

import nbformat
import numpy as np
import pytest
import tifffile
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from acmil import exploration
from acmil.config import UmapConfig
from acmil.exploration import ExplorationError, open_demo, open_run
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.feature_file import open_feature_file
from acmil.projection import umap

SLIDES = ("s012", "s014", "s015")


@pytest.fixture(scope="module")
def small_demo(trained_run, feature_cohort, tmp_path_factory):
    """Three slides of noise with features, a run, a UMAP and one outlined lesion."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("slides", "lesions"):
        (folder / name).mkdir()
    shutil.copytree(feature_cohort.features, folder / "job" / "features")
    shutil.copytree(trained_run, folder / "run")
    generator = np.random.default_rng(0)
    for slide_id in SLIDES:
        meta = open_feature_file(feature_cohort.features / f"{slide_id}.h5").meta
        image = generator.integers(90, 250, (meta.level0_height, meta.level0_width, 3), dtype=np.uint8)
        tifffile.imwrite(folder / "slides" / f"{slide_id}.tif", image, tile=(256, 256), photometric="rgb")
    ring = [[0, 0], [448, 0], [448, 224], [0, 224], [0, 0]]
    (folder / "lesions" / "s014.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    umap(
        UmapConfig(
            run=trained_run, cohort=feature_cohort.csv, features=feature_cohort.features, out=folder / "umap",
            tiles_per_slide=8, split="all", device="cpu",
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def demo(small_demo):
    return open_demo(small_demo)


def test_slides_that_training_never_saw_come_first(demo):
    splits = [demo.run.splits[name] for name in demo.slide_ids]
    assert splits == sorted(splits, key=["test", "val", "train"].index)
    assert set(demo.slide_ids) == set(SLIDES)
    assert demo.predictions()["split"].drop_duplicates().tolist() == ["test", "val", "train"]
    assert demo.branches == ["mean", "0", "1", "2", "3", "4"]


def test_threshold_hides_tiles(demo):
    slide_id = demo.slide_ids[0]
    whole = demo.map_figure(slide_id).axes[1].get_images()[0].get_array()
    part = demo.map_figure(slide_id, threshold=1.5).axes[1].get_images()[0].get_array()
    thumbnail = demo.view(slide_id).thumbnail
    share = [(image != thumbnail).any(axis=-1).mean() for image in (whole, part)]
    expected = (demo.view(slide_id).scores("mean", "relative") >= 1.5).mean()
    assert share[0] == pytest.approx(1.0, abs=0.01)
    assert share[1] == pytest.approx(expected, abs=0.02)


def test_facts_count_attention_in_the_lesion(demo):
    facts = demo.facts("s014", branch="2")
    slide = demo.view("s014")
    assert facts["tiles whose centre is in a lesion"] == f"{2 / len(slide.coords):.1%}"
    assert facts["attention on them"] == f"{slide.attention[2, :2].sum():.1%}"
    assert "attention on them" not in demo.facts("s015")


def test_umap_of_a_branch_rings_its_attended_tiles(demo):
    slide_id = demo.slide_ids[0]
    slide = demo.view(slide_id)
    sampled = demo.umap.loc[demo.umap["slide_id"] == slide_id, ["x", "y"]].to_numpy()
    in_sample = (slide.coords[:, None] == sampled).all(axis=-1).any(axis=1)  # (N,)
    expected = (slide.scores("3", "relative")[in_sample] >= 1.2).sum()
    own = demo.umap_figure(slide_id, branch="3", threshold=1.2).axes[0].collections[1]
    assert (own.get_edgecolors()[:, 3] > 0).sum() == expected


def test_top_tiles_are_those_pixels(demo):
    figure = demo.tiles_figure(demo.slide_ids[0], count=3)
    slide = demo.view(demo.slide_ids[0])
    best = slide.coords[np.argmax(slide.attention.mean(axis=0))]
    image = tifffile.imread(slide.path)[best[1] : best[1] + 224, best[0] : best[0] + 224]
    shown = figure.axes[0].get_images()[0].get_array()
    assert abs(float(shown.mean()) - float(image.mean())) < 1.0


def test_errors_name_the_folder_and_the_slide(demo, tmp_path, monkeypatch):
    with pytest.raises(ExplorationError, match="not a finished demo"):
        open_demo(tmp_path)
    with pytest.raises(ExplorationError, match="got 'other'"):
        demo.view("other")
    monkeypatch.delenv("ACMIL_DEMO", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExplorationError, match="no demo folder"):
        open_demo()


def test_a_run_of_ones_own_is_opened_with_slides_by_list_and_without_a_umap(small_demo, demo, tmp_path):
    lines = ["path,slide_id"]
    for number, slide_id in enumerate((*SLIDES, "s999")):
        lines.append(f"{tmp_path}/scan_{number}.tif,{slide_id}")
        shutil.copy(small_demo / "slides" / f"{SLIDES[number % 3]}.tif", tmp_path / f"scan_{number}.tif")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    features = small_demo / "job" / "features"
    own = open_run(small_demo / "run", slides=str(tmp_path / "list.csv"), features=str(features))
    assert own.slide_ids == demo.slide_ids  # s999 has no features
    assert np.array_equal(own.view("s014").attention, demo.view("s014").attention)
    assert own.map_figure("s014").axes
    assert "attention on them" not in own.facts("s014")
    with pytest.raises(ExplorationError, match=r"what `acmil umap` leaves, got no folder.*umap=FOLDER"):
        own.umap_figure("s014")
    with pytest.raises(ExplorationError, match=r"got none of the 4 \(s012, s014, s015, …\)"):
        open_run(small_demo / "run", slides=[tmp_path / "list.csv"], features=tmp_path)


def test_interact_shows_once_without_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    calls = []
    exploration.interact(lambda **chosen: calls.append(chosen), slide=["a", "b"], threshold=(0.5, 2.0, 0.5))
    assert calls == [{"slide": "a", "threshold": 0.5}]


def test_controls_call_again_at_each_change(monkeypatch):
    import IPython.display

    shown, calls = [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    exploration.interact(lambda **chosen: calls.append(chosen), slide=["a", "b"], threshold=(0.5, 2.0, 0.5))
    slide, threshold, _ = shown[0].children
    assert calls == []
    slide.value = "b"
    threshold.value = 1.5
    assert calls == [{"slide": "b", "threshold": 0.5}, {"slide": "b", "threshold": 1.5}]


def test_notebook_runs_and_shows_pictures(small_demo, request, monkeypatch):
    monkeypatch.setenv("ACMIL_DEMO", str(small_demo))
    path = request.config.rootpath / "notebooks" / "heatmap_exploration.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are to be cleared before saving"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4


def test_one_slide_from_file_to_features(stained_slide, request, monkeypatch, tmp_path):
    """The first notebook, on a synthetic slide and with random weights: it needs no network."""
    torch.manual_seed(0)
    save_file(import_timm().create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "random.safetensors")
    monkeypatch.setenv("ACMIL_SLIDE", str(stained_slide))
    monkeypatch.setenv("ACMIL_WEIGHTS", str(tmp_path / "random.safetensors"))
    path = request.config.rootpath / "notebooks" / "01_slides_to_features.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are to be cleared before saving"
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "slides: 1 done, 0 empty, 0 failed" in said
    job = tmp_path / "slides_to_features_job"
    file = open_feature_file(job / "features" / "stained.h5")
    assert f"features ({file.n_tiles}, 1280) float16" in said
    assert (file.meta.encoder, file.meta.tile_px) == ("tf_efficientnet_lite0", 224)
    with tarfile.open(job / "tiles" / "stained.tar") as archive:
        assert len(archive.getmembers()) == file.n_tiles
