"""Reader processes: the threads' pixels, errors as values, memory used again, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from acmil.preprocessing.quality import tile_quality
from acmil.preprocessing.reader_processes import ProcessReaders, ReaderProcessError
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.stain import MacenkoMap
from acmil.preprocessing.tile_readers import ThreadReader
from acmil.preprocessing.tiling import TileGrid

pytestmark = pytest.mark.skipif(not ProcessReaders.is_available(), reason="needs Linux: memory shared by memfd_create")

TILE_PX = 32
SHAPE = (5, TILE_PX, TILE_PX, 3)
BLOCK_BYTES = 5 * TILE_PX**2 * 3
STAINS = MacenkoMap(np.diag([0.5, 0.7, 0.9]).astype(np.float32))


def grid_of(*coords: tuple[int, int]) -> TileGrid:
    return TileGrid(np.array(coords), np.ones(len(coords), np.float32), TILE_PX, 2 * TILE_PX, 0.5, 0)


GRID = grid_of((0, 0), (64, 0), (10, 70), (130, 99), (200, 3), (77, 77))


@pytest.fixture
def slide(tmp_path, write_slide, make_tissue_picture) -> Slide:
    path = write_slide(
        tmp_path / "a.tiff", make_tissue_picture(300, 200, ellipses=[(150, 100, 120, 80)], seed=1), mpp=0.25
    )
    return Slide.open(path, mpp=0.25)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stain_map", [None, STAINS])
def test_tiles_and_measures_are_those_of_a_thread(slide, stain_map):
    with (
        ProcessReaders(1, block_bytes=BLOCK_BYTES, examine=tile_quality) as readers,
        ThreadReader(examine=tile_quality) as own,
    ):
        tiles, expected = readers.allocate(SHAPE), own.allocate(SHAPE)
        tiles[:] = 7
        measures = readers.read(slide, GRID, 1, tiles[:3], stain_map)
        np.testing.assert_array_equal(measures, own.read(slide, GRID, 1, expected[:3], stain_map))
        readers.read(slide, GRID, 4, tiles[3:], stain_map)
        own.read(slide, GRID, 4, expected[3:], stain_map)
        np.testing.assert_array_equal(tiles, expected)


def test_errors_are_those_of_a_thread_and_the_next_slide_is_read(slide, tmp_path):
    broken = Slide.open(slide.path, slide_id="broken")
    broken.path = tmp_path / "none.tiff"
    with ProcessReaders(1, block_bytes=BLOCK_BYTES) as readers:
        tiles = readers.allocate(SHAPE)
        with pytest.raises(SlideError, match=r"slide 'broken': .*none\.tiff"):
            readers.read(broken, GRID, 0, tiles, None)
        assert readers.read(slide, GRID, 0, tiles, None) is None
        assert readers._idle.qsize() == 1


def test_a_process_that_dies_costs_one_slide(slide):
    with ProcessReaders(1, block_bytes=BLOCK_BYTES) as readers:
        tiles = readers.allocate(SHAPE)
        readers.read(slide, GRID, 0, tiles, None)
        process = readers._idle.queue[0]
        expected = tiles.copy()
        ask = process.ask

        def die_first(request):
            os.kill(process._process.pid, signal.SIGSEGV)
            return ask(request)

        process.ask = die_first
        with pytest.raises(SlideError, match=r"slide 'a': the process that read it died \(SIGSEGV\): .*a\.tiff"):
            readers.read(slide, GRID, 0, tiles, None)
        tiles[:] = 0
        readers.read(slide, GRID, 0, tiles, None)
        np.testing.assert_array_equal(tiles, expected)
        (second,) = readers._idle.queue
        assert second is not process
    assert not is_running(process._process.pid)
    assert not is_running(second._process.pid)


def test_memory_is_used_again_once_nobody_sees_it():
    with ProcessReaders(1, block_bytes=BLOCK_BYTES) as readers:
        first = readers.allocate(SHAPE)
        address, part = first.ctypes.data, first[2:, 4:]
        del first
        second = readers.allocate(SHAPE)
        assert second.ctypes.data != address  # a part of the first is still seen
        del part
        assert readers.allocate((1, TILE_PX, TILE_PX, 3)).ctypes.data == address
        with pytest.raises(ValueError, match="at most"):
            readers.allocate((30, TILE_PX, TILE_PX, 3))
        with pytest.raises(ValueError, match="array of `allocate`"):
            readers._place(np.zeros(SHAPE, np.uint8))


def test_memory_is_pinned_and_unpinned():
    pinned, unpinned = [], []
    readers = ProcessReaders(
        1,
        block_bytes=BLOCK_BYTES,
        pin=lambda block: pinned.append((block.ctypes.data, block.nbytes)),
        unpin=lambda block: unpinned.append((block.ctypes.data, block.nbytes)),
    )
    with readers:
        arrays = [readers.allocate(SHAPE) for _ in range(2)]
        assert [address for address, _ in pinned] == [array.ctypes.data for array in arrays]
    assert unpinned == pinned
    assert min(size for _, size in pinned) >= BLOCK_BYTES


RUN = """
import sys, time
import numpy as np
from pathlib import Path
from acmil.preprocessing.reader_processes import ProcessReaders, ReaderProcessError
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import TileGrid

readers = ProcessReaders(1, block_bytes=32 * 32 * 3)
grid = TileGrid(np.zeros((1, 2), np.int64), np.ones(1, np.float32), 32, 64, 0.5, 0)
readers.read(Slide.open(sys.argv[1], mpp=0.25), grid, 0, readers.allocate((1, 32, 32, 3)), None)
print(readers._idle.queue[0]._process.pid, flush=True)
time.sleep(60)
"""


def test_the_processes_end_with_a_killed_job(slide):
    with subprocess.Popen([sys.executable, "-c", RUN, slide.path], stdout=subprocess.PIPE, text=True) as job:
        pid = int(job.stdout.readline())
        assert is_running(pid)
        job.kill()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def test_processes_that_do_not_start_are_an_error_of_the_job(monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", ["/nowhere"])
    readers = ProcessReaders(1, block_bytes=BLOCK_BYTES)
    with pytest.raises(ReaderProcessError, match=r"exit status 1.*--workers 4"), readers:
        readers.wait_ready()
    assert "Error" in capfd.readouterr().err


def test_a_folder_of_the_same_name_as_the_package_is_not_taken_for_it(slide, tmp_path, monkeypatch):
    (tmp_path / "acmil").mkdir()
    (tmp_path / "acmil" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with ProcessReaders(1, block_bytes=BLOCK_BYTES) as readers:
        assert readers.read(slide, GRID, 0, readers.allocate(SHAPE), None) is None


def test_they_start_without_torch():
    code = "import sys; from acmil.preprocessing import reader_child; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
