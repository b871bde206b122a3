"""Tiles as pictures: the encoder's pixels, the same bytes in each run, whole or not at all."""

import hashlib
import signal
import subprocess
import sys
import tarfile
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from acmil.preprocessing import tile_images
from acmil.preprocessing.atomic import remove
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.feature_file import open_feature_file
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.leases import Leases
from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.stream import SlideFailure, TileBatch
from acmil.preprocessing.tile_images import TileStore, TileWriter
from acmil.preprocessing.tiling import TileGrid
from acmil.preprocessing.tissue import Tissue

ENCODER, TILE_PX = "test_efficientnet", 32


@pytest.fixture(scope="module")
def options(tmp_path_factory, write_slide, make_tissue_picture) -> dict:
    """Three slides, at two resolutions; b's file is named as some archives are."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "slides").mkdir()
    torch.manual_seed(0)
    save_file(import_timm().create_model(ENCODER).state_dict(), folder / "random.safetensors")
    for name, width, height, mpp in (("a", 400, 300, 0.5), ("b.1", 900, 700, 0.25), ("c", 300, 300, 0.5)):
        picture = make_tissue_picture(width, height, ellipses=[(width // 2, height // 2, width // 3, height // 3)])
        write_slide(folder / "slides" / f"{name}.tiff", picture, mpp=mpp)
    write_slide(folder / "slides" / "glass.tiff", make_tissue_picture(300, 300, ellipses=[]))
    common = {"encoder": ENCODER, "weights": folder / "random.safetensors", "tile_px": TILE_PX, "batch_size": 20}
    return common | {"slides": [folder / "slides"], "device": "cpu", "precision": "fp32", "workers": 2}


def run(options, out, **changed):
    return preprocess(PreprocessConfig(**options | changed, out=out))


def digests(folder):
    """SHA-256 of every file in a folder, hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expected_tiles(options, job, slide_id):
    """The tiles of a feature file, read anew, in its order: {(x, y): (h, w, 3)}."""
    file = open_feature_file(job / "features" / f"{slide_id}.h5")
    with Slide.open(options["slides"][0] / f"{slide_id}.tiff", slide_id=slide_id) as slide:
        return {
            (x, y): slide.read_tile(x, y, size_level0_px=file.meta.tile_level0_px, out_px=TILE_PX)
            for x, y in file.coords().tolist()
        }


def decoded(content):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("slide_id", ["a", "b.1"])
def test_a_folder_holds_the_encoders_pixels(options, tmp_path, slide_id):
    assert run(options, tmp_path / "job", save_tiles="folder", tile_format="png").done == 3
    assert sorted(path.name for path in (tmp_path / "job/tiles").iterdir()) == ["a", "b.1", "c"]
    tiles = expected_tiles(options, tmp_path / "job", slide_id)
    folder = tmp_path / "job/tiles" / slide_id
    assert {path.name for path in folder.iterdir()} == {f"{x}_{y}.png" for x, y in tiles}
    assert len(tiles) > 10
    for (x, y), tile in tiles.items():
        np.testing.assert_array_equal(decoded((folder / f"{x}_{y}.png").read_bytes()), tile)


def test_a_tar_holds_them_in_the_grids_order(options, tmp_path):
    run(options, tmp_path / "job", save_tiles="tar")
    assert sorted(path.name for path in (tmp_path / "job/tiles").iterdir()) == ["a.tar", "b.1.tar", "c.tar"]
    tiles = expected_tiles(options, tmp_path / "job", "b.1")
    with tarfile.open(tmp_path / "job/tiles/b.1.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [f"b.1/{x}_{y}.jpg" for x, y in tiles]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        for member, tile in zip(members, tiles.values(), strict=True):
            picture = decoded(archive.extractfile(member).read())
            assert picture.shape == (TILE_PX, TILE_PX, 3)
            assert np.abs(picture.astype(int) - tile).mean() < 4  # JPEG of quality 90
    order = list(tiles)
    assert order == sorted(order, key=lambda corner: (corner[1], corner[0]))


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_bytes_are_the_same_in_each_run(options, tmp_path, container, image_format):
    run(options, tmp_path / "one", save_tiles=container, tile_format=image_format, workers=1)
    time.sleep(1.1)  # a tar's times are whole seconds
    changed = {"workers": 3, "batch_size": 7, "previews": False}
    run(options, tmp_path / "other", save_tiles=container, tile_format=image_format, **changed)
    assert digests(tmp_path / "one/tiles") == digests(tmp_path / "other/tiles")
    assert digests(tmp_path / "one/tiles")


def test_a_job_that_is_given_the_option_later_does_its_slides_again(options, tmp_path):
    job = tmp_path / "job"
    assert run(options, job).done == 3
    assert not (job / "tiles").exists()
    features = digests(job / "features")
    summary = run(options, job, save_tiles="tar")
    assert (summary.done, summary.skipped) == (3, 1)
    assert digests(job / "features") == features
    assert {path.name for path in (job / "tiles").iterdir()} == {"a.tar", "b.1.tar", "c.tar"}
    for unchanged in ({"save_tiles": "tar"}, {}):  # and turned off again, the pictures stay
        before = digests(job)
        assert run(options, job, **unchanged).skipped == 4
        assert digests(job / "tiles") == {k[6:]: v for k, v in before.items() if k.startswith("tiles/")}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"save_tiles": "tar"}, {"save_tiles": "folder"}),
        ({"save_tiles": "folder"}, {"save_tiles": "tar"}),
        ({"save_tiles": "tar"}, {"save_tiles": "tar", "tile_format": "png"}),
        ({"save_tiles": "folder"}, {"save_tiles": "folder", "tile_format": "png"}),
    ],
)
def test_another_form_takes_the_place_of_the_first(options, tmp_path, first, then):
    one_slide = options | {"slides": [options["slides"][0] / "a.tiff"]}
    run(one_slide, tmp_path / "job", **first)
    assert run(one_slide, tmp_path / "job", **then).done == 1
    run(one_slide, tmp_path / "straight", **then)
    assert digests(tmp_path / "job/tiles") == digests(tmp_path / "straight/tiles")


