"""JPEG tiles decoded directly: OpenSlide's pixels, OpenSlide's errors, and OpenSlide wherever it is not plain."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from acmil.demo.pyramid import TILE_PX, TiledLevel, write_levels
from acmil.preprocessing.readers import SlideError, open_reader
from acmil.preprocessing.readers import tiff as tiff_module
from acmil.preprocessing.readers.openslide import OpenSlideReader
from acmil.preprocessing.readers.tiff import TiffReader

WIDTH, HEIGHT = 1900, 1300  # 8 x 6 tiles of 256 px, the last ones cut
PHOTOMETRIC = 262


def texture() -> np.ndarray:
    """Smooth colours, as JPEG keeps them."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def jpeg_tiles(image: np.ndarray, *, is_rgb: bool) -> Iterator[bytes]:
    height, width = image.shape[:2]
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            tile = np.full((TILE_PX, TILE_PX, 3), 200, np.uint8)
            part = image[top : top + TILE_PX, left : left + TILE_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            file = io.BytesIO()
            Image.fromarray(tile).save(file, "JPEG", quality=90, keep_rgb=is_rgb, subsampling=0)
            yield file.getvalue()


def write_jpeg_slide(path: Path, *, is_rgb: bool = False, downsamples=(1, 2), missing: int | None = None) -> Path:
    levels = []
    for downsample in downsamples:
        size = WIDTH // downsample, HEIGHT // downsample
        tiles = list(jpeg_tiles(cv2.resize(texture(), size, interpolation=cv2.INTER_AREA), is_rgb=is_rgb))
        if missing is not None:
            tiles[missing] = b""
        levels.append(TiledLevel(*size, downsample, tiles))
    write_levels(path, levels, mpp=0.5, description="synthetic")
    if is_rgb:
        set_tag(path, PHOTOMETRIC, 2)
    return path


def set_tag(path: Path, number: int, value: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        places = [page.tags[number].valueoffset for page in tiff.pages]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


def both(path: Path) -> tuple[TiffReader, OpenSlideReader]:
    reader = open_reader(path, slide_id="a")
    assert isinstance(reader, TiffReader)
    return reader, OpenSlideReader(path, slide_id="a")


def worst_difference(path: Path, *, level: int, n_reads: int = 40) -> int:
    """Largest difference between the two readers over random regions that begin at whole pixels of the level."""
    direct, other = both(path)
    generator = np.random.default_rng(level)
    downsample = int(direct.facts.level_downsamples[level])
    worst = 0
    for _ in range(n_reads):
        x, y = (int(generator.integers(0, side)) for side in direct.facts.level_sizes[level])
        where = level, x * downsample, y * downsample, *generator.integers(1, 200, 2).tolist()
        worst = max(worst, int(np.abs(direct.read(*where).astype(int) - other.read(*where)).max()))
    assert direct._checks == {level: True}  # it was read directly
    direct.close()
    other.close()
    return worst


@pytest.mark.parametrize("is_rgb", [True, False])
@pytest.mark.parametrize("level", [0, 1])
def test_pixels_are_openslides_to_the_bit(tmp_path, is_rgb, level):
    path = write_jpeg_slide(tmp_path / "a.tiff", is_rgb=is_rgb)
    assert worst_difference(path, level=level) == 0


def test_pixels_of_a_real_slide_are_openslides_to_the_bit(shared_data):
    # its tiles are RGB, its tables lie outside of them
    assert worst_difference(shared_data / "slides" / "CMU-1-Small-Region.svs", level=0) == 0


def test_outside_is_white(tmp_path):
    reader, _ = both(write_jpeg_slide(tmp_path / "a.tiff"))
    pixels = reader.read(0, WIDTH - 10, HEIGHT - 20, 30, 40)
    assert (pixels[20:] == 255).all()
    assert (pixels[:, 10:] == 255).all()
    assert pixels[:20, :10].min() < 250
    assert (reader.read(0, -50, 2000, 30, 40) == 255).all()


def test_levels_of_a_broken_downsample_take_the_nearest_pixel(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tiff", downsamples=(1, 3))  # 633 columns of 1900
    direct, _ = both(path)
    downsample = direct.facts.level_downsamples[1]
    assert downsample != round(downsample)
    whole = direct.read(1, 0, 0, 633, 433)
    part = direct.read(1, round(40 * downsample), round(24 * downsample), 50, 30)
    np.testing.assert_array_equal(part, whole[24:54, 40:90])
    assert direct._checks == {1: True}


def test_a_damaged_tile_is_an_error_and_the_others_can_be_read(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tiff")
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[9], tiff.pages[0].databytecounts[9]  # row 1, column 1
    content = bytearray(path.read_bytes())
    content[offset + size // 2 : offset + size] = np.random.default_rng(0).bytes(size - size // 2)
    path.write_bytes(content)
    reader, _ = both(path)
    with pytest.raises(SlideError, match=r"cannot read 20 x 20 px of level 0 at level-0 px \(300, 310\)"):
        reader.read(0, 300, 310, 20, 20)
    intact = open_reader(write_jpeg_slide(tmp_path / "b.tiff"), slide_id="b")
    np.testing.assert_array_equal(reader.read(0, 600, 300, 50, 50), intact.read(0, 600, 300, 50, 50))


def test_a_missing_tile_is_left_to_openslide(tmp_path):
    reader, other = both(write_jpeg_slide(tmp_path / "a.tiff", missing=9))
    for where in [(0, 240, 240, 80, 80), (0, 300, 300, 50, 50), (0, 900, 100, 50, 50)]:
        np.testing.assert_array_equal(reader.read(*where), other.read(*where))


def test_a_level_of_which_openslide_thinks_otherwise_is_left_to_it(tmp_path, monkeypatch):
    path = write_jpeg_slide(tmp_path / "a.tiff", is_rgb=True)
    monkeypatch.setattr(tiff_module, "_COMPONENTS", {2: b"\x01", 6: b"\x01"})
    # Pillow's tiles say by themselves what they are, which would hide the mistake.
    content = path.read_bytes()
    assert content.count(b"Adobe") > 40
    path.write_bytes(content.replace(b"\xff\xee\x00\x0eAdobe", b"\xff\xed\x00\x0eAdobe"))
    reader, other = both(path)
    np.testing.assert_array_equal(reader.read(0, 10, 10, 80, 80), other.read(0, 10, 10, 80, 80))
    assert reader._checks == {0: False}


def test_other_compressions_are_left_to_openslide(tmp_path, write_slide):
    path = write_slide(tmp_path / "a.tiff", texture())
    reader, other = both(path)
    np.testing.assert_array_equal(reader.read(0, 10, 10, 80, 80), other.read(0, 10, 10, 80, 80))
    assert reader._checks == {0: False}


def test_openslide_can_be_asked_for(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tiff")
    assert isinstance(open_reader(path, slide_id="a", reader="openslide"), OpenSlideReader)


@pytest.mark.parametrize("n_kept", [1, 10])
def test_the_cache_is_bounded_and_threads_agree(tmp_path, monkeypatch, n_kept):
    monkeypatch.setattr(tiff_module.MEMORY, "most_bytes", n_kept * TILE_PX * TILE_PX * 3)
    reader, other = both(write_jpeg_slide(tmp_path / "a.tiff"))
    expected = other.read(0, 0, 0, WIDTH, HEIGHT)
    wrong: list[tuple[int, int]] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(60):
            x, y = int(generator.integers(0, WIDTH - 90)), int(generator.integers(0, HEIGHT - 90))
            if not np.array_equal(reader.read(0, x, y, 90, 90), expected[y : y + 90, x : x + 90]):
                wrong.append((x, y))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(reader._cache) == n_kept
    reader.close()
    assert len(reader._cache) == 0
    with pytest.raises(SlideError, match="after it was closed"):
        reader.read(0, 0, 0, 10, 10)
