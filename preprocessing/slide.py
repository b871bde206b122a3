"""A whole-slide image in level-0 pixels and µm; pyramid levels and native handles stay in here."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import cv2
import numpy as np

from acmil.preprocessing.geometry import RESOLUTION_TOLERANCE, check_mpp, select_level, thumbnail_side_px
from acmil.preprocessing.readers import ReaderName, Rectangle, SlideError, SlideReader, open_reader

__all__ = ["Rectangle", "Slide", "SlideAddress", "SlideError", "Thumbnail"]

_BLOCK_PX = 2048  # Side of the largest square read at once: 16 MiB, whatever the size of the slide.


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of the whole of level 0.

    Attributes:
        image: uint8 RGB (h, w, 3); its pixel (row, column) begins at level-0 (column, row) * `downsample`. The last
            row and column may reach over the slide's edge, where they are white.
        downsample: Level-0 pixels per pixel, the same in x and y.
    """

    image: np.ndarray
    downsample: float


_MOST_UM = 18.0  # objective times µm/px, some 10 for what scanners make


class SlideAddress(NamedTuple):
    """What another process opens a slide by; see `Slide.open`."""

    path: Path
    slide_id: str
    mpp: float | None
    reader: ReaderName


class Slide:
    """One slide: its size, its resolution and its pixels. Reading is safe from several threads.

    Coordinates are level-0 pixels (x, y), origin at the top-left corner of level 0.

    Args:
        reader: The library that reads the file.
        path: The file.
        slide_id: Name of the slide in tables and messages.
        mpp: Pixel pitch of level 0 in µm/px, in place of the file's.
        reader_name: The name that the library was asked for by.
    """

    def __init__(
        self,
        reader: SlideReader,
        *,
        path: Path,
        slide_id: str,
        mpp: float | None = None,
        reader_name: ReaderName = "auto",
    ) -> None:
        self._reader = reader
        self._reader_name: ReaderName = reader_name
        self.path = path
        self.slide_id = slide_id
        self._stated_mpp = None if mpp is None else check_mpp(mpp, source="given by the user", slide_id=slide_id)

    @classmethod
    def open(
        cls, path: str | Path, *, slide_id: str | None = None, mpp: float | None = None, reader: ReaderName = "auto"
    ) -> Self:
        """Open a slide file.

        Args:
            path: The file.
            slide_id: Name of the slide; the file's name without its ending by default.
            mpp: Pixel pitch of level 0 in µm/px, in place of the file's.
            reader: The library to read with; "auto" takes OpenSlide, and Pillow for plain images.

        Returns:
            The slide, open; close it, or use it in a `with` statement.

        Raises:
            SlideError: If the file is missing or no readable slide, or `mpp` is absurd.
        """
        path = Path(path)
        slide_id = slide_id or path.stem
        opened = open_reader(path, slide_id=slide_id, reader=reader)
        return cls(opened, path=path, slide_id=slide_id, mpp=mpp, reader_name=reader)

    @classmethod
    def at(cls, address: SlideAddress) -> Self:
        """Open the slide that has an address; see `open`."""
        return cls.open(address.path, slide_id=address.slide_id, mpp=address.mpp, reader=address.reader)

    @property
    def address(self) -> SlideAddress:
        """What this slide can be opened by again, in another process too."""
        return SlideAddress(self.path.absolute(), self.slide_id, self._stated_mpp, self._reader_name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({self.slide_id!r}, {self.width} x {self.height} px, {self.vendor})"

    def close(self) -> None:
        """Let the file go; reading afterwards is a SlideError."""
        self._reader.close()

    @property
    def width(self) -> int:
        """Width of level 0 in pixels."""
        return self._reader.facts.level_sizes[0][0]

    @property
    def height(self) -> int:
        """Height of level 0 in pixels."""
        return self._reader.facts.level_sizes[0][1]

    @property
    def bounds(self) -> Rectangle:
        """The scanned part of level 0 in level-0 pixels; all of it in most formats."""
        return self._reader.facts.bounds

    @property
    def vendor(self) -> str:
        """The file format's name, as the reading library gives it."""
        return self._reader.facts.vendor

    @property
    def magnification(self) -> float | None:
        """Nominal magnification of the objective, for information only; None where the file does not say."""
        return self._reader.facts.magnification

    @property
    def mpp(self) -> float:
        """Pixel pitch of level 0 in µm/px.

        Raises:
            SlideError: If the file states none, an absurd one, or pixels that are not square.
        """
        if self._stated_mpp is not None:
            return self._stated_mpp
        stated = [value for value in (self._reader.facts.mpp_x, self._reader.facts.mpp_y) if value is not None]
        if not stated:
            raise SlideError(
                f"slide '{self.slide_id}': the file states no resolution of a microscope, need µm/px ({self.path}). "
                "State it with --mpp-override or in the mpp column of the slide list."
            )
        for value in stated:
            check_mpp(value, source=str(self.path), slide_id=self.slide_id)
        if max(stated) > min(stated) * (1 + RESOLUTION_TOLERANCE):
            raise SlideError(
                f"slide '{self.slide_id}': pixels must be square within {RESOLUTION_TOLERANCE:.0%}, got "
                f"{stated[0]:.6g} x {stated[1]:.6g} µm/px ({self.path}). "
                "Resample the slide, or state one pitch with --mpp-override."
            )
        return sum(stated) / len(stated)

    @property
    def resolution_alarms(self) -> tuple[str, ...]:
        """What someone should look at before trusting the pixel pitch, one sentence each."""
        alarms = []
        if self.is_restated:
            alarms.append(f"level 0 is stated to have {self.mpp:.4g} µm/px, the slide says {self.file_mpp:.4g}")
        elif self.magnification is not None and self.magnification * self.mpp > _MOST_UM:
            alarms.append(
                f"an objective of {self.magnification:g}x and {self.mpp:.4g} µm/px do not go together: one of them is "
                "wrong, or the slide was made smaller"
            )
        return tuple(alarms)

    @property
    def is_restated(self) -> bool:
        """Whether the user stated a pixel pitch that is not what the file says."""
        return self.file_mpp is not None and abs(self.mpp / self.file_mpp - 1) > RESOLUTION_TOLERANCE

    @property
    def file_mpp(self) -> float | None:
        """What the file itself states of level 0 in µm/px, along x; None where it states nothing."""
        return self._reader.facts.mpp_x

    def thumbnail(self, mpp: float) -> Thumbnail:
        """A picture of the whole slide at `mpp` µm/px, or at level 0's own pitch where that is coarser."""
        return self._thumbnail(max(1.0, mpp / self.mpp))

    def thumbnail_within(self, max_px: int) -> Thumbnail:
        """A picture of the whole slide whose longer side has at most `max_px` pixels; needs no resolution."""
        return self._thumbnail(max(1.0, max(self.width, self.height) / max_px))

    def read_tile(self, x: int, y: int, *, size_level0_px: int, out_px: int) -> np.ndarray:
        """Read a square of level 0, resampled once, with antialiasing, from the coarsest level that is fine enough.

        Args:
            x: Left edge in level-0 pixels.
            y: Top edge in level-0 pixels.
            size_level0_px: Side in level-0 pixels.
            out_px: Side of the result in pixels.

        Returns:
            uint8 RGB (out_px, out_px, 3); white where the slide is transparent or has ended.

        Raises:
            SlideError: If the file is broken there, or `out_px` is more than 5 % above `size_level0_px`.
        """
        return self._read_area(int(x), int(y), downsample=size_level0_px / out_px, out_width=out_px, out_height=out_px)

    def _thumbnail(self, downsample: float) -> Thumbnail:
        """A picture of the whole slide at `downsample` level-0 pixels per pixel."""
        out_width = thumbnail_side_px(self.width, downsample)
        out_height = thumbnail_side_px(self.height, downsample)
        image = self._read_area(0, 0, downsample=downsample, out_width=out_width, out_height=out_height)
        return Thumbnail(image, downsample)

    def _read_area(self, x: int, y: int, *, downsample: float, out_width: int, out_height: int) -> np.ndarray:
        """Read an area in blocks of bounded size; uint8 RGB (out_height, out_width, 3)."""
        try:
            choice = select_level(self._reader.facts.level_downsamples, downsample=downsample)
        except SlideError as error:
            raise SlideError(f"slide '{self.slide_id}': {error}") from error
        block = max(1, int(_BLOCK_PX / choice.shrink))
        if out_width <= block and out_height <= block:
            return self._read_block(choice.index, x, y, downsample, out_width, out_height)
        area = np.empty((out_height, out_width, 3), np.uint8)
        for top in range(0, out_height, block):
            for left in range(0, out_width, block):
                part = area[top : top + block, left : left + block]
                origin = x + round(left * downsample), y + round(top * downsample)
                part[:] = self._read_block(choice.index, *origin, downsample, part.shape[1], part.shape[0])
        return area

    def _read_block(self, level: int, x: int, y: int, downsample: float, out_width: int, out_height: int) -> np.ndarray:
        """Read one block of one level and resample it; uint8 RGB (out_height, out_width, 3)."""
        shrink = downsample / self._reader.facts.level_downsamples[level]
        width, height = max(1, round(out_width * shrink)), max(1, round(out_height * shrink))
        pixels = self._reader.read(level, x, y, width, height)  # (height, width, 3)
        if (width, height) == (out_width, out_height):
            return pixels
        # INTER_AREA averages over the source pixels that an output pixel covers: the antialiasing filter of shrinking.
        # A level that is coarser within the tolerance is grown a little, where linear interpolation is the smooth one.
        method = cv2.INTER_AREA if width >= out_width and height >= out_height else cv2.INTER_LINEAR
        return cv2.resize(pixels, (out_width, out_height), interpolation=method)
