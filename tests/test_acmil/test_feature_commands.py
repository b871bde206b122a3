"""The commands on feature files: info, verify, convert."""

import csv
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tifffile
import torch

from acmil.bag_archive import read_bag_archive
from acmil.cli import run_command_line
from acmil.config import FeaturesConvertConfig, FeaturesInfoConfig, FeaturesVerifyConfig
from acmil.feature_commands import info, verify
from acmil.feature_conversion import convert
from acmil.preprocessing.feature_file import open_feature_file
from acmil.preprocessing.formats import FormatError, Geometry, read_slides
from acmil.preprocessing.formats.clam import write_clam, write_clam_pt
from acmil.preprocessing.formats.trident import write_trident

TILES = Geometry(tile_px=64, tile_level0_px=128, overlap_px=0)


def numbers(n=6, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def write(folder, slide_id, *, features=None, encoder="uni", geometry=TILES):
    """A TRIDENT file whose tiles stand in a column, from the bottom up."""
    folder.mkdir(parents=True, exist_ok=True)
    features = numbers() if features is None else features
    coords = np.stack([np.zeros(len(features)), np.arange(len(features))[::-1] * 128], axis=1).astype(np.int64)
    path = folder / f"{slide_id}.h5"
    write_trident(path, slide_id=slide_id, features=features, coords=coords, geometry=geometry, encoder=encoder)
    return path


@pytest.fixture
def archive(tmp_path):
    """Three bags of 3, 1 and 2 rows, their rows mixed."""
    path = tmp_path / "bags.npz"
    np.savez(path, features=numbers(), bag_ids=np.array([2, 0, 0, 1, 2, 0]), bag_labels=np.array([1, 0, 1]))
    return path


def converted(path, out, **options):
    return convert(FeaturesConvertConfig(path=path, out=out, **options))


# ---- info ----


def test_info_shows_a_row_a_file(tmp_path, archive):
    write(tmp_path, "a")
    write_clam_pt(tmp_path / "b.pt", features=numbers(3, 7))
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF")
    table = info(FeaturesInfoConfig(path=tmp_path))
    trident, tensor, bags, broken = table.rows
    assert trident == {
        "file": "a.h5", "format": "trident", "slides": "1", "tiles": "6", "D": "4", "dtype": "float32", "mpp": "?",
        "tile": "64 px", "encoder": "uni", "notes": "not stated: level0_width, level0_height, level0_mpp, tile_mpp",
    }  # fmt: skip
    assert (tensor["format"], tensor["tiles"], tensor["D"]) == ("clam-pt", "3", "7")
    assert (bags["slides"], bags["tiles"], bags["notes"][-8:]) == ("3", "6", "3 labels")
    assert broken["notes"].startswith("unreadable")
    assert table.failed == 1
    lines = str(table).splitlines()
    assert len(lines) == 5
    formats = ("format", "trident", "clam-pt", "npz")
    assert len({line.index(f" {name} ") for line, name in zip(lines, formats, strict=False)}) == 1


def test_info_of_the_real_stamp_named_file(shared_data, capsys):
    folder = shared_data / "features_stamp" / "TCGA-AD-6964-01Z-00-DX1"
    assert run_command_line(["features", "info", str(folder), "--quiet"]) == 0
    (row,) = info(FeaturesInfoConfig(path=folder)).rows
    assert (row["format"], row["tiles"], row["D"], row["mpp"], row["tile"]) == ("stamp", "777", "512", "?", "?")
    assert row["notes"] == "unit of coords not stated; no geometry stated; encoder not stated"


def test_no_feature_files_are_said_with_a_hint(tmp_path):
    write(tmp_path / "features_uni", "a")
    with pytest.raises(FormatError, match=r"found none .*Did you mean .*features_uni\?"):
        info(FeaturesInfoConfig(path=tmp_path))
    with pytest.raises(FormatError, match="found nothing"):
        info(FeaturesInfoConfig(path=tmp_path / "none"))


# ---- verify ----


def problems(path, **options):
    return {check.name: " ".join(check.problems) for check in verify(FeaturesVerifyConfig(path=path, **options)).checks}


def test_verify_finds_truncation_nan_wrong_shapes_and_wrong_encoder(tmp_path, capsys):
    for name in "abcdefg":
        write(tmp_path, name)
    assert set(problems(tmp_path).values()) == {""}
    assert run_command_line(["features", "verify", str(tmp_path)]) == 0
    assert "all 7 ok" in capsys.readouterr().out
    (tmp_path / "b.h5").write_bytes((tmp_path / "b.h5").read_bytes()[:-40])
    write(tmp_path, "c", features=np.where(np.arange(24).reshape(6, 4) == 9, np.nan, numbers()))
    write(tmp_path, "d", features=numbers(6, 5))
    write(tmp_path, "e", encoder="conch")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        del file["features"]
        file["features"] = numbers(5)
    found = problems(tmp_path)
    assert {name for name, problem in found.items() if problem} == {"b.h5", "c.h5", "d.h5", "e.h5", "f.h5"}
    assert "truncated" in found["b.h5"]
    assert "NaN or infinity in tile 2" in found["c.h5"]
    assert found["d.h5"] == "D must be 4, as in most files, got 5."
    assert found["e.h5"] == "encoder must be 'uni', as in most files, got 'conch'."
    assert "coords must be numbers (5, 2)" in found["f.h5"]
    assert run_command_line(["features", "verify", str(tmp_path)]) == 1
    assert "5 of 7 wrong" in capsys.readouterr().out


def test_verify_asks_for_an_encoder_and_for_the_slides_of_a_cohort(tmp_path):
    write(tmp_path / "f", "a")
    write(tmp_path / "f", "b", encoder="")
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("slide_id\na\nb\nc\n")
    found = problems(tmp_path / "f", encoder="conch", cohort=cohort)
    assert found["a.h5"] == "encoder must be 'conch', got 'uni'."
    assert found["b.h5"] == "encoder must be 'conch', got none stated."
    assert found["c"] == f"no features, it is in {cohort}."
    assert set(problems(tmp_path / "f").values()) == {""}  # what is not stated is not wrong


def test_verify_finds_tiles_that_lie_nowhere_or_on_one_another(tmp_path):
    sized = replace(TILES, level0_width=128, level0_height=640)
    write(tmp_path, "a", geometry=sized)  # six tiles in a column of 768 px
    write(tmp_path, "b", geometry=replace(sized, level0_height=641))
    with h5py.File(write(tmp_path, "c"), "r+") as file:
        file["coords"][3] = file["coords"][1]
    found = problems(tmp_path)
    assert found["a.h5"] == "coords must lie in the slide, 128 x 640 level-0 px, got (0, 640) at tile 0."
    assert not found["b.h5"]
    assert found["c.h5"] == "coords must differ from tile to tile, got 1 where another tile is."


def test_verify_finds_sizes_that_contradict_each_other(other_cohort, tmp_path):
    cohort = other_cohort(tmp_path, n_slides=2)
    with h5py.File(cohort.features / "s001.h5", "r+") as file:
        file.attrs["level0_mpp"] = 0.25
    found = problems(cohort.features)
    assert not found["s000.h5"]
    assert "tile_mpp must be tile_level0_px * level0_mpp / tile_px, 224 * 0.25 / 224 = 0.25" in found["s001.h5"]


def test_verify_of_our_own_files(feature_cohort, other_cohort, tmp_path):
    assert set(problems(feature_cohort.features, cohort=feature_cohort.csv).values()) == {""}
    mixed = other_cohort(tmp_path / "mixed", n_slides=4)
    other = other_cohort(tmp_path / "other", n_slides=4, tile_mpp=0.25)
    shutil.copy(other.features / "s001.h5", mixed.features / "s001.h5")
    shutil.copy(mixed.features / "s002.h5", mixed.features / "copy.h5")
    found = problems(mixed.features)
    assert found["s001.h5"] == "tile_mpp must be 0.5, as in most files, got 0.25."
    assert found["copy.h5: s002"] == "slide_id must be the file's name, got 's002'."
    assert sum(map(bool, found.values())) == 2
    assert not problems(mixed.features, mpp_tolerance=0.6)["s001.h5"]


# ---- convert ----


def test_bags_of_an_archive(archive):
    bags = list(read_bag_archive(archive))
    assert [bag.slide_id for bag in bags] == ["bag_0000", "bag_0001", "bag_0002"]
    np.testing.assert_array_equal(bags[0].features(), numbers()[[1, 2, 5]])
    np.testing.assert_array_equal(bags[2].features(), numbers()[[0, 4]])
    assert [bag.extras["label"] for bag in bags] == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bag_ids": np.array([0, 0, 0, 1, 1, 3])}, "from 0 to 2"),
        ({"bag_ids": np.array([0, 0, 0, 1, 1, 1])}, "bag 2 has none"),
        ({"bag_ids": np.zeros(5, int)}, r"whole numbers \(6,\)"),
        ({"features": np.zeros(6)}, r"must be \(n, d\)"),
        ({"bag_labels": np.array([None, 1, 2])}, "plain arrays"),
        ({"bag_labels": None}, "without bag_labels"),
    ],
)
def test_wrong_archives(tmp_path, archive, change, message):
    content = dict(np.load(archive)) | change
    np.savez(tmp_path / "wrong.npz", **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(FormatError, match=rf"{message}.*wrong\.npz"):
        list(read_bag_archive(tmp_path / "wrong.npz"))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(FormatError, match=r"text\.npz"):
        list(read_bag_archive(tmp_path / "text.npz"))


def test_bags_become_feature_files_and_a_cohort(tmp_path, archive):
    summary = converted(archive, tmp_path / "out")
    assert (summary.n_slides, summary.n_tiles, summary.cohort) == (3, 6, tmp_path / "out" / "cohort.csv")
    assert summary.cohort.read_text() == "slide_id,label\nbag_0000,1\nbag_0001,0\nbag_0002,1\n"
    file = open_feature_file(tmp_path / "out" / "features" / "bag_0000.h5")
    np.testing.assert_array_equal(file.features(), numbers()[[1, 2, 5]])
    assert not file.has_coords()
    assert set(file.meta.unknown) == set(Geometry().missing())
    converted(archive, tmp_path / "out")  # the same again is the same
    summary.cohort.write_text("slide_id,label,split\nbag_0000,1,train\n")
    with pytest.raises(FormatError, match=r"cohort\.csv must not exist"):
        converted(archive, tmp_path / "out")


def test_what_is_missing_is_asked_for_by_name_and_nothing_is_written(tmp_path):
    write(tmp_path / "in", "a")
    write(tmp_path / "in", "b")
    with pytest.raises(FormatError) as caught:
        converted(tmp_path / "in", tmp_path / "out")
    message = str(caught.value)
    assert "needs level0_mpp, level0_width, level0_height, which up to 2 of 2 slides do not state" in message
    assert "Give --level0-mpp, --level0-width, --level0-height, or --slides" in message
    assert not (tmp_path / "out").exists()


def test_a_trident_file_with_the_slide(tmp_path):
    write(tmp_path / "in", "a")
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(
        tmp_path / "slides" / "a.tif", np.full((900, 300, 3), 240, np.uint8), tile=(256, 256), photometric="rgb",
        resolution=(4e4, 4e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"level0_mpp must be what the file says, 0\.25, got 0\.5 .*a\.tif"):
        converted(tmp_path / "in", tmp_path / "out", slides=tmp_path / "slides", level0_mpp=0.5)
    assert converted(tmp_path / "in", tmp_path / "out", slides=tmp_path / "slides").unknown == {}
    file = open_feature_file(tmp_path / "out" / "features" / "a.h5")
    meta = file.meta
    assert (meta.level0_width, meta.level0_height, meta.tile_px, meta.tile_level0_px) == (300, 900, 64, 128)
    assert (meta.level0_mpp, meta.tile_mpp) == (pytest.approx(0.25), pytest.approx(0.5))
    assert (meta.encoder, meta.encoder_digest, meta.unknown) == ("uni", "", ())
    np.testing.assert_array_equal(file.coords()[:, 1], np.arange(6) * 128)  # y-then-x order
    np.testing.assert_array_equal(file.features(), numbers()[::-1])
    assert np.isnan(file.tissue_fraction()).all()


def test_options_may_not_contradict_a_file(tmp_path):
    write(tmp_path / "in", "a")
    for options, message in (
        ({"tile_px": 256}, "tile_px must be what the file says, 64, got 256"),
        ({"encoder": "conch"}, "encoder must be what the file says, 'uni'"),
        ({"coords_mpp": 0.5}, "this one counts level0_px"),
    ):
        with pytest.raises(FormatError, match=message):
            converted(tmp_path / "in", tmp_path / "out", without_geometry=True, **options)


def test_stated_sizes_must_go_together(tmp_path):
    write(tmp_path / "in", "a")
    stated = {"level0_mpp": 0.25, "level0_width": 128, "level0_height": 768}
    with pytest.raises(FormatError, match=r"128 \* 0.25 / 64 = 0.5, got 1\."):
        converted(tmp_path / "in", tmp_path / "out", tile_mpp=1.0, **stated)
    assert not (tmp_path / "out").exists()
    converted(tmp_path / "in", tmp_path / "out", tile_mpp=0.5, **stated)
    assert open_feature_file(tmp_path / "out" / "features" / "a.h5").meta.tile_mpp == 0.5


def test_the_real_stamp_named_file(shared_data, tmp_path):
    source = shared_data / "features_stamp" / "TCGA-AD-6964-01Z-00-DX1"
    with pytest.raises(FormatError, match=r"--level0-mpp, --tile-px, .*--coords-mpp.*--without-geometry"):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    without = converted(source, tmp_path / "bare", without_geometry=True)
    bare = open_feature_file(without.where / "features.h5")
    assert (bare.n_tiles, bare.has_coords()) == (777, False)
    stated = {
        "coords_mpp": 0.5,
        "level0_mpp": 0.25,
        "tile_px": 512,
        "tile_mpp": 0.5,
        "level0_width": 80000,
        "level0_height": 60000,
    }
    file = open_feature_file(converted(source, tmp_path / "out", **stated, encoder="mopadi").where / "features.h5")
    assert (file.meta.tile_level0_px, file.meta.encoder) == (1024, "mopadi")
    with h5py.File(source / "features.h5") as original:
        order = np.lexsort(original["coords"][...].T)
        np.testing.assert_array_equal(file.coords(), original["coords"][...][order] * 2)
        np.testing.assert_array_equal(file.features(), original["feats"][...][order])


@pytest.mark.parametrize("target", ["trident", "clam", "stamp"])
def test_there_and_back_again(feature_cohort, tmp_path, target):
    there = converted(feature_cohort.features, tmp_path / "there", to=target)
    folder = there.where / "h5_files" if target == "clam" else there.where
    size = {"level0_width": 224 * 99, "level0_height": 224}  # what these formats do not keep, or CLAM keeps none of
    options = {
        "trident": {"level0_mpp": 0.5},
        "stamp": {"level0_mpp": 0.5, **size},
        "clam": {"level0_mpp": 0.5, "tile_px": 224, "tile_level0_px": 224, "encoder": "synthetic", **size},
    }
    back = converted(folder, tmp_path / "back", **options[target])
    for path in sorted(feature_cohort.features.iterdir())[:4]:
        ours, theirs = open_feature_file(path), open_feature_file(back.where / path.name)
        rounded = ours.features().astype(np.float16) if target == "stamp" else ours.features()
        np.testing.assert_array_equal(theirs.features(), rounded)
        np.testing.assert_array_equal(theirs.coords(), ours.coords())
        assert (theirs.meta.tile_mpp, theirs.meta.tile_level0_px, theirs.meta.encoder) == (0.5, 224, "synthetic")


def test_clam_gets_tensors_too(feature_cohort, tmp_path):
    converted(feature_cohort.features, tmp_path / "out", to="clam")
    for path in sorted(feature_cohort.features.iterdir())[:3]:
        tensor = torch.load(tmp_path / "out" / "pt_files" / f"{path.stem}.pt", weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), open_feature_file(path).features())


def test_the_reference_keeps_labels_both_ways(feature_cohort, tmp_path):
    with pytest.raises(FormatError, match="Give --cohort"):
        converted(feature_cohort.features, tmp_path / "there", to="acmil-reference")
    there = converted(feature_cohort.features, tmp_path / "there", to="acmil-reference", cohort=feature_cohort.csv)
    assert there.where.name == "patch_feats_pretrain_synthetic.h5"
    assert len(list(read_slides(there.where))) == 32
    back = converted(there.where, tmp_path / "back", without_geometry=True)
    with feature_cohort.csv.open() as file:
        expected = {row["slide_id"]: str(int(row["label"] == "tumour")) for row in csv.DictReader(file)}
    with back.cohort.open() as file:
        assert {row["slide_id"]: row["label"] for row in csv.DictReader(file)} == expected
    file = open_feature_file(back.where / "s003.h5")
    assert (file.dtype, file.meta.encoder, file.has_coords()) == (np.float16, "synthetic", True)


def test_refusals(tmp_path, feature_cohort, archive):
    with pytest.raises(FormatError, match="of another format than 'acmil'"):
        converted(feature_cohort.features, tmp_path / "out")
    with pytest.raises(FormatError, match="Without coordinates only acmil and clam"):
        converted(archive, tmp_path / "out", to="stamp")
    both = tmp_path / "both"
    write(both, "a")
    write_clam_pt(both / "a.pt", features=numbers())
    with pytest.raises(FormatError, match="'a' occurs again"):
        converted(both, tmp_path / "out", without_geometry=True)
    bad = write(tmp_path / "out" / "features", "n", features=numbers() * np.inf)
    with pytest.raises(FormatError, match=r"onto itself .*n\.h5"):
        converted(bad, tmp_path / "out", without_geometry=True)
    with pytest.raises(FormatError, match=r"NaN or infinity in tile 0 .*n\.h5"):
        converted(bad, tmp_path / "elsewhere", without_geometry=True)


def test_clam_without_attributes_is_usable_with_stated_geometry(tmp_path):
    path = tmp_path / "s.h5"
    write_clam(path, slide_id="s", features=numbers(), coords=np.zeros((6, 2), int), geometry=Geometry(), encoder="")
    arguments = [
        "--level0-mpp",
        "0.25",
        "--tile-px",
        "256",
        "--tile-level0-px",
        "512",
        "--level0-width",
        "512",
        "--level0-height",
        "600",
    ]
    assert run_command_line(["features", "convert", str(path), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert open_feature_file(tmp_path / "out" / "features" / "s.h5").meta.tile_mpp == 0.5


@pytest.mark.network
def test_from_a_published_benchmark_to_a_trained_model(tmp_path, capsys, fetch_or_skip):
    fetch_or_skip("musk1")
    out = tmp_path / "musk1"
    assert run_command_line(["samples", "fetch", "musk1", "--out", str(tmp_path)]) == 0
    assert run_command_line(["features", "convert", str(tmp_path / "musk1.npz"), "--out", str(out)]) == 0
    assert run_command_line(["features", "verify", str(out / "features"), "--cohort", str(out / "cohort.csv")]) == 0
    assert "all 92 ok" in capsys.readouterr().out
    arguments = [
        str(out / "cohort.csv"),
        "--features",
        str(out / "features"),
        "--out",
        str(out / "run"),
        "--epochs",
        "2",
    ]
    assert run_command_line(["train", *arguments, "--device", "cpu"]) == 0
    assert (out / "run" / "metrics.json").is_file()
    arguments = [str(out / "run"), *arguments[:3], "--out", str(out / "evaluation"), "--device", "cpu"]
    assert run_command_line(["evaluate", *arguments]) == 0
    assert (out / "evaluation" / "metrics.json").is_file()


def test_maps_of_tiles_that_lie_nowhere_known_are_refused(trained_run, feature_cohort, tmp_path):
    from acmil.heatmaps import HeatmapError, read_slide_attention
    from acmil.runs import load_run

    converted(feature_cohort.features, tmp_path / "clam", to="clam")
    bare = converted(tmp_path / "clam" / "pt_files", tmp_path / "bare").where
    run = load_run(trained_run)
    run.check_features([open_feature_file(bare / "s000.h5").meta])  # what is not known agrees with any
    (tmp_path / "s000.svs").touch()
    with pytest.raises(HeatmapError, match=r"not known: coords, tile_level0_px, .*level0_mpp .*s000\.h5"):
        read_slide_attention(run, tmp_path / "s000.svs", bare)


def test_damaged_features_cost_the_other_slides_nothing(other_cohort, tmp_path, caplog):
    cohort = other_cohort(tmp_path / "in", n_slides=4)
    convert(FeaturesConvertConfig(path=cohort.features, out=tmp_path / "clam", to="clam"))
    with h5py.File(tmp_path / "clam" / "h5_files" / "s001.h5", "r+") as file:
        file["features"][0, 0] = np.nan
    summary = converted(tmp_path / "clam" / "h5_files", tmp_path / "out", without_geometry=True)
    assert (summary.n_slides, summary.failed) == (3, 1)
    assert "1 slides were not converted, the log says why" in str(summary)
    assert "s001: " in caplog.text
    assert "NaN or infinity in tile 0" in caplog.text
    assert sorted(path.stem for path in (tmp_path / "out" / "features").iterdir()) == ["s000", "s002", "s003"]
