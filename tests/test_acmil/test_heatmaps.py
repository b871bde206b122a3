"""The heatmap command on small slides: what it writes, and how it fails."""

import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
from matplotlib.figure import Figure
from matplotlib.image import imread

from acmil.config import HeatmapConfig
from acmil.heatmaps import HeatmapError, heatmaps, read_slide_attention
from acmil.preprocessing.feature_file import open_feature_file
from acmil.runs import RunError, load_run

TILE_PX = 224


def _write_slide(folder, features, slide_id, *, extra_px=0):
    """Write a tiled TIFF of the size the slide's features say, each tile in its own grey."""
    meta = open_feature_file(features / f"{slide_id}.h5").meta
    image = np.full((meta.level0_height, meta.level0_width + extra_px, 3), 230, np.uint8)
    for index in range(meta.level0_width // TILE_PX):
        image[:, index * TILE_PX : (index + 1) * TILE_PX] = 120 + 3 * index
    folder.mkdir(exist_ok=True)
    tifffile.imwrite(folder / f"{slide_id}.tif", image, tile=(256, 256), photometric="rgb", metadata=None)
    return folder / f"{slide_id}.tif"


@pytest.fixture(scope="module")
def slides(feature_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return {name: _write_slide(folder, feature_cohort.features, name) for name in ("s014", "s015", "s006")}


@pytest.fixture
def config(trained_run, feature_cohort, tmp_path):
    def make(slides, **options):
        options = {"run": trained_run, "features": feature_cohort.features, "out": tmp_path / "maps"} | options
        return HeatmapConfig(slides=slides, device="cpu", **options)

    return make


def test_writes_picture_geojson_and_table(config, slides, feature_cohort):
    written = heatmaps(config(list(slides.values())))
    assert [path.name for path in written] == ["s014.png", "s015.png", "s006.png"]
    for path in written:
        features = open_feature_file(feature_cohort.features / f"{path.stem}.h5")
        assert min(imread(path).shape[:2]) > 300
        table = pd.read_csv(path.with_suffix(".csv"))
        np.testing.assert_array_equal(table[["x", "y"]], features.coords())
        assert table["attention"].sum() == pytest.approx(1.0)
        assert table["relative_attention"].mean() == pytest.approx(1.0)
        assert sorted(table["rank"]) == list(range(1, len(table) + 1))
        collection = json.loads(path.with_suffix(".geojson").read_text())
        assert len(collection["features"]) == len(table)
        top = table.loc[table["rank"] == 1].iloc[0]
        corner = collection["features"][0]["geometry"]["coordinates"][0][0]
        assert corner == [top["x"], top["y"]]


def test_a_list_names_slides_whose_files_are_called_otherwise(config, slides, tmp_path):
    """Slides of one file name in two folders, as `acmil preprocess` takes them from a list."""
    lines = ["path,slide_id,status"]
    for slide_id in ("s014", "s015"):
        (tmp_path / slide_id).mkdir()
        shutil.copy(slides[slide_id], tmp_path / slide_id / "slide.tif")
        lines.append(f"{slide_id}/slide.tif,{slide_id},done")
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    written = heatmaps(config([tmp_path / "slides.csv"]))
    assert [path.name for path in written] == ["s014.png", "s015.png"]
    expected = heatmaps(config([slides["s014"]], out=tmp_path / "by_file"))
    assert written[0].with_suffix(".csv").read_bytes() == expected[0].with_suffix(".csv").read_bytes()
    with pytest.raises(HeatmapError, match=r"no features of slide 'slide'.*give a CSV of path,slide_id"):
        heatmaps(config([tmp_path / "s014" / "slide.tif"]))


def test_the_tiles_that_decide_are_the_attended_ones(config, slides, feature_cohort):
    positive = next(name for name in slides if name in feature_cohort.witnesses)
    (path,) = heatmaps(config([slides[positive]]))
    relative = pd.read_csv(path.with_suffix(".csv"))["relative_attention"].to_numpy()
    witnesses = feature_cohort.witnesses[positive]
    assert relative[witnesses].min() > np.median(relative)
    assert relative[witnesses].mean() > 2.0


def test_a_failing_slide_does_not_cost_the_others(config, slides, feature_cohort, tmp_path, caplog):
    larger = _write_slide(tmp_path / "larger", feature_cohort.features, "s000", extra_px=64)
    unknown = tmp_path / "unknown.tif"
    unknown.write_bytes(b"no slide")
    absent = tmp_path / "s002.tif"
    broken = tmp_path / "s001.tif"
    broken.write_bytes(b"no slide")
    with caplog.at_level(logging.WARNING), pytest.raises(HeatmapError) as caught:
        heatmaps(config([larger, slides["s014"], unknown, absent, broken, slides["s015"]]))
    message = str(caught.value)
    assert message.startswith("4 of 6 slides got no attention map")
    assert "must have the size its features were made from" in message
    assert "no features of slide 'unknown'" in message
    assert "s001.tif" in message
    assert f"slide file must exist, found none ({absent})" in message
    assert {path.name for path in (tmp_path / "maps").glob("*.png")} == {"s014.png", "s015.png"}
    assert not caplog.records  # the command line shows the error: what it says is said once


def test_a_tile_reaches_its_own_pixels(trained_run, feature_cohort, slides):
    """The raster's edges lie on the edges of the greys that the slide was painted with."""
    run = load_run(trained_run, device="cpu")
    slide = read_slide_attention(run, slides["s014"], feature_cohort.features, thumbnail_mpp=3.5)
    assert slide.downsample == pytest.approx(7.0)
    raster = slide.raster(np.arange(len(slide.coords), dtype=float))
    assert raster.shape == slide.thumbnail.shape[:2]
    row = raster.shape[0] // 2
    covered = ~np.isnan(raster[row])
    greys = slide.thumbnail[row, covered].astype(float).mean(axis=-1)
    np.testing.assert_allclose(greys, 120 + 3 * raster[row, covered], atol=1.5)


def test_size_of_the_thumbnail(trained_run, feature_cohort, slides):
    run = load_run(trained_run, device="cpu")
    by_default = read_slide_attention(run, slides["s014"], feature_cohort.features)
    assert 1400 <= max(by_default.thumbnail.shape[:2]) <= 1501
    at_level0 = read_slide_attention(run, slides["s014"], feature_cohort.features, thumbnail_mpp=0.5)
    assert max(at_level0.thumbnail.shape[:2]) <= 4001
    coarse = read_slide_attention(run, slides["s014"], feature_cohort.features, thumbnail_mpp=8.0)
    assert coarse.downsample == pytest.approx(16.0)


def test_a_map_of_a_slide_that_made_the_model_says_so(config, slides, trained_run, monkeypatch):
    notes = []
    monkeypatch.setattr("acmil.figures.heatmap_figure", lambda *_, note, **__: notes.append(note) or Figure())
    heatmaps(config(list(slides.values())))
    splits = load_run(trained_run, device="cpu").splits
    assert {splits[name] for name in slides} == {"train", "test"}
    for name, note in zip(slides, notes, strict=True):
        assert ("The model was trained on this slide." in note) == (splits[name] == "train")
        assert ("helped to choose the model's epoch" in note) == (splits[name] == "val")


def test_a_resolution_that_is_not_the_slides_own_is_told_of(trained_run, feature_cohort, tmp_path, caplog):
    run = load_run(trained_run, device="cpu")
    path = _write_slide(tmp_path / "slides", feature_cohort.features, "s014")
    image = tifffile.imread(path)
    for per_cm, warned in ((2e4, False), (4e4, True)):  # 0.5 µm/px, as the features say, and 0.25
        tifffile.imwrite(
            path, image, tile=(256, 256), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
        )
        caplog.clear()
        read_slide_attention(run, path, feature_cohort.features)
        assert ("'s014' says that level 0 has 0.25 µm/px, its map is drawn with 0.5" in caplog.text) == warned


def test_features_of_another_resolution_need_force(trained_run, other_cohort, tmp_path):
    cohort = other_cohort(tmp_path / "other", n_slides=2, tile_mpp=0.25)
    slide = _write_slide(tmp_path / "slides", cohort.features, "s000")
    run = load_run(trained_run, device="cpu")
    with pytest.raises(RunError, match="µm per pixel"):
        read_slide_attention(run, slide, cohort.features)
    forced = read_slide_attention(run, slide, cohort.features, force=True)
    assert forced.attention.sum(axis=1) == pytest.approx(np.ones(len(forced.attention)))


def test_two_slides_of_one_name_are_refused_before_any_work(config, slides, tmp_path):
    twin = tmp_path / "elsewhere" / "s014.tif"
    with pytest.raises(HeatmapError, match="got 's014' twice"):
        heatmaps(config([slides["s014"], twin]))
    assert not (tmp_path / "maps").exists()


def test_branch_scale_and_outlines_reach_the_picture(config, slides, tmp_path, monkeypatch):
    import acmil.figures

    drawn = {}
    original = acmil.figures.heatmap_figure

    def spy(*args, **options):
        drawn.update(options, raster=args[1])
        return original(*args, **options)

    monkeypatch.setattr(acmil.figures, "heatmap_figure", spy)
    ring = [[0, 0], [224, 0], [224, 224], [0, 0]]
    (tmp_path / "s014.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    options = {"branch": "1", "scale": "percentile", "opacity": 0.3}
    heatmaps(config([slides["s014"]], outlines=tmp_path, outline_label="planted lesion", **options))
    assert "branch 1 of 0 to 4" in drawn["note"]
    assert drawn["scale"].label == "percentile of attention within this slide"
    assert drawn["opacity"] == 0.3
    assert drawn["outline_label"] == "planted lesion"
    np.testing.assert_array_equal(drawn["outlines"][0][0], ring[:-1])
    assert np.nanmax(drawn["raster"]) > 90
    with pytest.raises(HeatmapError, match="outlines must be a folder of GeoJSON files, found none"):
        heatmaps(config([slides["s014"]], outlines=tmp_path / "absent"))
    with pytest.raises(HeatmapError, match="branch must be 'mean' or a number from 0 to 4, got '7'"):
        heatmaps(config([slides["s014"]], branch="7"))


def test_glass_is_where_the_job_found_no_tissue(trained_run, feature_cohort, slides, tmp_path):
    """Grey tiles have no colour of tissue; the outlines that the job took say where it lies all the same."""
    job = tmp_path / "job"
    (job / "tissue").mkdir(parents=True)
    (job / "features").symlink_to(feature_cohort.features)
    run = load_run(trained_run, device="cpu")
    anew = read_slide_attention(run, slides["s014"], job / "features", thumbnail_mpp=4.0)
    assert not np.isnan(anew.raster(np.ones(len(anew.coords)))).any()  # no tissue found: no glass told from it
    ring = [[0, 0], [448, 0], [448, 112], [0, 112], [0, 0]]  # the upper half of two tiles
    (job / "tissue" / "s014.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    told = read_slide_attention(run, slides["s014"], job / "features", thumbnail_mpp=4.0)  # 8 level-0 px a pixel
    assert not told.glass[:14, :56].any()
    assert told.glass[14:, :56].all()
    assert not told.glass[:, 56:].any()


def test_glass_inside_a_tile_stays_as_it_is():
    """Tissue in the left half of the first tile; the second tile lies where no tissue was found."""
    from acmil.heatmaps import _glass
    from acmil.preprocessing.feature_file import FeatureMeta
    from acmil.preprocessing.slide import Thumbnail
    from acmil.preprocessing.tissue import Tissue

    mask = np.zeros((16, 32), bool)  # 8 level-0 px a pixel
    mask[:, :8] = True
    tissue = Tissue(mask=mask, downsample=8.0, polygons=(), fraction=0.25)
    thumbnail = Thumbnail(image=np.zeros((32, 64, 3), np.uint8), downsample=4.0)
    meta = FeatureMeta("s", "e", "", "", 128, 128, 0, 256, 128, 0.5, 0.5)
    glass = _glass(tissue, thumbnail, meta, np.array([[0, 0], [128, 0]]))
    assert glass.shape == (32, 64)
    assert not glass[:, :16].any()
    assert glass[:, 16:32].all()
    assert not glass[:, 32:].any()
