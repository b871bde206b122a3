"""The cuCIM reader against a stand-in of cuCIM's documented API; cuCIM itself is not run."""

import sys
from types import ModuleType
from typing import get_args

import cv2
import numpy as np
import pytest

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.readers import ReaderName
from acmil.preprocessing.slide import Slide, SlideError

IMAGE = np.random.default_rng(0).integers(0, 256, (401, 602, 3), dtype=np.uint8)


class CuImage:
    """Two levels of `IMAGE`: places in level-0 pixels, sizes in the level's; refuses what is not inside."""

    def __init__(self, path):
        if "broken" in path:
            raise RuntimeError("Unsupported file format")
        self.levels = [IMAGE, cv2.resize(IMAGE, (301, 200), interpolation=cv2.INTER_AREA)]
        self.shape = [*IMAGE.shape]
        self.resolutions = {
            "level_count": 2,
            "level_dimensions": ((602, 401), (301, 200)),
            "level_downsamples": (1.0, 2.0025),
            "level_tile_sizes": ((256, 256), (256, 256)),
        }
        self.metadata = {"cucim": {}, "aperio": {"AppMag": "20"}}

    def spacing(self, dim_order):
        return [0.499, 0.4991]

    def spacing_units(self, dim_order):
        return ["micrometer", "micrometer"]

    def read_region(self, location, size, level):
        downsample = self.resolutions["level_downsamples"][level]
        x, y = (int(value / downsample) for value in location)
        part = self.levels[level][y : y + size[1], x : x + size[0]]
        if part.shape[:2] != (size[1], size[0]) or min(location) < 0:
            raise RuntimeError("outside")
        return part


@pytest.fixture
def slide_path(tmp_path, monkeypatch):
    module = ModuleType("cucim")
    module.CuImage = CuImage
    monkeypatch.setitem(sys.modules, "cucim", module)
    (tmp_path / "a.svs").touch()
    return tmp_path / "a.svs"


def test_facts_and_pixels(slide_path):
    with Slide.open(slide_path, reader="cucim") as slide:
        assert (slide.width, slide.height, slide.vendor, slide.magnification) == (602, 401, "aperio", 20.0)
        assert slide.mpp == pytest.approx(0.49905)
        tile = slide.read_tile(100, 50, size_level0_px=64, out_px=64)
        coarse = slide.read_tile(100, 50, size_level0_px=128, out_px=64)
        corner = slide.read_tile(-10, 380, size_level0_px=64, out_px=64)
        outside = slide.read_tile(1000, 0, size_level0_px=64, out_px=64)
    assert np.array_equal(tile, IMAGE[50:114, 100:164])
    assert np.array_equal(coarse, cv2.resize(IMAGE, (301, 200), interpolation=cv2.INTER_AREA)[24:88, 49:113])
    assert np.array_equal(corner[:21, 10:], IMAGE[380:, :54])
    assert (corner[21:] == 255).all()
    assert (corner[:, :10] == 255).all()
    assert (outside == 255).all()
    with pytest.raises(SlideError, match="slide 'a': read after it was closed"):
        slide.read_tile(0, 0, size_level0_px=16, out_px=16)


def test_errors_name_the_mend(slide_path, monkeypatch):
    broken = slide_path.with_name("broken.svs")
    with pytest.raises(SlideError, match="slide 'broken': no such file"):
        Slide.open(broken, reader="cucim")
    broken.touch()
    with pytest.raises(SlideError, match=r"slide 'broken': cuCIM cannot open .*Unsupported file format.*openslide"):
        Slide.open(broken, reader="cucim")
    monkeypatch.setitem(sys.modules, "cucim", None)
    with pytest.raises(SlideError, match=r'slide \'a\': the reader \'cucim\' needs .*pip install "acmil\[cucim\]"'):
        Slide.open(slide_path, reader="cucim")


def test_options_and_library_know_the_same_readers():
    assert get_args(PreprocessConfig.model_fields["reader"].annotation) == get_args(ReaderName)
