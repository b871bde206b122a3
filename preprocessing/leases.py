"""Who works on which slide, where several processes share one job: files in a folder that all of them see, no server.

A lease is a file `<slide_id>.<generation>.lease`, made with O_EXCL, so that of two takers one gets it. Its holder
writes another number into it with every beat. Who finds it unchanged for several beats, by its own clock alone (clocks
of machines differ), takes the slide over: it makes the file of the next generation, which again only one can, and the
highest generation holds the slide. A holder that was only slow writes into the old file, which no longer counts, and
learns at `holds` that the slide is gone. A lease never says that a slide is done: who gets one looks.

Reference:
    Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency",
    SOSP 1989.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from acmil.preprocessing.process_name import has_ended, process_name

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
_MISSED_BEATS = 6  # a file server that hangs for a minute is seen more often than a machine that dies
_SUFFIX = ".lease"


@dataclass(frozen=True)
class Lease:
    """A slide that is this process's to work on; `generation` above 0: taken over from one that died."""

    slide_id: str
    generation: int


@dataclass
class _Held:
    path: Path
    descriptor: int
    n_beats: int = 0


class Leases:
    """The leases of one job, as one of its processes sees them; a context that beats while it lasts.

    Args:
        folder: Where the files are; it is made.
        beat_seconds: Time between two signs of life. A lease without any for six times as long may be taken over.
    """

    def __init__(self, folder: Path, *, beat_seconds: float = BEAT_SECONDS) -> None:
        self._folder = folder
        self.beat_seconds = beat_seconds
        self._held: dict[str, _Held] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}  # file name: content, when it was first seen so
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_the_end, name="lease-beat", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        for slide_id in list(self._held):
            self.release(slide_id)

    def acquire(self, slide_id: str) -> Lease | None:
        """Take a slide that nobody holds, or whose holder has died; None if another has it."""
        generations = self._generations(slide_id)
        if generations and not self._is_dead(self._path(slide_id, generations[-1])):
            return None
        generation = generations[-1] + 1 if generations else 0
        path = self._path(slide_id, generation)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileExistsError:
            return None
        held = _Held(path, descriptor)
        if self._generations(slide_id)[-1:] != [generation]:  # others were faster by more than one generation
            _remove(held)
            return None
        _beat(held)
        with self._lock:
            self._held[slide_id] = held
        for old in generations:
            self._path(slide_id, old).unlink(missing_ok=True)
        return Lease(slide_id, generation)

    def holds(self, slide_id: str) -> bool:
        """Whether a slide that was acquired still is this process's."""
        with self._lock:
            held = self._held.get(slide_id)
        if held is None:
            return False
        try:
            is_same = os.path.samestat(held.path.stat(), os.fstat(held.descriptor))
        except FileNotFoundError:
            return False
        generations = self._generations(slide_id)
        return is_same and bool(generations) and self._path(slide_id, generations[-1]) == held.path

    def release(self, slide_id: str) -> None:
        """Let a slide go, if it is still held."""
        is_ours = self.holds(slide_id)
        with self._lock:
            held = self._held.pop(slide_id, None)
        if held is not None and is_ours:
            _remove(held)
        elif held is not None:
            os.close(held.descriptor)

    def sweep(self) -> None:
        """Remove the leases that dead processes left on slides which nobody needs any more, as these are done."""
        for slide_id in {path.name.rpartition(".")[0].rpartition(".")[0] for path in self._folder.glob(f"*{_SUFFIX}")}:
            if slide_id not in self._held and self.acquire(slide_id) is not None:
                self.release(slide_id)

    def others(self) -> bool:
        """Whether any process that is not known to have ended, and is not this one, holds a slide."""
        holders = [_holder(content) for path in self._folder.glob(f"*{_SUFFIX}") if (content := _content(path))]
        return any(holder != process_name() and not has_ended(holder) for holder in holders)

    def _is_dead(self, path: Path) -> bool:
        content = _content(path)
        if content is None:
            return False  # let go just now: the next look finds none
        before, since = self._seen.get(path.name, (None, 0.0))
        now = time.monotonic()
        if content != before:
            self._seen[path.name] = (content, now)
            return has_ended(_holder(content))
        return has_ended(_holder(content)) or now - since >= _MISSED_BEATS * self.beat_seconds

    def _generations(self, slide_id: str) -> list[int]:
        start = f"{slide_id}."
        names = (path.name for path in self._folder.iterdir())
        names = (name for name in names if name.startswith(start) and name.endswith(_SUFFIX))
        middles = (name[len(start) : -len(_SUFFIX)] for name in names)
        return sorted(int(middle) for middle in middles if middle.isdigit())

    def _path(self, slide_id: str, generation: int) -> Path:
        return self._folder / f"{slide_id}.{generation}{_SUFFIX}"

    def _beat_until_the_end(self) -> None:
        while not self._ending.wait(self.beat_seconds):
            with self._lock:
                for held in self._held.values():
                    _beat(held)


def _beat(held: _Held) -> None:
    """Write another number, into the file that was made: never into one of the same name that another made since."""
    held.n_beats += 1
    try:
        os.lseek(held.descriptor, 0, os.SEEK_SET)
        os.write(held.descriptor, f"{process_name()} {held.n_beats}\n".encode())
        os.fsync(held.descriptor)  # a file server sees it now
    except OSError as error:  # the slide may be lost by this; that is seen before anything of it is written
        logger.warning("lease %s: no sign of life could be written: %s", held.path, error)


def _remove(held: _Held) -> None:
    os.close(held.descriptor)
    held.path.unlink(missing_ok=True)


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition(" ")[0]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
