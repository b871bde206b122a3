"""Processes that read tiles for the stream, each for one of its threads.

A tile costs many small steps in Python, and threads take these steps one at a time: on a machine of 16 cores they stop
getting faster at about six, and the thread that feeds the GPU waits with them (`docs/experiments.md`). So where many
read, a thread only passes on what to read; its process decodes, straight into memory that both see. A process that
dies, in a damaged file's decoder for instance, costs one slide, and is started again.

The memory has no name and no place in a file system, so that nothing of it stays behind, however the job ends, and the
limit that containers set to /dev/shm does not matter. The processes end when their standard input does.
"""

import ctypes
import json
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import LifoQueue
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np

from acmil.preprocessing.slide import Slide, SlideAddress, SlideError
from acmil.preprocessing.stain import StainMap
from acmil.preprocessing.tile_readers import Examine
from acmil.preprocessing.tiling import TileGrid

_LENGTH = struct.Struct("<Q")
READY = "ready"
# Python looks for packages where this process does, which may have changed since its start, and nowhere else.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from acmil.preprocessing.reader_child import main
main(*map(int, sys.argv[2:]))
"""


class ReaderProcessError(OSError):
    """Processes that read tiles do not start."""


@dataclass(frozen=True)
class ReadRequest:
    """Tiles for a process to read.

    Attributes:
        address: The slide.
        coords: (n, 2) of (x, y) in level-0 pixels.
        size_level0_px: Side of the tiles in level-0 pixels.
        block: Number of the block of shared memory that the tiles go to.
        offset: Where in it, in bytes.
        shape: (n, tile_px, tile_px, 3).
        stain_map: Turns tiles into those that are wanted; None leaves them.
    """

    address: SlideAddress
    coords: np.ndarray
    size_level0_px: int
    block: int
    offset: int
    shape: tuple[int, ...]
    stain_map: StainMap | None


class ProcessReaders:
    """Reads in processes, which start at once and are each one thread's at a time; Linux only.

    Args:
        n_processes: Number of processes, one for each thread that reads.
        block_bytes: Bytes of the largest array that will be asked for.
        examine: Measures tiles, a function of a module; None for no measures.
        pin: Called with each new piece of memory, such as for a GPU to copy from by itself.
        unpin: Called with each of them at the end.
    """

    def __init__(
        self,
        n_processes: int,
        *,
        block_bytes: int,
        examine: Examine | None = None,
        pin: Callable[[np.ndarray], None] = lambda block: None,
        unpin: Callable[[np.ndarray], None] = lambda block: None,
    ) -> None:
        self._block_bytes = -(-block_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._examine = examine
        self._pin, self._unpin = pin, unpin
        self._memory = os.memfd_create("tiles")
        self._blocks: list[mmap.mmap] = []
        self._starts: list[int] = []  # address of each block in this process
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._idle: LifoQueue[_Process] = LifoQueue()
        for _ in range(n_processes):
            self._idle.put(self._new_process())

    @staticmethod
    def is_available() -> bool:
        """Whether this system can share memory in this way."""
        return hasattr(os, "memfd_create")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while not self._idle.empty():
            self._idle.get().close()
        for block in self._blocks:
            self._unpin(np.frombuffer(block, np.uint8))
        os.close(self._memory)

    def wait_ready(self) -> None:
        """Wait until the processes have started.

        Raises:
            ReaderProcessError: If they do not.
        """
        for process in tuple(self._idle.queue):
            process.wait_ready()

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Make an array in the shared memory; the place is used again when nobody holds the array any more."""
        n_bytes = int(np.prod(shape))
        if n_bytes > self._block_bytes:
            raise ValueError(f"an array must have at most {self._block_bytes} bytes, got {n_bytes} ({shape}).")
        with self._lock:
            number = self._free.pop() if self._free else self._new_block()
        owner = (ctypes.c_uint8 * n_bytes).from_buffer(self._blocks[number])
        weakref.finalize(owner, self._free.append, number).atexit = False
        return np.frombuffer(memoryview(owner), np.uint8).reshape(shape)

    def read(
        self, slide: Slide, grid: TileGrid, start: int, tiles: np.ndarray, stain_map: StainMap | None
    ) -> np.ndarray | None:
        """Have tiles read; see `TileReader`."""
        coords = grid.coords[start : start + len(tiles)]
        request = ReadRequest(slide.address, coords, grid.tile_level0_px, *self._place(tiles), tiles.shape, stain_map)
        process = self._idle.get()
        answer = process.ask(request)
        if not process.is_alive:
            process.close()
            process = self._new_process()
        self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _new_process(self) -> "_Process":
        return _Process(self._memory, self._block_bytes, self._examine)

    def _new_block(self) -> int:
        number = len(self._blocks)
        start = number * self._block_bytes
        os.ftruncate(self._memory, start + self._block_bytes)
        block = mmap.mmap(self._memory, self._block_bytes, offset=start)
        pixels = np.frombuffer(block, np.uint8)
        self._pin(pixels)
        self._blocks.append(block)
        self._starts.append(pixels.ctypes.data)
        return number

    def _place(self, tiles: np.ndarray) -> tuple[int, int]:
        """The block that an array lies in, and where in it."""
        address = tiles.ctypes.data
        for number, start in enumerate(self._starts):
            if start <= address < start + self._block_bytes:
                return number, address - start
        raise ValueError("tiles must lie in an array of `allocate`.")


class _Process:
    """One process, and the pipes to it."""

    def __init__(self, memory: int, block_bytes: int, examine: Examine | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(memory), str(block_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[memory],
        )
        self._questions = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._is_ready = False
        with suppress(BrokenPipeError):  # told by `wait_ready`
            send(self._questions, examine)

    def wait_ready(self) -> None:
        """Wait until it has started.

        Raises:
            ReaderProcessError: If it does not.
        """
        try:
            self._is_ready = self._is_ready or receive(self._answers) == READY
        except EOFError:
            raise ReaderProcessError(
                f"processes that read tiles must start, one ended with exit status {self._process.wait()}; what it "
                "says is above. --workers 4 reads without them."
            ) from None

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, request: ReadRequest) -> Any:
        """Have tiles read: their measures, or the error."""
        try:
            self.wait_ready()
            send(self._questions, request)
            return receive(self._answers)
        except (EOFError, OSError):
            status = self._process.wait()
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            slide_id, path = request.address.slide_id, request.address.path
            return SlideError(
                f"slide '{slide_id}': the process that read it died ({how}): {path}. Is the file damaged?"
            )

    def close(self) -> None:
        """Let it end."""
        with suppress(BrokenPipeError):
            self._questions.close()
        self._process.wait()
        self._answers.close()


def send(pipe: IO[bytes], message: Any) -> None:
    """Write a message to a pipe."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Read a message from a pipe of one's own other half.

    Raises:
        EOFError: If the pipe has ended.
    """
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(header)
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)
