"""What a reader process runs; see `reader_processes`, which starts it."""

import mmap
import os
import pickle
import signal
import sys
from collections import OrderedDict

import cv2
import numpy as np

from acmil.preprocessing.reader_processes import READY, ReadRequest, receive, send
from acmil.preprocessing.readers import tiff
from acmil.preprocessing.slide import Slide, SlideAddress, SlideError
from acmil.preprocessing.tile_readers import Examine, read_tiles

_MOST_OPEN = 2  # slides: the stream reads one to its end and begins the next
_TILE_BYTES = 32 << 20  # decoded tiles of a slide: neighbouring rows of its grid are mostly other processes' to read


def main(memory: int, block_bytes: int) -> None:
    """Read what is asked for on standard input until that ends.

    Args:
        memory: Descriptor of the shared memory.
        block_bytes: Size of its blocks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to take
    cv2.setNumThreads(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    examine: Examine | None = receive(sys.stdin.buffer)
    send(answers, READY)
    tiff.MEMORY.most_bytes = _TILE_BYTES
    slides: OrderedDict[SlideAddress, Slide] = OrderedDict()
    blocks: dict[int, mmap.mmap] = {}
    while True:
        try:
            request: ReadRequest = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if request.block not in blocks:
                blocks[request.block] = mmap.mmap(memory, block_bytes, offset=request.block * block_bytes)
            answer: object = _read(request, _opened(request.address, slides), blocks[request.block], examine)
        except Exception as error:  # noqa: BLE001  whatever a broken slide raises is that slide's result
            answer = _portable(error)
        send(answers, answer)


def _opened(address: SlideAddress, slides: OrderedDict[SlideAddress, Slide]) -> Slide:
    """The slide, opened if it is not; the ones used last stay open."""
    if address not in slides:
        while len(slides) >= _MOST_OPEN:
            slides.popitem(last=False)[1].close()
        slides[address] = Slide.at(address)
    slides.move_to_end(address)
    return slides[address]


def _read(request: ReadRequest, slide: Slide, block: mmap.mmap, examine: Examine | None) -> np.ndarray | None:
    """Read tiles into the shared memory; what they measure."""
    n_bytes = int(np.prod(request.shape))
    tiles = np.frombuffer(block, np.uint8, n_bytes, request.offset).reshape(request.shape)
    side = request.size_level0_px
    return read_tiles(slide, request.coords, tiles, side, examine=examine, stain_map=request.stain_map)


def _portable(error: Exception) -> Exception:
    """An error that survives the way through the pipe."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  there are many ways in which an error cannot be pickled
        return SlideError(f"{type(error).__name__}: {error}")
    return error