def test_lost_pictures_are_made_again(options, tmp_path):
    run(options, tmp_path / "job", save_tiles="folder")
    before = digests(tmp_path / "job/tiles")
    next((tmp_path / "job/tiles/a").iterdir()).unlink()
    summary = run(options, tmp_path / "job", save_tiles="folder")
    assert (summary.done, summary.skipped) == (1, 3)
    assert digests(tmp_path / "job/tiles") == before


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_slide_that_fails_leaves_no_picture(options, tmp_path, monkeypatch, container):
    read_tile, reads = Slide.read_tile, []

    def failing(self, x, y, **where):
        reads.append(self.slide_id)
        if self.slide_id == "b.1" and reads.count("b.1") == 30:
            raise SlideError("slide 'b.1': damaged here")
        return read_tile(self, x, y, **where)

    run(options, tmp_path / "whole", save_tiles=container)
    monkeypatch.setattr(Slide, "read_tile", failing)
    summary = run(options, tmp_path / "job", save_tiles=container)
    assert (summary.done, summary.failed) == (2, 1)
    names = {
        path.stem.split("_")[0] if container == "tar" else path.name for path in (tmp_path / "job/tiles").iterdir()
    }
    assert names == {"a", "c"}
    monkeypatch.undo()
    assert run(options, tmp_path / "job", save_tiles=container).done == 1
    assert digests(tmp_path / "job/tiles") == digests(tmp_path / "whole/tiles")


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_features_that_cannot_be_stored_take_the_pictures_with_them(options, tmp_path, container):
    from acmil.preprocessing.encoders.weights import read_weights

    huge = read_weights(options["weights"])
    huge["bn2.bias"] = torch.full_like(huge["bn2.bias"], 1e9)
    save_file(huge, tmp_path / "huge.safetensors")
    summary = run(options, tmp_path / "job", save_tiles=container, weights=tmp_path / "huge.safetensors")
    assert (summary.done, summary.failed) == (0, 3)
    assert list((tmp_path / "job/tiles").iterdir()) == []


