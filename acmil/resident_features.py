"""Where the features of the resident engine are: rows on the GPU, or page-locked memory that a ring is filled from."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from acmil.training import checked_bags

if TYPE_CHECKING:
    from acmil.bags import Bag
    from acmil.engine import TrainingJob

_LEAST_RING = 3
_READERS = 8  # threads that read feature files


def ring_slots(batch_size: int) -> int:
    """Bags of a run that may be on their way, or in use, when features are streamed: of a step, and of the next."""
    return max(_LEAST_RING, 2 * batch_size)


class BagSource(NamedTuple):
    """A bag by its name; its features are read when they are needed."""

    name: str
    label: int
    n_rows: int
    n_features: int
    bags: "Sequence[Bag]"
    number: int  # in the bags

    def read(self) -> Tensor:
        """Features as stored, (N, D)."""
        return torch.from_numpy(np.array(self.bags[self.number].features))


class Sets(NamedTuple):
    """The bags of one run."""

    train: list[BagSource]
    val: list[BagSource]

    @property
    def all(self) -> list[BagSource]:
        """Both sets."""
        return [*self.val, *self.train]

    @classmethod
    def of(cls, job: "TrainingJob") -> "Sets":
        """The bags of a job; a ValueError if they cannot be trained on."""
        n_classes = job.model.options["n_classes"]
        return cls(_slides(job.train_bags, "train", n_classes), _slides(job.val_bags, "val", n_classes))


def _slides(bags: "Sequence[Bag]", name: str, n_classes: int) -> list[BagSource]:
    """The bags of a set by their names."""
    slides = []
    for number, bag in enumerate(checked_bags(bags, name, n_classes)):
        assert bag.label is not None
        n_rows, n_features = bag.features.shape
        slides.append(BagSource(bag.slide_id, bag.label, n_rows, n_features, bags, number))
    return slides


class Place(NamedTuple):
    """Where a bag's features are."""

    name: str
    n_rows: int
    start: int | None  # row on the device; None: streamed
    host: Tensor | None  # (N, D), page-locked, if streamed


class Store:
    """Features of all bags in the type to compute in: rows on the device, a ring behind them, and what is streamed."""

    def __init__(
        self, slides: list[BagSource], dtype: torch.dtype, device: torch.device, room: int, slots: int
    ) -> None:
        self.device = device
        distinct = {slide.name: slide for slide in reversed(slides)}
        distinct = {slide.name: distinct[slide.name] for slide in slides}  # in order of first use
        n_features = slides[0].n_features
        row_bytes = n_features * dtype.itemsize
        self.slot_rows = 0
        on_device = sum(slide.n_rows for slide in distinct.values())
        if on_device * row_bytes > room:
            self.slot_rows = max(slide.n_rows for slide in distinct.values())
            on_device = max(0, room // row_bytes - slots * self.slot_rows)
        starts, row = {}, 0
        for slide in distinct.values():
            if row + slide.n_rows <= on_device:
                starts[slide.name], row = row, row + slide.n_rows
        self.ring_start = row
        self.features = torch.empty((row + slots * self.slot_rows, n_features), dtype=dtype, device=device)
        self.features[row:].zero_()  # rows behind a short bag are read, though never used
        self._locked: list[Tensor] = []
        self.places: dict[str, Place] = {}
        finite = torch.ones(len(distinct), dtype=torch.bool, device=device)
        for number, (slide, stored) in enumerate(_read(list(distinct.values()))):
            features = stored.to(device).to(dtype)
            finite[number] = features.isfinite().all()
            start, host = starts.get(slide.name), None
            if start is None:
                host = self._lock(features.cpu())
            else:
                self.features[start : start + slide.n_rows] = features
            self.places[slide.name] = Place(slide.name, slide.n_rows, start, host)
        self._not_finite = {name for name, good in zip(distinct, finite.tolist(), strict=True) if not good}
        self.ready_since = time.perf_counter()

    def places_of(self, slides: list[BagSource]) -> list[Place]:
        """Where slides are.

        Raises:
            ValueError: If the features of one are not finite.
        """
        for slide in slides:
            if slide.name in self._not_finite:
                raise ValueError(
                    f"features must be finite, got NaN or Inf in bag '{slide.name}'. Preprocess the slide again."
                )
        return [self.places[slide.name] for slide in slides]

    def _lock(self, tensor: Tensor) -> Tensor:
        """Page-lock memory where it is: an allocation of page-locked memory may be twice as large as asked for."""
        if self.device.type == "cuda":
            status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
            if int(status) == 0:
                self._locked.append(tensor)
        return tensor

    def close(self) -> None:
        """Wait for what is under way, and release the page locks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        while self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked.pop().data_ptr())


class Lane:
    """A stream on which the steps of a group are queued, with its own slots of the ring."""

    def __init__(self, store: Store, first_row: int, slots: int) -> None:
        self.store = store
        self.on_gpu = store.device.type == "cuda"
        self._first_row, self._slots = first_row, slots
        self._slot = 0
        if self.on_gpu:
            self.stream, self._copies = torch.cuda.Stream(store.device), torch.cuda.Stream(store.device)
            self._free: list[torch.cuda.Event | None] = [None] * slots

    def current(self) -> Any:
        """The context in which work is queued on this lane."""
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def starts_of(self, places: Sequence[Place]) -> list[int]:
        """The rows where bags will begin, if `at` is entered for each of them in this order."""
        starts, slot = [], self._slot
        for place in places:
            if place.start is None:
                starts.append(self._first_row + slot * self.store.slot_rows)
                slot = (slot + 1) % self._slots
            else:
                starts.append(place.start)
        return starts

    @contextmanager
    def at(self, place: Place) -> Iterator[int]:
        """The row where a bag begins; within, what is queued on the lane may read the bag there."""
        if place.start is not None:
            yield place.start
            return
        assert place.host is not None
        slot, self._slot = self._slot, (self._slot + 1) % self._slots
        start = self._first_row + slot * self.store.slot_rows
        target = self.store.features[start : start + place.n_rows]
        if not self.on_gpu:
            target.copy_(place.host)
            yield start
            return
        with torch.cuda.stream(self._copies):
            if (free := self._free[slot]) is not None:
                self._copies.wait_event(free)
            target.copy_(place.host, non_blocking=True)
        self.stream.wait_stream(self._copies)
        yield start
        self._free[slot] = self.stream.record_event()


def _read(slides: list[BagSource]) -> Iterator[tuple[BagSource, Tensor]]:
    """Slides with their features as stored, read by several threads, a few ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[BagSource, Future[Tensor]]] = deque()
        for slide in slides:
            waiting.append((slide, pool.submit(slide.read)))
            if len(waiting) > 2 * _READERS:
                first, features = waiting.popleft()
                yield first, features.result()
        for slide, features in waiting:
            yield slide, features.result()


def free_bytes(device: torch.device) -> int:
    """What may be allocated, the allocator's own reserve included."""
    if device.type != "cuda":
        return 2**62
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve
