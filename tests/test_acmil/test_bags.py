"""Bags: what is read equals what was written, lazily; what does not go together is refused."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from acmil.bags import Bag, BagDataset, BagError, pack
from acmil.cohort import CohortRow
from acmil.preprocessing.feature_file import FeatureFileError, FeatureMeta, write_feature_file

META = FeatureMeta(
    slide_id="",
    encoder="tiny",
    encoder_digest="d1",
    preprocessing_digest="p1",
    tile_px=256,
    tile_level0_px=512,
    overlap_px=0,
    level0_width=10_000,
    level0_height=8_000,
    level0_mpp=0.25,
    tile_mpp=0.5,
)


def write_bag(folder: Path, slide_id: str, features: np.ndarray, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    n_tiles = len(features)
    coords = np.stack([np.arange(n_tiles) * 512, np.arange(n_tiles)], axis=1)
    meta = replace(META, slide_id=slide_id, **changes)
    tissue = np.ones(n_tiles, dtype=np.float32)
    write_feature_file(folder / f"{slide_id}.h5", features=features, coords=coords, tissue_fraction=tissue, meta=meta)
    return features, coords


def row(slide_id: str, label: str | None = "a") -> CohortRow:
    return CohortRow(slide_id, label, f"case-{slide_id}", None)


@pytest.fixture
def written(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return {
        name: write_bag(tmp_path, name, generator.normal(size=(n, 4)).astype(np.float16))
        for name, n in (("007", 3), ("s.1", 1), ("s2", 5))
    }


def test_the_origin_follows_the_features_and_not_the_folder(tmp_path: Path, written: dict) -> None:
    """Converted files say nothing but what they hold: other features of the same sizes are others."""
    rows = [row("007"), row("s2")]
    origin = BagDataset(tmp_path, rows, classes=None).origin
    for name in ("moved", "changed"):
        (tmp_path / name).mkdir()
        for slide_id in ("007", "s2"):
            features = written[slide_id][0].copy()
            features[-1] += name == "changed" and slide_id == "s2"
            write_bag(tmp_path / name, slide_id, features)
    assert BagDataset(tmp_path / "moved", rows[::-1], classes=None).origin == origin
    changed = BagDataset(tmp_path / "changed", rows, classes=None)
    assert {key for key, value in changed.origin.items() if value != origin[key]} == {"digest"}
    assert changed.select(["007"]).origin == BagDataset(tmp_path, rows[:1], classes=None).origin


@pytest.mark.parametrize("in_memory", [False, True])
def test_bags_are_what_was_written(tmp_path: Path, written: dict, in_memory: bool) -> None:
    rows = [row("s2", "b"), row("007", "a"), row("s.1", None)]
    bags = BagDataset(tmp_path, rows, classes=("a", "b"), in_memory=in_memory)
    assert (len(bags), bags.n_features, bags.n_tiles, bags.labels) == (3, 4, (5, 3, 1), (1, 0, None))
    assert [meta.slide_id for meta in bags.metas] == ["s2", "007", "s.1"]
    for bag, slide_id, label in zip(bags, ("s2", "007", "s.1"), (1, 0, None), strict=True):
        assert (bag.slide_id, bag.label, bag.case_id) == (slide_id, label, f"case-{slide_id}")
        assert bag.features.dtype == np.float16
        assert isinstance(bag.features, np.memmap) != in_memory
        np.testing.assert_array_equal(bag.features, written[slide_id][0])
        np.testing.assert_array_equal(bag.coords, written[slide_id][1])
        assert bag.coords.dtype == np.int64


def test_indexing_is_that_of_a_sequence(tmp_path: Path, written: dict) -> None:
    bags = BagDataset(tmp_path, [row(name) for name in written], classes=None)
    assert bags[-1].slide_id == "s2"
    assert bags[-1].label is None
    assert [bag.slide_id for bag in bags[1:]] == ["s.1", "s2"]
    with pytest.raises(IndexError):
        bags[3]


@pytest.mark.parametrize("in_memory", [False, True])
def test_pickled_and_read_from_threads(tmp_path: Path, written: dict, in_memory: bool) -> None:
    bags = BagDataset(tmp_path, [row(name) for name in written], classes=("a",), in_memory=in_memory)
    again = pickle.loads(pickle.dumps(bags))
    assert again.rows == bags.rows
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(lambda i: again[i % 3], range(60)))
    for i, bag in enumerate(read):
        expected = written[bags.rows[i % 3].slide_id]
        np.testing.assert_array_equal(bag.features, expected[0])
        np.testing.assert_array_equal(bag.coords, expected[1])


def test_a_selection_opens_no_file_again(tmp_path: Path, written: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BagDataset(tmp_path, [row(slide_id) for slide_id in written], classes=["a"])
    monkeypatch.setattr("acmil.bags.open_feature_file", None)
    slide_ids = list(written)[::-1][:2]
    part = whole.select(slide_ids)
    assert [bag.slide_id for bag in part] == [r.slide_id for r in part.rows] == slide_ids
    assert part.n_tiles == tuple(len(written[slide_id][0]) for slide_id in slide_ids)
    assert [meta.slide_id for meta in part.metas] == slide_ids
    for bag in part:
        np.testing.assert_array_equal(bag.features, written[bag.slide_id][0])
    held = part[0]
    assert whole.select(slide_ids[:1])[0] is held is whole[len(written) - 1]
    for wanted, found in (([], "none"), (["nobody"], "'nobody'")):
        with pytest.raises(BagError, match=f"must be of slides of the data set, got {found}"):
            whole.select(wanted)


def test_unknown_label_is_refused(tmp_path: Path, written: dict) -> None:
    with pytest.raises(BagError, match="label of slide 's2' must be one of 'a', 'b', got 'c'"):
        BagDataset(tmp_path, [row("007"), row("s2", "c")], classes=("a", "b"))


def test_no_slides(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="at least 1 slide"):
        BagDataset(tmp_path, [], classes=None)


def test_missing_files_are_listed_up_to_five(tmp_path: Path, written: dict) -> None:
    rows = [row("s2"), *(row(f"absent{i}") for i in range(8))]
    with pytest.raises(BagError) as caught:
        BagDataset(tmp_path, rows, classes=None)
    message = str(caught.value)
    assert "8 of 9 have none: 'absent0', 'absent1', 'absent2', 'absent3', 'absent4' and 3 more" in message
    assert f"({tmp_path}, which holds 3)" in message
    assert message.endswith("Preprocess these slides, or drop them from the cohort.")


@pytest.mark.parametrize(
    ("slide_id", "mend"),
    [
        ("s2.svs", "Write slide ids without the file ending: 's2', not 's2.svs'."),
        ("tumour-0123-B", "Is 'tumour-0123-B' the slide whose features are 'tumour_0123_B.h5'? Correct the id."),
    ],
)
def test_missing_file_with_a_near_name(tmp_path: Path, written: dict, slide_id: str, mend: str) -> None:
    write_bag(tmp_path, "tumour_0123_B", np.ones((1, 4), dtype=np.float16))
    with pytest.raises(BagError) as caught:
        BagDataset(tmp_path, [row("007"), row(slide_id)], classes=None)
    assert str(caught.value).endswith(mend)


def test_job_folder_instead_of_its_features(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    write_bag(tmp_path / "features", "s1", np.ones((1, 4), dtype=np.float16))
    with pytest.raises(BagError, match=r"Did you mean .*features"):
        BagDataset(tmp_path, [row("s1")], classes=None)
    with pytest.raises(BagError, match=r"must be a folder of \.h5 files, found none"):
        BagDataset(tmp_path / "absent", [row("s1")], classes=None)


@pytest.mark.parametrize(
    ("n_features", "changes", "said"),
    [
        (5, {}, "same n_features, got 4 for '007' and 5 for 'odd'"),
        (4, {"encoder": "other"}, "same encoder, got 'tiny' for '007' and 'other' for 'odd'"),
        (4, {"encoder_digest": "d2"}, "same encoder_digest, got 'd1' for '007' and 'd2' for 'odd'"),
        (4, {"tile_px": 512}, "same tile_px, got 256 for '007' and 512 for 'odd'"),
        (
            4,
            {"tile_mpp": 0.506},
            "within 0.01 of each other (mpp_tolerance), got 0.5 µm/px for '007' and 0.506",
        ),
        (4, {"tile_mpp": 0.25}, "got 0.25 µm/px for 'odd' and 0.5 µm/px for '007': 1. Preprocess"),
    ],
)
def test_features_that_do_not_go_together(
    tmp_path: Path, written: dict, n_features: int, changes: dict, said: str
) -> None:
    write_bag(tmp_path, "odd", np.ones((2, n_features), dtype=np.float16), **changes)
    with pytest.raises(BagError) as caught:
        BagDataset(tmp_path, [row("007"), row("odd")], classes=None)
    assert said in str(caught.value)


def test_a_file_of_another_slide_is_told_of(tmp_path: Path, written: dict, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(tmp_path / "007.h5", tmp_path / "008.h5")
    BagDataset(tmp_path, [row("007"), row("008")], classes=None)
    assert "1 feature files say that they are of another slide, the first is 008.h5, of '007'" in caplog.text


@pytest.mark.parametrize("changes", [{"tile_mpp": 0.504}, {"tile_mpp": float("nan")}, {"encoder_digest": ""}])
def test_features_that_go_together(tmp_path: Path, written: dict, changes: dict) -> None:
    write_bag(tmp_path, "like", np.ones((2, 4), dtype=np.float32), **changes)
    assert len(BagDataset(tmp_path, [row("007"), row("like")], classes=None)) == 2


def test_a_file_name_of_another_system_is_found(tmp_path: Path, written: dict) -> None:
    write_bag(tmp_path, "Me\u0301tastase", np.ones((2, 4), dtype=np.float32))  # as macOS writes it
    assert len(BagDataset(tmp_path, [row("007"), row("M\u00e9tastase")], classes=None)) == 2


def test_a_slide_of_the_cohort_is_not_taken_for_the_one_that_is_missing(tmp_path: Path, written: dict) -> None:
    with pytest.raises(BagError, match=r"Preprocess these slides, or drop them"):
        BagDataset(tmp_path, [row("007"), row("0077")], classes=None)
    with pytest.raises(BagError, match=r"Is '0077' the slide whose features are '007\.h5'"):
        BagDataset(tmp_path, [row("0077")], classes=None)


def test_damaged_file_is_refused_when_the_data_set_is_made(tmp_path: Path, written: dict) -> None:
    path = tmp_path / "s2.h5"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FeatureFileError, match=r"s2\.h5"):
        BagDataset(tmp_path, [row("007"), row("s2")], classes=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_puts_bags_one_after_the_other(tmp_path: Path, written: dict, dtype: torch.dtype) -> None:
    bags = BagDataset(tmp_path, [row("s2", "b"), row("s.1"), row("007")], classes=("a", "b"))
    packed = pack(list(bags), device="cpu", dtype=dtype)
    assert packed.features.dtype == dtype
    expected = torch.tensor(np.concatenate([written[name][0] for name in ("s2", "s.1", "007")])).to(dtype)
    torch.testing.assert_close(packed.features, expected, rtol=0, atol=0)
    assert packed.offsets.tolist() == [0, 5, 6, 9]
    assert packed.labels is not None
    assert packed.labels.tolist() == [1, 0, 0]
    assert packed.offsets.dtype == packed.labels.dtype == torch.int64


def bag(n_features: int, label: int | None, slide_id: str = "s") -> Bag:
    return Bag(slide_id, np.ones((2, n_features), dtype=np.float32), np.zeros((2, 2), dtype=np.int64), label, "c")


def test_pack_without_labels_does_not_share_memory() -> None:
    one = bag(3, None)
    packed = pack([one], device="cpu")
    assert packed.labels is None
    packed.features.zero_()
    assert one.features.sum() == 6


def test_pack_refuses_what_does_not_go_together() -> None:
    with pytest.raises(BagError, match="at least 1 bag"):
        pack([], device="cpu")
    with pytest.raises(BagError, match="one feature size, got 3 for 's' and 4 for 'wide'"):
        pack([bag(3, 0), bag(4, 0, "wide")], device="cpu")
    with pytest.raises(BagError, match="'bare' has none"):
        pack([bag(3, 0), bag(3, None, "bare")], device="cpu")


@pytest.mark.gpu
def test_pack_on_a_gpu_gives_what_the_cpu_gives() -> None:
    bags = [bag(3, 1), bag(3, 0)]
    there, here = pack(bags, device="cuda"), pack(bags, device="cpu")
    assert there.features.is_cuda
    assert there.labels is not None
    assert here.labels is not None
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=0, atol=0)
    torch.testing.assert_close(there.labels.cpu(), here.labels)


def test_import_needs_only_the_training_libraries() -> None:
    """A GPU machine with torch, numpy, h5py and safetensors alone can read bags."""
    import subprocess
    import sys

    heavy = ("pydantic", "sklearn", "pandas", "scipy", "openslide", "matplotlib", "cv2", "timm")
    code = f"import sys, acmil.bags; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