KILLED = """
import json, os, signal, sys
from acmil.preprocessing import job
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.tile_images import TileWriter

write, n = TileWriter._write, 0

def count(self, *given):
    global n
    write(self, *given)
    n += 1
    if n == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

TileWriter._write = count
job.preprocess(PreprocessConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_killed_run_leaves_nothing_that_counts(options, tmp_path, container):
    run(options, tmp_path / "whole", save_tiles=container)
    given = PreprocessConfig(**options, out=tmp_path / "job", save_tiles=container).model_dump_json()
    killed = subprocess.run([sys.executable, "-c", KILLED, given, "9"], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path for path in (tmp_path / "job/tiles").iterdir() if path.name.startswith(".")]
    assert left
    assert all(path.name.endswith(".tmp") for path in left)
    done = {path.name.removesuffix(".tar") for path in set((tmp_path / "job/tiles").iterdir()) - set(left)}
    with_features = {path.stem for path in (tmp_path / "job/features").glob("*.h5")}
    assert with_features <= done  # the pictures come first
    run(options, tmp_path / "job", save_tiles=container)
    assert digests(tmp_path / "job/tiles") == digests(tmp_path / "whole/tiles")
    assert digests(tmp_path / "job/features") == digests(tmp_path / "whole/features")


def test_two_processes_share_a_job(options, tmp_path):
    run(options, tmp_path / "whole", save_tiles="folder")
    given = PreprocessConfig(**options, out=tmp_path / "job", save_tiles="folder").model_dump_json()
    both = [subprocess.Popen([sys.executable, "-c", KILLED, given, "-1"]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert digests(tmp_path / "job/tiles") == digests(tmp_path / "whole/tiles")
    assert digests(tmp_path / "job/features") == digests(tmp_path / "whole/features")


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_slide_that_is_lost_to_another_process_is_let_go(options, tmp_path, monkeypatch, container):
    """Who takes a slide over removes what the first was writing of it."""
    run(options, tmp_path / "whole", save_tiles=container)
    holds, asked = Leases.holds, []

    def lost_once(self, slide_id):
        asked.append(slide_id)
        if slide_id != "a" or asked.count("a") > 1:
            return holds(self, slide_id)
        for path in (tmp_path / "job/tiles").glob(".a.*.tmp"):
            remove(path)
        return False

    monkeypatch.setattr(Leases, "holds", lost_once)
    assert run(options, tmp_path / "job", save_tiles=container).done == 3
    assert digests(tmp_path / "job/tiles") == digests(tmp_path / "whole/tiles")


def test_an_interrupted_run_removes_what_it_was_writing(options, tmp_path):
    class Impatient:
        def begin(self, title, total):
            pass

        def advance(self, steps=1, note=""):
            if note.startswith("b.1: ") and "of" in note:
                raise KeyboardInterrupt

        def end(self):
            pass

    config = PreprocessConfig(**options, out=tmp_path / "job", save_tiles="tar")
    with pytest.raises(KeyboardInterrupt):
        preprocess(config, progress=Impatient())
    assert {path.name for path in (tmp_path / "job/tiles").iterdir()} <= {"a.tar"}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tile-")]


def test_the_label_and_the_overview_are_not_written(shared_data, options, tmp_path):
    slide = shared_data / "slides" / "CMU-1-Small-Region.svs"  # its file holds both
    run(options, tmp_path / "job", slides=[slide], tile_px=512, save_tiles="folder", stain_normalisation="macenko")
    file = open_feature_file(tmp_path / "job/features/CMU-1-Small-Region.h5")
    names = {path.name for path in (tmp_path / "job/tiles").rglob("*") if path.is_file()}
    assert names == {f"{x}_{y}.jpg" for x, y in file.coords().tolist()}


def batches(slide_id, n_tiles, *, batch_size=16, tile_px=64):
    """A slide's batches, made as they are asked for."""
    coords = np.stack([np.arange(n_tiles), np.zeros(n_tiles)], axis=1).astype(np.int64)
    grid = TileGrid(coords, np.ones(n_tiles, np.float32), tile_px, tile_px, 0.5, 0)
    prepared = PreparedSlide(
        SlideSource(slide_id, None), None, Tissue(np.ones((1, 1), bool), 1.0, (), 1.0), grid, None, 0.0
    )
    for start in range(0, n_tiles, batch_size):
        stop = min(start + batch_size, n_tiles)
        tiles = np.random.default_rng(start).integers(0, 256, (stop - start, tile_px, tile_px, 3), dtype=np.uint8)
        yield TileBatch(prepared, start, stop, np.arange(start, stop), tiles, None, 0.0)


def test_a_slow_disk_holds_the_stream_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_images, "_MOST_BYTES_WAITING", 4 * 8 * 64 * 64 * 3)  # four runs of tiles
    gate = threading.Event()
    write = TileWriter._write

    def waiting(self, *given):
        gate.wait(10)
        write(self, *given)

    monkeypatch.setattr(TileWriter, "_write", waiting)
    asked = []

    def counted():
        for batch in batches("s", 160):
            asked.append(batch.stop)
            yield batch

    with TileWriter(TileStore(tmp_path, "tar", "png"), threads=2) as writer:
        reader = threading.Thread(target=lambda: list(writer.watch(counted())))
        reader.start()
        time.sleep(0.3)
        assert asked == [16, 32, 48]  # of ten batches
        gate.set()
        reader.join(10)
        writer.finish("s")
    assert asked[-1] == 160
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert len(archive.getmembers()) == 160


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_disk_that_fails_is_told_when_the_slide_is_finished(tmp_path, container):
    missing = tmp_path / "not_there"
    with TileWriter(TileStore(missing, container, "jpeg"), threads=1) as writer:
        assert len(list(writer.watch(batches("s", 40)))) == 3
        with pytest.raises(FileNotFoundError):
            writer.finish("s")
        failure = SlideFailure(SlideSource("t", None), SlideError("broken"))
        missing.mkdir()
        assert list(writer.watch([next(batches("t", 40)), failure]))[-1] is failure
        assert list(missing.iterdir()) == []
        writer.drop("never begun")


def test_slides_may_overlap_in_time(tmp_path):
    """The next slide's tiles come before the last one's features are written."""
    with TileWriter(TileStore(tmp_path, "tar", "png"), threads=2) as writer:
        list(writer.watch([*batches("s", 20), *batches("t", 20)]))
        assert not (tmp_path / "s.tar").exists()
        writer.finish("s")
        writer.drop("t")
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(10240)])
def test_what_is_no_tar_of_tiles_does_not_count(tmp_path, content):
    store = TileStore(tmp_path, "tar", "jpeg")
    assert not store.has("s", 1)
    (tmp_path / "s.tar").write_bytes(content)
    assert not store.has("s", 1)
