"""`acmil demo`: what it leaves, and what it reaches."""

import json
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest

from acmil.config import DemoConfig, TrainConfig
from acmil.config_file import load_config
from acmil.demo.analysis import lesion_localisation, mean_pool_auroc, tile_auroc
from acmil.demo.manifest import composing_options, write_manifest
from acmil.demo.page import group_calls
from acmil.demo.pipeline import demo
from acmil.demo.planted import POSITIVE


class Links(HTMLParser):
    """Every file or address that a page refers to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_it_leaves_what_it_promises(demo_folder):
    summary = json.loads((demo_folder / "summary.json").read_text())
    assert summary["n_slides"] == 12
    assert summary["n_test_slides"] >= 2
    assert summary["n_tiles"] > 12 * 50
    assert 0 <= summary["test_auroc_ci"][0] <= summary["test_auroc"] <= summary["test_auroc_ci"][1] <= 1
    assert 0 <= summary["lesion_tile_auroc"] <= 1
    assert {"compose", "preprocess", "train ACMIL", "evaluate", "heatmaps", "umap", "total"} <= set(summary["seconds"])
    assert summary["device"] == "cpu"
    assert "synthetic" in summary["data"]
    assert "no medical meaning" in summary["data"]


def test_the_page_opens_from_disk_without_a_network(demo_folder):
    page = (demo_folder / "index.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert len(links.found) >= 8
    for link in links.found:
        assert not re.match(r"[a-z]+:|//", link), f"{link} is not a file of the demo"
        assert (demo_folder / link).is_file(), link
    assert "url(" not in page
    assert "Synthetic data" in page
    assert "no medical meaning" in page
    assert "No truth exists for this slide" in page


def test_figures_on_the_page_are_those_of_the_evaluation(demo_folder):
    summary = json.loads((demo_folder / "summary.json").read_text())
    evaluation = json.loads((demo_folder / "evaluation" / "metrics.json").read_text())
    assert summary["test_metrics"] == evaluation["metrics"]
    assert f"{summary['test_auroc']:.3f}" in (demo_folder / "index.html").read_text()


def test_every_test_slide_has_its_map_and_the_real_slide_too(demo_folder):
    rows = (demo_folder / "run" / "splits.csv").read_text().splitlines()[1:]
    test = {row.split(",")[0] for row in rows if row.endswith(",test")}
    for suffix in ("png", "csv", "geojson"):
        assert {path.stem for path in (demo_folder / "heatmaps").glob(f"*.{suffix}")} == test
    assert (demo_folder / "cmu-1" / "heatmaps" / "CMU-1-Small-Region.png").is_file()


def test_a_second_call_does_nothing_again(demo_folder):
    kept = [*demo_folder.glob("slides/*.tif"), *demo_folder.glob("job/features/*.h5"), demo_folder / "run" / "state.pt"]
    assert len(kept) == 12 + 12 + 1
    before = {path: path.stat().st_mtime_ns for path in kept}
    results = {
        name: (demo_folder / name).read_bytes() for name in ("run/predictions.csv", "umap/umap.csv", "cohort.csv")
    }
    demo(DemoConfig(out=demo_folder, n_slides=12, epochs=3, device="cpu"))
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    for name, content in results.items():
        assert (demo_folder / name).read_bytes() == content, name


def test_other_slides_take_the_place_of_all_that_was_made_of_the_former(tmp_path, monkeypatch):
    from acmil.demo import pipeline

    source = tmp_path / "source.svs"
    source.write_bytes(b"tissue")
    monkeypatch.setattr(pipeline, "compose_cohort", lambda *arguments, **options: None)
    out = tmp_path / "demo"
    made = [out / folder / "result" for folder in ("job", "run", "run_abmil", "heatmaps")]
    for path in made:
        path.parent.mkdir(parents=True)
        path.touch()
    compose = {
        difficulty: partial(pipeline._Demo(DemoConfig(out=out, difficulty=difficulty), None).compose, source)
        for difficulty in (0.5, 0.4)
    }
    compose[0.4]()
    assert all(path.exists() for path in made), "no manifest: nothing says that these are a demo's"
    write_manifest(out, composing_options(source, n_slides=80, difficulty=0.5, seed=0), [])
    compose[0.5]()
    assert all(path.exists() for path in made)
    compose[0.4]()
    assert not any(path.exists() for path in made)


def test_tile_auroc_leaves_out_tiles_at_the_edge_of_a_lesion():
    attention = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    assert tile_auroc(attention, np.array([1.0, 0.0, 0.6, 0.0, 0.0])) == pytest.approx(5 / 6)
    assert tile_auroc(attention, np.array([0.3, 0.0, 0.6, 0.0, 0.0])) == pytest.approx(2 / 3), "0.3 is neither"
    assert tile_auroc(attention, np.zeros(5)) is None
    assert tile_auroc(attention, np.ones(5)) is None


def test_calls_are_grouped_by_truth_and_sorted_by_confidence(tmp_path):
    table = tmp_path / "predictions.csv"
    lines = ["slide_id,label,prediction,probability_planted"]
    lines += [
        "a,planted,planted,0.7",
        "b,planted,planted,0.9",
        "c,normal,planted,0.6",
        "d,normal,normal,0.4",
        "e,normal,normal,0.1",
    ]
    table.write_text("\n".join(lines))
    groups = [[call["slide_id"] for call in group] for group in group_calls(table, positive="planted").values()]
    assert groups == [["b", "a"], [], ["c"], ["e", "d"]]


@pytest.fixture(scope="module")
def whole_demo(tmp_path_factory):
    """The demo as users run it, once."""
    out = tmp_path_factory.mktemp("whole") / "demo"
    return demo(DemoConfig(out=out, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_the_default_cohort_must_reach(whole_demo, tmp_path, seed):
    from acmil.cohort import read_cohort
    from acmil.runs import load_run
    from acmil.training_run import train

    folder = whole_demo.folder
    inputs = {"cohort": folder / "cohort.csv", "features": folder / "job" / "features"}
    summary = train(
        load_config(TrainConfig, "train/demo.yaml", **inputs, out=tmp_path / "run", seed=seed, device="cpu")
    )
    cohort = read_cohort(inputs["cohort"])
    run = load_run(tmp_path / "run", device="cpu")
    found = lesion_localisation(run, cohort, inputs["features"], folder / "lesions", positive=POSITIVE)
    auroc = summary.metrics["test"]["auroc"]["value"]
    assert auroc >= 0.9
    assert found.auroc >= 0.9
    assert auroc - mean_pool_auroc(cohort, inputs["features"], positive=POSITIVE) >= 0.1


@pytest.mark.slow
def test_the_demo_takes_under_six_minutes(whole_demo):
    assert whole_demo.values["seconds"]["total"] < 360
