"""The tile stream: one order whatever the threads, batches of one slide each, failures that stay with it."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide import SlideError
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.stream import SlideFailure, TileBatch, TileStream
from acmil.preprocessing.tile_readers import ThreadReader
from acmil.preprocessing.tiling import TileGrid
from acmil.preprocessing.tissue import Tissue

TILE_PX = 4


class CountingSlide:
    """Stands for an open slide: tile (x, y) is filled with its x; reading one takes longer than another."""

    def __init__(self, *, fail_at: int | None = None, delay_seconds: float = 0.0) -> None:
        self.fail_at = fail_at
        self.delay_seconds = delay_seconds
        self.n_reads = 0
        self.is_closed = False
        self._lock = threading.Lock()

    def read_tile(self, x: int, y: int, *, size_level0_px: int, out_px: int) -> np.ndarray:
        with self._lock:
            self.n_reads += 1
        if x == self.fail_at:
            raise SlideError(f"tile {x} is damaged")
        time.sleep(self.delay_seconds * (x % 3))
        return np.full((out_px, out_px, 3), x, np.uint8)

    def close(self) -> None:
        self.is_closed = True


class Cohort:
    """Slides of given numbers of tiles; those in `broken` cannot be opened, those in `damaged` fail at a tile."""

    def __init__(self, sizes, *, broken=(), damaged=None, delay_seconds=0.0):
        self.sources = [SlideSource(f"s{i}", Path(f"s{i}.svs")) for i in range(len(sizes))]
        self.sizes = dict(zip([source.slide_id for source in self.sources], sizes, strict=True))
        self.broken = set(broken)
        damaged = damaged or {}
        self.slides = {i: CountingSlide(fail_at=damaged.get(i), delay_seconds=delay_seconds) for i in self.sizes}

    def prepare(self, source: SlideSource) -> PreparedSlide:
        if source.slide_id in self.broken:
            raise ZeroDivisionError("not even a SlideError")
        n_tiles = self.sizes[source.slide_id]
        coords = np.stack([np.arange(n_tiles), np.zeros(n_tiles)], axis=1).astype(np.int64)
        grid = TileGrid(coords, np.ones(n_tiles, np.float32), TILE_PX, TILE_PX, 0.5, 0)
        tissue = Tissue(np.ones((1, 1), bool), 1.0, (), 1.0)
        return PreparedSlide(source, self.slides[source.slide_id], tissue, grid, None, 0.25)

    def stream(self, *, batch_size=10, workers=3) -> TileStream:
        return TileStream(self.sources, self.prepare, batch_size=batch_size, workers=workers)

    def n_reads(self) -> int:
        return sum(slide.n_reads for slide in self.slides.values())


def summarised(events):
    """Events as plain values: (slide_id, start, stop) of each batch and the pixel value of each tile."""
    plain = []
    for event in events:
        if isinstance(event, TileBatch):
            who = (event.prepared.source.slide_id, event.start, event.stop)
            plain.append((who, event.tiles[:, 0, 0, 0].tolist(), event.tiles.shape))
        elif isinstance(event, SlideFailure):
            plain.append((event.source.slide_id, type(event.error).__name__, str(event.error)))
        else:
            plain.append((event.source.slide_id, len(event.grid)))
    return plain


def test_batches_begin_at_each_slide_and_hold_every_tile_once():
    cohort = Cohort([7, 22, 1, 20])
    assert summarised(cohort.stream()) == [
        (("s0", 0, 7), [*range(7)], (7, TILE_PX, TILE_PX, 3)),
        (("s1", 0, 10), [*range(10)], (10, TILE_PX, TILE_PX, 3)),
        (("s1", 10, 20), [*range(10, 20)], (10, TILE_PX, TILE_PX, 3)),
        (("s1", 20, 22), [20, 21], (2, TILE_PX, TILE_PX, 3)),
        (("s2", 0, 1), [0], (1, TILE_PX, TILE_PX, 3)),
        (("s3", 0, 10), [*range(10)], (10, TILE_PX, TILE_PX, 3)),
        (("s3", 10, 20), [*range(10, 20)], (10, TILE_PX, TILE_PX, 3)),
    ]
    assert all(slide.is_closed for slide in cohort.slides.values())


def test_the_next_slide_is_read_while_the_encoder_is_at_the_end_of_one():
    cohort = Cohort([10, 10])
    events = iter(cohort.stream())
    assert next(events).prepared.source.slide_id == "s0"
    deadline = time.monotonic() + 10
    while cohort.slides["s1"].n_reads < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert cohort.slides["s1"].n_reads == 10
    events.close()


def test_batches_are_put_where_they_are_asked_for():
    made = []

    def allocate(shape):
        made.append(np.zeros(shape, np.uint8))
        return made[-1]

    cohort = Cohort([12])
    batches = list(
        TileStream(cohort.sources, cohort.prepare, batch_size=10, workers=2, reader=ThreadReader(allocate=allocate))
    )
    assert [batch.tiles is array for batch, array in zip(batches, made, strict=True)] == [True, True]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_order_and_batches_do_not_depend_on_the_number_of_threads(batch_size):
    def run(workers, delay_seconds):
        cohort = Cohort([30, 0, 9, 21, 3, 17], broken=["s2"], damaged={"s3": 13}, delay_seconds=delay_seconds)
        return summarised(cohort.stream(batch_size=batch_size, workers=workers))

    alone = run(1, 0.0)
    assert run(4, 0.002) == alone
    assert run(16, 0.001) == alone


def test_a_slide_that_cannot_be_opened_is_a_value_and_the_others_go_on():
    cohort = Cohort([3, 3, 3], broken=["s0", "s1"])
    assert summarised(cohort.stream()) == [
        ("s0", "ZeroDivisionError", "not even a SlideError"),
        ("s1", "ZeroDivisionError", "not even a SlideError"),
        (("s2", 0, 3), [0, 1, 2], (3, TILE_PX, TILE_PX, 3)),
    ]


def test_tiles_of_a_slide_that_fails_midway_are_dropped():
    cohort = Cohort([4, 40, 4], damaged={"s1": 22})
    events = summarised(cohort.stream(batch_size=10))
    failure = ("s1", "SlideError", "tile 22 is damaged")
    assert events == [
        (("s0", 0, 4), [*range(4)], (4, TILE_PX, TILE_PX, 3)),
        (("s1", 0, 10), [*range(10)], (10, TILE_PX, TILE_PX, 3)),
        (("s1", 10, 20), [*range(10, 20)], (10, TILE_PX, TILE_PX, 3)),
        failure,
        (("s2", 0, 4), [*range(4)], (4, TILE_PX, TILE_PX, 3)),
    ]
    assert cohort.slides["s1"].is_closed


def test_slides_without_tiles_are_passed_on_and_closed():
    cohort = Cohort([0, 2, 0])
    events = summarised(cohort.stream())
    assert sorted(event for event in events if len(event) == 2) == [("s0", 0), ("s2", 0)]
    assert all(slide.is_closed for slide in cohort.slides.values())
    assert summarised(Cohort([]).stream()) == []


def test_reading_stays_within_bounds_ahead_of_the_encoder():
    batch_size, workers = 16, 2
    cohort = Cohort([200, 200, 200])
    n_given = 0
    most_ahead = 0
    for event in cohort.stream(batch_size=batch_size, workers=workers):
        n_given += len(event.tiles)
        time.sleep(0.005)  # the encoder is slow, the threads have time to run ahead
        most_ahead = max(most_ahead, cohort.n_reads() - n_given)
    assert n_given == 600
    assert batch_size <= most_ahead <= 3 * batch_size + 8 * (workers + 1)


def test_a_consumer_that_stops_leaves_no_threads():
    cohort = Cohort([200, 200], delay_seconds=0.001)
    events = iter(cohort.stream(workers=4))
    next(events)
    events.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slide-reader")]
    assert cohort.n_reads() < 200


def test_tiles_are_examined_as_read_and_then_brought_to_normal_stains():
    cohort = Cohort([3, 22])

    def prepare(source):
        return replace(cohort.prepare(source), stain_map=lambda tiles: 200 - tiles - (source.slide_id == "s1"))

    reader = ThreadReader(examine=lambda tiles: tiles[:, 0, 0, :2].astype(np.float32))
    stream = TileStream(cohort.sources, prepare, batch_size=10, workers=3, reader=reader)
    for batch in stream:
        number = np.arange(batch.start, batch.stop)
        np.testing.assert_array_equal(batch.quality, np.stack([number, number], axis=1))
        expected = 200 - number - (batch.prepared.source.slide_id == "s1")
        np.testing.assert_array_equal(batch.tiles[:, 1, 2, 1], expected)


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_tiles_that_are_not_to_be_kept_are_left_out(batch_size):
    cohort = Cohort([7, 25, 2])
    stream = TileStream(
        *(cohort.sources, cohort.prepare),
        batch_size=batch_size,
        workers=3,
        reader=ThreadReader(examine=lambda tiles: tiles[:, 0, 0, :2].astype(np.float32)),
        keep=lambda quality: (quality[:, 0] % 2 == 1) & (quality[:, 0] < 20),
    )
    found = {"s0": [], "s1": [], "s2": []}
    read = dict.fromkeys(found, 0)
    for batch in stream:
        slide_id = batch.prepared.source.slide_id
        assert batch.start == read[slide_id]
        read[slide_id] = batch.stop
        np.testing.assert_array_equal(batch.quality[:, 0], np.arange(batch.start, batch.stop))
        assert batch.tiles.shape == (len(batch.numbers), TILE_PX, TILE_PX, 3)
        np.testing.assert_array_equal(batch.tiles[:, 1, 2, 1], batch.numbers)
        found[slide_id] += batch.numbers.tolist()
    assert found == {"s0": [1, 3, 5], "s1": [*range(1, 20, 2)], "s2": [1]}
    assert read == {"s0": 7, "s1": 25, "s2": 2}


def test_the_bytes_of_tiles_ahead_are_bounded(monkeypatch):
    from acmil.preprocessing import stream as module

    monkeypatch.setattr(module, "_MOST_BYTES_AHEAD", 2 * 8 * TILE_PX * TILE_PX * 3)  # two runs
    cohort = Cohort([240])
    batches = iter(cohort.stream(batch_size=80, workers=4))
    next(batches)
    time.sleep(0.05)
    assert cohort.n_reads() <= 80 + 3 * 8
    assert sum(len(batch.tiles) for batch in batches) == 160
