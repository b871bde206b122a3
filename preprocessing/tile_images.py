"""Tiles as pictures: the pixels that the encoder gets, in a folder or a tar for each slide.

    JOB/tiles/<slide_id>/<x>_<y>.jpg         x, y: the tile's top-left corner in level-0 pixels
    JOB/tiles/<slide_id>.tar                 the same, as <slide_id>/<x>_<y>.jpg, sorted by y, then x

A slide's pictures are written under a temporary name and put into place whole, before its feature file; a slide that
fails leaves none. The bytes depend on the slide and the options alone: a tar holds no time, no user and no group. It is
flushed to the disk before it is put into place, as feature files are. The many files of a folder are left to the
system for that, so that a power cut, unlike a killed process, may harm them. Only tiles are written, never the label or
the overview picture that a slide file may hold, and none that is dropped for its quality: a slide has as many pictures
as features.
"""

import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import cv2
import numpy as np

from acmil.preprocessing.atomic import remove, replacing
from acmil.preprocessing.stream import SlideFailure, StreamEvent, TileBatch

TileContainer = Literal["folder", "tar"]
TileFormat = Literal["jpeg", "png"]

JPEG_QUALITY = 90

_ENDINGS: dict[TileFormat, str] = {"jpeg": ".jpg", "png": ".png"}
_OPTIONS: dict[TileFormat, list[int]] = {"jpeg": [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY], "png": []}
_RUN_TILES = 8  # tiles that a thread encodes in one go
_MOST_BYTES_WAITING = 1 << 28  # pixels that wait to be encoded

_Add: TypeAlias = Callable[[str, bytes], object]  # takes a picture's name and bytes


@dataclass(frozen=True)
class TileStore:
    """Where a job's tile pictures are, and in what form.

    Attributes:
        folder: It holds the slides' folders or tars.
        container: "folder" or "tar".
        image_format: "jpeg" or "png".
    """

    folder: Path
    container: TileContainer
    image_format: TileFormat

    def path(self, slide_id: str) -> Path:
        """A slide's folder or tar."""
        return self.folder / (f"{slide_id}.tar" if self.container == "tar" else slide_id)

    def has(self, slide_id: str, n_tiles: int) -> bool:
        """Whether a slide's pictures are there in this form; a folder must hold all, a tar is whole if it is there."""
        path, ending = self.path(slide_id), _ENDINGS[self.image_format]
        if self.container == "folder":
            return path.is_dir() and sum(image.suffix == ending for image in path.iterdir()) == n_tiles
        if not path.is_file():
            return False
        try:
            with tarfile.open(path, "r:") as archive:
                first = archive.next()
        except tarfile.TarError:
            return False
        return first is not None and first.name.endswith(ending)


def tile_image_paths(folder: Path, slide_id: str) -> tuple[Path, Path]:
    """Where a slide's pictures may be: its folder, its tar."""
    return folder / slide_id, folder / f"{slide_id}.tar"


@dataclass
class _SlideImages:
    """One slide's pictures on their way to the disk."""

    written: list[Future[None]] = field(default_factory=list)  # one a run of tiles, in order
    opened: ExitStack = field(default_factory=ExitStack)  # this and the next: for the writing thread alone
    add: _Add | None = None


