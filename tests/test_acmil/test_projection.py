"""Sampling of tiles, UMAP, and the umap command."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from acmil.config import UmapConfig
from acmil.projection import ProjectionError, project, sample_instances, umap
from acmil.runs import load_run


def test_sample_holds_the_most_attended_tiles_and_a_random_rest():
    attention = np.random.default_rng(0).dirichlet(np.full(5000, 0.1))
    chosen = sample_instances(attention, tiles=100, generator=np.random.default_rng(1))
    top = set(np.argsort(-attention)[:25].tolist())
    assert len(set(chosen.tolist())) == 100
    assert top <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all()
    again = sample_instances(attention, tiles=100, generator=np.random.default_rng(1))
    np.testing.assert_array_equal(chosen, again)
    other = sample_instances(attention, tiles=100, generator=np.random.default_rng(2))
    assert 25 <= len(set(chosen.tolist()) & set(other.tolist())) < 50


def test_the_random_rest_is_uniform():
    attention = np.linspace(1, 2, 40)
    generator = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(2000):
        counts[sample_instances(attention, tiles=8, generator=generator)] += 1
    np.testing.assert_array_equal(counts[-2:], 2000)
    np.testing.assert_allclose(counts[:-2] / 2000, 6 / 38, atol=0.04)


def test_torch_keeps_its_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        project(np.random.default_rng(0).random((60, 5), np.float32), n_neighbors=5)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_small_slides_are_taken_whole():
    chosen = sample_instances(np.array([0.2, 0.5, 0.3]), tiles=10, generator=np.random.default_rng(0))
    assert chosen.tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def two_groups():
    generator = np.random.default_rng(0)
    centres = np.repeat([0.0, 8.0], 40)[:, None]
    return (generator.normal(size=(80, 64)) + centres).astype(np.float32)


def test_projection_is_deterministic_and_keeps_groups_apart(two_groups):
    first = project(two_groups, seed=3)
    assert first.shape == (80, 2)
    np.testing.assert_array_equal(first, project(two_groups, seed=3))
    a, b = first[:40], first[40:]
    gap = np.linalg.norm(a.mean(0) - b.mean(0))
    spread = max(np.linalg.norm(part - part.mean(0), axis=1).max() for part in (a, b))
    assert gap > 2 * spread


def test_few_tiles_lower_the_neighbourhood(two_groups, caplog):
    with caplog.at_level(logging.WARNING):
        embedding = project(two_groups[:10], n_neighbors=15)
    assert np.isfinite(embedding).all()
    assert "n_neighbors lowered from 15" in caplog.text


def test_too_few_tiles_are_an_error(two_groups):
    with pytest.raises(ProjectionError, match="at least 8 tiles, got 7"):
        project(two_groups[:7])


def test_umap_command(trained_run, feature_cohort, tmp_path):
    config = UmapConfig(
        run=trained_run, cohort=feature_cohort.csv, features=feature_cohort.features, out=tmp_path / "umap",
        tiles_per_slide=8, split="test", device="cpu",
    )  # fmt: skip
    picture = umap(config)
    assert picture == tmp_path / "umap" / "umap.png"
    assert min(imread(picture).shape[:2]) > 400
    table = pd.read_csv(tmp_path / "umap" / "umap.csv")
    assert table.columns.tolist() == [
        "slide_id", "x", "y", "umap_1", "umap_2", "attention", "relative_attention", "branch", "label", "split",
    ]  # fmt: skip
    run = load_run(trained_run, device="cpu")
    assert set(table["slide_id"]) == {name for name, split in run.splits.items() if split == "test"}
    assert set(table["split"]) == {"test"}
    assert (table.groupby("slide_id").size() == 8).all()
    assert table["branch"].between(0, 4).all()
    positive = next(name for name in feature_cohort.witnesses if name in set(table["slide_id"]))
    sampled = table.loc[table["slide_id"] == positive]
    assert sampled["relative_attention"].max() > 2.0
    assert set(sampled["label"]) == {"tumour"}


def test_the_sample_of_a_slide_does_not_depend_on_the_others(trained_run, feature_cohort, tmp_path):
    from acmil.cohort import read_cohort
    from acmil.preprocessing.progress import SilentProgress
    from acmil.projection import sample_cohort

    run = load_run(trained_run, device="cpu")
    cohort = read_cohort(feature_cohort.csv)
    config = UmapConfig(
        run=trained_run, cohort=feature_cohort.csv, features=feature_cohort.features, out=tmp_path,
        tiles_per_slide=8, space="encoder", device="cpu",
    )  # fmt: skip
    table, features = sample_cohort(config, run, run.select(cohort, "all"), progress=SilentProgress())
    alone, alone_features = sample_cohort(config, run, run.select(cohort, "test"), progress=SilentProgress())
    in_test = table["slide_id"].isin(set(alone["slide_id"])).to_numpy()
    assert features.shape[1] == 16
    np.testing.assert_array_equal(features[in_test], alone_features)
    np.testing.assert_array_equal(table.loc[in_test, ["x", "y"]], alone[["x", "y"]])
