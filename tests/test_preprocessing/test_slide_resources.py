"""Over many slides: memory and file descriptors stay, native handles are few, label and macro are left alone."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from acmil.preprocessing.job_folder import JobFolder
from acmil.preprocessing.prepare import prepare_slide
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.slide_list import SlideSource

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: reads /proc")
LABEL_RGB = (255, 0, 255)


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def n_descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  pathlib would list the folder no better


@needs_proc
@pytest.mark.parametrize("name", ["a.tiff", "a.png"])
def test_opening_and_reading_many_slides_leaves_nothing_behind(tmp_path, write_slide, name):
    image = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    if name == "a.png":
        Image.fromarray(image).save(tmp_path / name, compress_level=1)
    else:
        write_slide(tmp_path / name, image)

    def read_slides(n_slides):
        for _ in range(n_slides):
            with Slide.open(tmp_path / name, mpp=0.5) as slide:
                slide.thumbnail(4.0)
                slide.read_tile(100, 100, size_level0_px=300, out_px=256)

    read_slides(40)
    memory, descriptors = resident_bytes(), n_descriptors()
    read_slides(300)
    assert n_descriptors() == descriptors
    assert resident_bytes() - memory < 16 * 2**20  # Kept, the decoded slides would be 300 MiB.


def test_threads_share_one_native_handle(tmp_path, write_slide, monkeypatch):
    opened = []
    native = openslide.OpenSlide
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: opened.append(path) or native(path))
    monkeypatch.setattr(openslide.OpenSlide, "detect_format", native.detect_format, raising=False)
    path = write_slide(tmp_path / "a.tiff", np.zeros((600, 600, 3), np.uint8))
    with Slide.open(path) as slide, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda x: slide.read_tile(x, x, size_level0_px=64, out_px=64), range(200)))
    assert len(opened) == 1


def write_aperio(path, image):
    """A slide in Aperio's layout with a thumbnail, a label and a macro, the last two in one loud colour."""
    loud = np.full((90, 120, 3), LABEL_RGB, np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        text = "Aperio Image Library v1\n{}|AppMag = 20|MPP = 0.5"
        options = {"photometric": "rgb", "compression": "zlib", "metadata": None}
        tiff.write(image, tile=(256, 256), description=text.format("scan"), **options)
        tiff.write(image[::8, ::8], description=text.format("scan"), **options)
        tiff.write(loud, subfiletype=1, description="Aperio Image Library v1\nlabel 120x90", **options)
        tiff.write(loud, subfiletype=9, description="Aperio Image Library v1\nmacro 120x90", **options)


def test_label_and_macro_are_neither_read_nor_written(tmp_path, make_tissue_picture, monkeypatch):
    path = tmp_path / "a.svs"
    write_aperio(path, make_tissue_picture(1200, 900, ellipses=[(600, 450, 350, 300)]))
    with openslide.OpenSlide(path) as native:
        assert {"label", "macro"} <= set(native.associated_images)
        assert native.associated_images["label"].getpixel((5, 5))[:3] == LABEL_RGB

    def refuse(*_):
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    folder = JobFolder(tmp_path / "job", numbers={})
    options = {"tile_px": 128, "tile_mpp": 0.5, "overlap_px": 0, "min_tissue": 0.25, "tissue_mpp": 4.0}
    prepared = prepare_slide(SlideSource("a", path), **options, previews=True)
    with prepared.slide:
        assert (prepared.slide.vendor, prepared.slide.width, len(prepared.grid) > 10) == ("aperio", 1200, True)
        folder.write_outlines(prepared)
    written = sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file())
    assert written == ["previews/a.jpg", "tissue/a.geojson"]
    preview = cv2.cvtColor(cv2.imread(str(folder.path / "previews" / "a.jpg")), cv2.COLOR_BGR2RGB)
    assert (np.abs(preview.astype(int) - LABEL_RGB).max(axis=2) < 60).sum() == 0