class TileWriter:
    """Writes tiles as pictures beside the encoder's work; a context.

    Threads encode, one thread writes, in the order of the stream. Where they cannot keep up, the stream is held back:
    a bounded number of pixels waits, never a whole slide.

    Args:
        store: Where to, in what form. The folder must exist.
        threads: Threads that encode.
    """

    def __init__(self, store: TileStore, *, threads: int) -> None:
        self._store = store
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="tile-encoder")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="tile-writer")
        self._waiting: deque[Future[None]] = deque()
        self._slides: dict[str, _SlideImages] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.shutdown(cancel_futures=True)  # before the encoders, which the last write may be waiting for
        self._encoders.shutdown(cancel_futures=True)
        for slide_id in list(self._slides):
            self._abandon(self._slides.pop(slide_id))

    def watch(self, events: Iterable[StreamEvent]) -> Iterator[StreamEvent]:
        """Pass a stream on, and write the tiles of its batches; what was written of a slide that fails is removed."""
        for event in events:
            if isinstance(event, TileBatch) and len(event.tiles):
                self._take(event)
            elif isinstance(event, SlideFailure):
                self.drop(event.source.slide_id)
            yield event

    def finish(self, slide_id: str) -> None:
        """Wait for a slide's last tile and put its pictures into place.

        Raises:
            OSError: If they could not be written.
        """
        slide = self._slides[slide_id]
        try:
            for written in slide.written:
                written.result()
        except BaseException:
            self.drop(slide_id)
            raise
        self._disk.submit(slide.opened.close).result()
        del self._slides[slide_id]

    def drop(self, slide_id: str) -> None:
        """Remove what was written of a slide that is not in place yet."""
        if (slide := self._slides.pop(slide_id, None)) is not None:
            self._disk.submit(self._abandon, slide).result()

    def _take(self, batch: TileBatch) -> None:
        """Hand a batch to the threads; wait if too much is with them."""
        slide_id, coords = batch.prepared.source.slide_id, batch.prepared.grid.coords[batch.numbers]
        slide = self._slides.setdefault(slide_id, _SlideImages())
        for start in range(0, len(coords), _RUN_TILES):
            run = slice(start, start + _RUN_TILES)
            pictures = self._encoders.submit(_encoded, batch.tiles[run], coords[run], self._store.image_format)
            slide.written.append(self._disk.submit(self._write, slide_id, slide, pictures))
            self._waiting.append(slide.written[-1])
        most_runs = max(1, _MOST_BYTES_WAITING // (_RUN_TILES * batch.tiles[0].nbytes))
        while len(self._waiting) > most_runs:
            self._waiting.popleft().exception()  # told at `finish`: the slide may be another process's by now

    def _write(self, slide_id: str, slide: _SlideImages, pictures: Future[list[tuple[str, bytes]]]) -> None:
        if slide.add is None:
            path = self._store.path(slide_id)
            slide.add = slide.opened.enter_context(
                _tar(path, slide_id) if self._store.container == "tar" else _folder(path)
            )
        for name, content in pictures.result():
            slide.add(name, content)

    def _abandon(self, slide: _SlideImages) -> None:
        error = _AbandonedError()
        slide.opened.__exit__(_AbandonedError, error, None)  # as if the writing had failed: nothing stays


class _AbandonedError(Exception):
    """Ends the writing of a slide whose pictures are not wanted."""


@contextmanager
def _tar(path: Path, slide_id: str) -> Iterator[_Add]:
    """Write a tar; `TarInfo` leaves time, user and group at 0 and the mode at 0644."""
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"{slide_id}/{name}")
            info.size = len(content)
            archive.addfile(info, BytesIO(content))

        yield add


@contextmanager
def _folder(path: Path) -> Iterator[_Add]:
    """Write a folder of files."""
    with replacing(path) as temporary:
        temporary.mkdir()
        yield lambda name, content: (temporary / name).write_bytes(content)
        remove(path)  # a folder is not replaced by another; there is one only if a slide was taken over meanwhile


def _encoded(tiles: np.ndarray, coords: np.ndarray, image_format: TileFormat) -> list[tuple[str, bytes]]:
    """Encode tiles (n, h, w, 3) uint8 RGB at coords (n, 2): their names and bytes."""
    ending, options = _ENDINGS[image_format], _OPTIONS[image_format]
    pictures = []
    for tile, (x, y) in zip(tiles, coords.tolist(), strict=True):
        _, content = cv2.imencode(ending, cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), options)
        pictures.append((f"{x}_{y}{ending}", content.tobytes()))
    return pictures
