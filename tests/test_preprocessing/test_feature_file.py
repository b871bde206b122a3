"""Feature files: what is written is read back; what is damaged is refused with a reason."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from acmil.preprocessing.feature_file import (
    MEASURES,
    FeatureFileError,
    FeatureMeta,
    open_feature_file,
    write_feature_file,
)

N_TILES, N_FEATURES = 37, 11
META = FeatureMeta(
    slide_id="slide_1",
    encoder="test_resnet",
    encoder_digest="a" * 64,
    preprocessing_digest="b" * 64,
    tile_px=256,
    tile_level0_px=513,
    overlap_px=0,
    level0_width=40_000,
    level0_height=30_000,
    level0_mpp=0.2495,
    tile_mpp=0.49998,
    level0_magnification=40.0,
    target_magnification=19.96,
)


def arrays(dtype=np.float16):
    generator = np.random.default_rng(0)
    return {
        "features": generator.standard_normal((N_TILES, N_FEATURES)).astype(dtype),
        "coords": np.stack([np.arange(N_TILES) % 7 * 513, np.arange(N_TILES) // 7 * 513], axis=1).astype(np.int64),
        "tissue_fraction": generator.random(N_TILES).astype(np.float32),
    }


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "slide_1.h5"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read_back_bit_for_bit(path, dtype):
    written = arrays(dtype)
    write_feature_file(path, **written, meta=META)
    file = open_feature_file(path)
    assert (file.n_tiles, file.n_features, file.dtype) == (N_TILES, N_FEATURES, np.dtype(dtype))
    assert file.meta == META
    features = file.features()
    assert isinstance(features, np.memmap)
    assert not features.flags.writeable
    np.testing.assert_array_equal(features, written["features"])
    np.testing.assert_array_equal(file.coords(), written["coords"])
    np.testing.assert_array_equal(file.tissue_fraction(), written["tissue_fraction"])
    assert file.coords().dtype == np.int64
    assert [p.name for p in path.parent.iterdir()] == ["slide_1.h5"]


def test_layout_is_tridents_with_more(path):
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path) as file:
        assert dict(file["features"].attrs) == {"encoder": "test_resnet", "name": "slide_1"}
        assert dict(file["coords"].attrs) == {
            "patch_size": 256,
            "patch_size_level0": 513,
            "level0_magnification": 40.0,
            "target_magnification": 19.96,
            "overlap": 0,
            "name": "slide_1",
            "level0_width": 40_000,
            "level0_height": 30_000,
        }
        assert dict(file.attrs) == {
            "format": "acmil-features",
            "format_version": 1,
            "slide_id": "slide_1",
            "level0_mpp": 0.2495,
            "tile_mpp": 0.49998,
            "encoder": "test_resnet",
            "encoder_digest": "a" * 64,
            "preprocessing_digest": "b" * 64,
            "complete": True,
        }
        assert sorted(file) == ["coords", "features", "tissue_fraction"]
        assert file["features"].id.get_offset() % 8 == 0


QUALITY = np.random.default_rng(1).random((N_TILES, 6)).astype(np.float32)


def test_quality_is_there_where_it_was_measured(path):
    write_feature_file(path, **arrays(), meta=META)
    without = path.read_bytes()
    assert open_feature_file(path).quality() is None
    write_feature_file(path, **arrays(), meta=META, quality=QUALITY.astype(np.float64))
    quality = open_feature_file(path).quality()
    assert (quality.dtype, quality.shape) == (np.float32, (N_TILES, 6))
    np.testing.assert_array_equal(quality, QUALITY)
    with h5py.File(path) as file:
        assert list(file["quality"].attrs["measures"]) == ["focus", "pen", "fold", "blood", "dark", "stain"]
        assert file["quality"].id.get_offset() is not None  # contiguous, as the others are
    first = path.read_bytes()
    write_feature_file(path, **arrays(), meta=META, quality=QUALITY)
    assert path.read_bytes() == first
    write_feature_file(path, **arrays(), meta=META)
    assert path.read_bytes() == without


@pytest.mark.parametrize("bad", [QUALITY[1:], QUALITY[:, :5], QUALITY[:, 0], np.zeros((N_TILES, 6), np.int64)])
def test_quality_of_another_shape_or_type_is_refused(path, bad):
    with pytest.raises(FeatureFileError, match=r"quality must be float, \(37, 6\), of the measures focus, pen, "):
        write_feature_file(path, **arrays(), meta=META, quality=bad)
    assert not path.exists()
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        file["quality"] = bad
        file["quality"].attrs["measures"] = MEASURES
    with pytest.raises(FeatureFileError, match=r"quality must be .*slide_1\.h5"):
        open_feature_file(path)


def test_quality_of_other_measures_is_refused(path):
    write_feature_file(path, **arrays(), meta=META, quality=QUALITY)
    with h5py.File(path, "r+") as file:
        file["quality"].attrs["measures"] = ["pen", "focus", "fold", "blood", "dark", "stain"]
    with pytest.raises(FeatureFileError, match=r"got float32, .*, pen, focus, fold"):
        open_feature_file(path)
    with h5py.File(path, "r+") as file:
        del file["quality"].attrs["measures"]
    with pytest.raises(FeatureFileError, match="not named"):
        open_feature_file(path)


def test_quality_that_is_not_finite_is_refused(path):
    bad = QUALITY.copy()
    bad[3, 4] = np.nan
    with pytest.raises(FeatureFileError, match="quality must be finite"):
        write_feature_file(path, **arrays(), meta=META, quality=bad)
    write_feature_file(path, **arrays(), meta=META, quality=QUALITY)
    with h5py.File(path, "r+") as file:
        file["quality"][3, 4] = np.inf
    with pytest.raises(FeatureFileError, match=r"quality must be finite.*slide_1\.h5"):
        open_feature_file(path)
    assert open_feature_file(path, check_values=False).n_tiles == N_TILES


def test_unknown_magnification_stays_unknown(path):
    meta = replace(META, level0_magnification=None, target_magnification=None)
    write_feature_file(path, **arrays(), meta=meta)
    assert open_feature_file(path).meta == meta
    with h5py.File(path) as file:
        assert "level0_magnification" not in file["coords"].attrs


def test_the_same_slide_gives_the_same_bytes(path):
    write_feature_file(path, **arrays(), meta=META)
    first = path.read_bytes()
    write_feature_file(path, **arrays(), meta=META)
    assert path.read_bytes() == first


def test_a_chunked_file_is_read_instead_of_mapped(path):
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["features"].attrs)
        del file["features"]
        dataset = file.create_dataset("features", data=arrays()["features"], chunks=(8, 11), compression="gzip")
        dataset.attrs.update(attributes)
    features = open_feature_file(path).features()
    assert not isinstance(features, np.memmap)
    np.testing.assert_array_equal(features, arrays()["features"])


def test_a_file_cut_anywhere_is_refused(path):
    write_feature_file(path, **arrays(), meta=META)
    whole = path.read_bytes()
    cuts = {0, 1, 7, 8, 100, *range(0, len(whole), 211), len(whole) - 8, len(whole) - 1}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(FeatureFileError, match=r"truncated.*slide_1\.h5"):
            open_feature_file(path)
    path.write_bytes(whole)
    assert open_feature_file(path).n_tiles == N_TILES


def test_not_complete_is_refused(path):
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        file.attrs["complete"] = False
    with pytest.raises(FeatureFileError, match=r"'complete' must be true.*slide_1\.h5"):
        open_feature_file(path)
    with h5py.File(path, "r+") as file:
        del file.attrs["complete"]
    with pytest.raises(FeatureFileError, match="'complete' must be true"):
        open_feature_file(path)


def test_other_formats_are_refused(path):
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 2), np.float32)
    with pytest.raises(FeatureFileError, match="'format' must be 'acmil-features', got None"):
        open_feature_file(path)
    path.write_text("slide_id,label\n")
    with pytest.raises(FeatureFileError, match="another kind of file"):
        open_feature_file(path)
    with pytest.raises(FeatureFileError, match="must exist"):
        open_feature_file(path.with_name("none.h5"))
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(FeatureFileError, match="'format_version' must be 1, got 2"):
        open_feature_file(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_reader_and_writer(path, value):
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        file["features"][23, 4] = value
    with pytest.raises(FeatureFileError, match=r"finite, got NaN or infinity in tile 23 .*slide_1\.h5"):
        open_feature_file(path)
    assert open_feature_file(path, check_values=False).n_tiles == N_TILES
    bad = arrays()
    bad["features"][36, 10] = value
    path.unlink()
    with pytest.raises(FeatureFileError, match="in tile 36 "):
        write_feature_file(path, **bad, meta=META)
    assert list(path.parent.iterdir()) == []


def test_a_bad_value_behind_the_first_block_is_found(path, monkeypatch):
    monkeypatch.setattr("acmil.preprocessing.feature_file._BLOCK_VALUES", 5 * N_FEATURES)
    bad = arrays()
    bad["features"][31, 0] = np.nan
    with pytest.raises(FeatureFileError, match="in tile 31 "):
        write_feature_file(path, **bad, meta=META)


@pytest.mark.parametrize(
    ("name", "shape"), [("coords", (N_TILES - 1, 2)), ("coords", (N_TILES, 3)), ("tissue_fraction", (N_TILES + 1,))]
)
def test_shapes_that_disagree_are_refused(path, name, shape):
    bad = arrays() | {name: np.zeros(shape, np.int64 if name == "coords" else np.float32)}
    with pytest.raises(FeatureFileError, match="shapes must be"):
        write_feature_file(path, **bad, meta=META)
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = bad[name]
    with pytest.raises(FeatureFileError, match=r"shapes must be .*slide_1\.h5"):
        open_feature_file(path)


def test_no_tiles_is_refused(path):
    empty = {name: array[:0] for name, array in arrays().items()}
    with pytest.raises(FeatureFileError, match=r"at least 1 tile .* got shape \(0, 11\)"):
        write_feature_file(path, **empty, meta=META)


def test_missing_datasets_attributes_and_wrong_types_are_refused(path):
    write_feature_file(path, **arrays(), meta=META)
    with h5py.File(path, "r+") as file:
        del file.attrs["tile_mpp"]
    with pytest.raises(FeatureFileError, match="attribute 'tile_mpp'"):
        open_feature_file(path)
    with h5py.File(path, "r+") as file:
        del file["tissue_fraction"]
    with pytest.raises(FeatureFileError, match=r"without \['tissue_fraction'\]"):
        open_feature_file(path)
    with pytest.raises(FeatureFileError, match=r"types must be features float16 or float32.*got float64"):
        write_feature_file(path, **arrays(np.float64), meta=META)


def test_a_writer_killed_midway_leaves_no_file(path):
    # The process stops itself when the temporary file is written, just before it would get its name.
    code = f"""
import os, signal
from pathlib import Path
import h5py, numpy as np
import acmil.preprocessing.atomic as atomic
import acmil.preprocessing.feature_file as feature_file
meta = feature_file.FeatureMeta("slide_1", "e", "a", "b", 256, 256, 0, 10, 10, 0.5, 0.5)
atomic._flush_to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
feature_file.write_feature_file(Path({str(path)!r}), features=np.ones((4, 3), np.float32),
    coords=np.zeros((4, 2), np.int64), tissue_fraction=np.ones(4, np.float32), meta=meta)
"""
    finished = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)
    assert finished.returncode == -signal.SIGKILL
    assert not path.exists()
    (leftover,) = path.parent.iterdir()
    assert leftover.name.startswith(".slide_1.h5.")
    assert leftover.name.endswith(".tmp")
    write_feature_file(path, **arrays(), meta=META)
    assert open_feature_file(path).n_tiles == N_TILES


def test_an_older_file_survives_a_failed_write(path, monkeypatch):
    write_feature_file(path, **arrays(), meta=META)
    before = path.read_bytes()

    def full_disk(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.File, "flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_feature_file(path, **arrays(np.float32), meta=META)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["slide_1.h5"]
