"""Synthetic slides: pyramidal tiled TIFF files that OpenSlide reads, and a slide held in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from acmil.preprocessing.readers import Rectangle, SlideFacts
from acmil.preprocessing.slide import Slide

GLASS_RGB = (243, 243, 244)
STROMA_RGB = (226, 150, 190)


def write_tiff_slide(
    path: Path, image: np.ndarray, *, mpp: float | None = 0.5, downsamples: Sequence[int] = (1, 4), tile_px: int = 256
) -> Path:
    """Write uint8 RGB (h, w, 3) as a lossless pyramid, each level the area average of level 0."""
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for downsample in downsamples:
            size = max(1, image.shape[1] // downsample), max(1, image.shape[0] // downsample)
            level = image if downsample == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            pixels_per_cm = None if mpp is None else (1e4 / (mpp * downsample),) * 2
            tiff.write(
                level,
                tile=(tile_px, tile_px),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(downsample > 1),
                resolution=pixels_per_cm,
                resolutionunit=None if mpp is None else "CENTIMETER",
                metadata=None,
            )
    return path


def tissue_picture(
    width: int, height: int, *, ellipses: Sequence[tuple[int, int, int, int]], seed: int = 0
) -> np.ndarray:
    """Paint stroma-coloured ellipses (centre x, centre y, radius x, radius y) with a grain on noisy glass."""
    generator = np.random.default_rng(seed)
    image = np.full((height, width, 3), GLASS_RGB, np.uint8)
    for x, y, radius_x, radius_y in ellipses:
        cv2.ellipse(image, (x, y), (radius_x, radius_y), 0, 0, 360, STROMA_RGB, -1)
    grain = generator.integers(-3, 4, size=image.shape, dtype=np.int16)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


class MemoryReader:
    """A pyramid in memory, read with the meaning of `SlideReader`: whole-number downsamples, white outside."""

    def __init__(self, image: np.ndarray, *, downsamples: Sequence[int] = (1,), **facts: Any) -> None:
        height, width = image.shape[:2]
        self.levels = [
            cv2.resize(image, (width // d, height // d), interpolation=cv2.INTER_AREA) if d > 1 else image
            for d in downsamples
        ]
        self.facts = SlideFacts(
            **{
                "vendor": "memory",
                "level_sizes": tuple((level.shape[1], level.shape[0]) for level in self.levels),
                "level_downsamples": tuple(float(d) for d in downsamples),
                "mpp_x": 0.5,
                "mpp_y": 0.5,
                "magnification": None,
                "bounds": Rectangle(0, 0, width, height),
                **facts,
            }
        )
        self.reads: list[tuple[int, int, int]] = []  # (level, width_px, height_px) of each read.

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        self.reads.append((level, width_px, height_px))
        downsample = self.facts.level_downsamples[level]
        left, top = round(x_level0_px / downsample), round(y_level0_px / downsample)
        pixels = np.full((height_px, width_px, 3), 255, np.uint8)
        part = self.levels[level][max(0, top) : top + height_px, max(0, left) : left + width_px]
        offset_x, offset_y = max(0, -left), max(0, -top)
        pixels[offset_y : offset_y + part.shape[0], offset_x : offset_x + part.shape[1]] = part
        return pixels

    def close(self) -> None:
        """Nothing to let go."""


def memory_slide(image: np.ndarray, *, slide_id: str = "memory", mpp: float | None = None, **options: Any) -> Slide:
    """A slide over a `MemoryReader`; options are its, such as downsamples, mpp_x, bounds."""
    return Slide(MemoryReader(image, **options), path=Path(f"{slide_id}.tiff"), slide_id=slide_id, mpp=mpp)


@pytest.fixture(scope="session")
def make_memory_slide() -> Callable[..., Slide]:
    return memory_slide


@pytest.fixture(scope="session")
def make_memory_reader() -> Callable[..., MemoryReader]:
    return MemoryReader


@pytest.fixture(scope="session")
def make_tissue_picture() -> Callable[..., np.ndarray]:
    return tissue_picture


@pytest.fixture(scope="session")
def write_slide() -> Callable[..., Path]:
    return write_tiff_slide
