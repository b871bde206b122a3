import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import openslide
import pytest
import tifffile

import acmil.preprocessing
from acmil.preprocessing.readers import Rectangle, whiten
from acmil.preprocessing.readers import openslide as openslide_reader
from acmil.preprocessing.slide import Slide, SlideError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ruler(side_px, period_px):
    """Vertical sine lines of a known period in pixels, grey."""
    wave = 127.5 + 100 * np.sin(2 * np.pi * np.arange(side_px) / period_px)
    return np.repeat(np.tile(np.rint(wave).astype(np.uint8), (side_px, 1))[..., None], 3, axis=2)


def measured_period_px(tile):
    """Period of the strongest wave along x: the peak of a zero-padded, windowed spectrum."""
    row = tile[..., 0].astype(float).mean(0)
    spectrum = np.abs(np.fft.rfft((row - row.mean()) * np.hanning(len(row)), 1 << 16))
    return (1 << 16) / np.argmax(spectrum)


def test_size_and_resolution_of_a_written_slide(tmp_path, write_slide):
    path = write_slide(tmp_path / "a.b.tiff", noise(600, 900), mpp=0.25, downsamples=(1, 2, 4))
    with Slide.open(path) as slide:
        assert (slide.slide_id, slide.width, slide.height, slide.vendor) == ("a.b", 900, 600, "generic-tiff")
        assert slide.mpp == pytest.approx(0.25, rel=1e-6)
        assert slide.magnification is None
        assert slide.bounds == Rectangle(0, 0, 900, 600)
        assert repr(slide) == "Slide('a.b', 900 x 600 px, generic-tiff)"
    with Slide.open(str(path), slide_id="other", mpp=0.5) as slide:
        assert (slide.slide_id, slide.mpp, slide.path) == ("other", 0.5, path)


OME_PIXELS = 'SizeX="600" SizeY="400" PhysicalSizeX="0.25" PhysicalSizeY="0.26"'


@pytest.mark.parametrize(
    ("description", "density", "mpp"),
    [
        (f'<?xml version="1.0"?><OME xmlns="urn:x"><Image><Pixels {OME_PIXELS}/></Image></OME>', None, 0.255),
        ("ImageJ=1.54f\nunit=micron\n", (4.0, 4.0), 0.25),
        ("ImageJ=1.54f\nunit=inch\n", (4.0, 4.0), None),
    ],
)
def test_a_pyramid_of_ome_or_imagej_has_the_resolution_of_its_description(tmp_path, description, density, mpp):
    path, image = tmp_path / "a.tiff", np.full((400, 600, 3), 200, np.uint8)
    common = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, description=description, resolution=density, resolutionunit="NONE", **common)
        tiff.write(image[::4, ::4], subfiletype=1, **common)
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.width) == ("generic-tiff", 600)
        if mpp is None:
            with pytest.raises(SlideError, match="mpp-override"):
                _ = slide.mpp
        else:
            assert slide.mpp == pytest.approx(mpp, rel=1e-6)


def test_the_tags_of_a_pyramid_win_over_its_description(tmp_path):
    description = f"<OME><Image><Pixels {OME_PIXELS}/></Image></OME>"
    options = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "metadata": None, "tile": (128, 128)}
    image = np.zeros((400, 600, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tiff", image, description=description, photometric="rgb", **options)
    with Slide.open(tmp_path / "a.tiff") as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-6)


def test_a_tile_of_level_0_is_its_pixels(tmp_path, write_slide):
    image = noise(600, 900)
    with Slide.open(write_slide(tmp_path / "a.tiff", image)) as slide:
        tile = slide.read_tile(np.int64(130), np.int64(201), size_level0_px=256, out_px=256)
    assert tile.dtype == np.uint8
    assert np.array_equal(tile, image[201:457, 130:386])


def test_a_tile_is_the_area_average_of_the_level_above(make_memory_reader):
    image = noise(1024, 1024)
    reader = make_memory_reader(image, downsamples=(1, 4))
    slide = Slide(reader, path="a", slide_id="a")
    tile = slide.read_tile(256, 128, size_level0_px=512, out_px=256)  # 2 level-0 px per px: level 4 is too coarse.
    exact = image[128:640, 256:768].reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(tile - exact).max() <= 0.5
    slide.read_tile(0, 0, size_level0_px=1024, out_px=256)  # 4: level 1 as it is.
    slide.read_tile(0, 0, size_level0_px=1024, out_px=128)  # 8: level 1, halved.
    assert reader.reads == [(0, 512, 512), (1, 256, 256), (1, 256, 256)]


def test_a_level_of_non_integer_downsample_is_used(shared_data):
    path = shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with Slide.open(path, mpp=1.0) as slide:
        tile = slide.read_tile(1600, 1200, size_level0_px=512, out_px=256)
        fine = slide.read_tile(1600, 1200, size_level0_px=512, out_px=512)
    with openslide.OpenSlide(path) as native:
        assert native.level_downsamples[1] == pytest.approx(2.0005, abs=1e-4)
        level = np.asarray(native.read_region((1600, 1200), 1, (256, 256)).convert("RGB"))
    assert np.array_equal(tile, level)
    halved = cv2.resize(fine, (256, 256), interpolation=cv2.INTER_AREA)
    # The scanner made the level with a filter of its own and compressed it anew: alike and in place, not equal.
    assert np.corrcoef(tile.ravel(), halved.ravel())[0, 1] > 0.98
    greens = tile[..., 1].astype(np.float32), halved[..., 1].astype(np.float32)
    shift, _ = cv2.phaseCorrelate(*greens, cv2.createHanningWindow((256, 256), cv2.CV_32F))
    assert np.abs(shift).max() < 0.5


def test_upsampling_is_refused(make_memory_slide):
    slide = make_memory_slide(noise(300, 300))
    assert slide.read_tile(0, 0, size_level0_px=250, out_px=256).shape == (256, 256, 3)  # 2.4 %, within tolerance.
    with pytest.raises(SlideError, match=r"slide 'memory': asked for 0\.5 level-0 px per px, finer than"):
        slide.read_tile(0, 0, size_level0_px=128, out_px=256)


def test_outside_is_white(tmp_path, write_slide):
    image = np.zeros((300, 300, 3), np.uint8)
    with Slide.open(write_slide(tmp_path / "a.tiff", image, downsamples=(1,))) as slide:
        tile = slide.read_tile(-28, 200, size_level0_px=128, out_px=128)
    assert (tile[:100, 28:] == 0).all()
    assert (tile[:, :28] == 255).all()
    assert (tile[100:] == 255).all()


def test_transparent_pixels_become_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = 100
    rgba[0, :, 3] = 0, 51, 255
    assert whiten(rgba)[0, :, 0].tolist() == [255, 224, 100]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ([10, 20, 300, 200], Rectangle(10, 20, 300, 200)),
        ([900.0, 20, 300, 200], Rectangle(900, 20, 100, 200)),  # Cut to the level.
        ([None, 20, 300, 200], Rectangle(0, 0, 1000, 500)),
        ([5000, 20, 300, 200], Rectangle(0, 0, 1000, 500)),  # Outside the level: not to be believed.
    ],
)
def test_scanned_bounds(stated, expected):
    assert openslide_reader.scanned_bounds(stated, width=1000, height=500) == expected


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.2275])
def test_ruler(tmp_path, write_slide, mpp):
    """A tile at 0.5 µm/px shows lines 20 µm apart 40 px apart, whatever the slide's own pitch."""
    period_um = 20.0
    path = write_slide(tmp_path / "ruler.tiff", ruler(1200, period_um / mpp), mpp=mpp, downsamples=(1, 2))
    with Slide.open(path) as slide:
        side = round(256 * 0.5 / slide.mpp)
        tile = slide.read_tile(37, 11, size_level0_px=side, out_px=256)
        thumbnail = slide.thumbnail(2.0)
    assert measured_period_px(tile) * side * slide.mpp / 256 == pytest.approx(period_um, rel=0.01)
    assert measured_period_px(tile) == pytest.approx(40, rel=0.01)
    assert measured_period_px(thumbnail.image) * thumbnail.downsample * slide.mpp == pytest.approx(period_um, rel=0.01)


def test_thumbnail_covers_level_0_and_its_blocks_fit(tmp_path, write_slide, monkeypatch):
    image = noise(701, 1003)
    with Slide.open(write_slide(tmp_path / "a.tiff", image, mpp=0.5, downsamples=(1,))) as slide:
        whole = slide.thumbnail(4.0)
        monkeypatch.setattr("acmil.preprocessing.slide._BLOCK_PX", 160)
        blocks = slide.thumbnail(4.0)
        within = slide.thumbnail_within(100)
        level_0 = slide.thumbnail(0.1)
    assert (whole.downsample, whole.image.shape) == (pytest.approx(8.0), (88, 126, 3))  # ceil(701 / 8), ceil(1003 / 8)
    assert np.array_equal(whole.image, blocks.image)
    assert np.abs(whole.image[3, 5] - image[24:32, 40:48].mean((0, 1))).max() <= 0.51
    assert (within.downsample, within.image.shape) == (10.03, (70, 100, 3))
    assert (level_0.downsample, level_0.image.shape) == (1.0, image.shape)


def test_blocks_of_a_fractional_thumbnail_agree(make_memory_reader, make_tissue_picture, monkeypatch):
    picture = cv2.GaussianBlur(make_tissue_picture(900, 700, ellipses=[(400, 300, 200, 150)]), (0, 0), 5)
    reader = make_memory_reader(picture)
    slide = Slide(reader, path="a", slide_id="a")
    whole = slide.thumbnail(0.5 * 3.7).image
    monkeypatch.setattr("acmil.preprocessing.slide._BLOCK_PX", 100)
    reader.reads.clear()
    blocks = slide.thumbnail(0.5 * 3.7).image
    assert max(max(width, height) for _, width, height in reader.reads) <= 100
    # Both edges of a block are rounded to a level-0 pixel, and the blurred ellipse changes by at most 8 a pixel.
    difference = np.abs(whole.astype(int) - blocks)
    assert difference.max() <= 8
    assert difference.mean() < 0.3


def test_missing_resolution_names_slide_and_mend(make_memory_slide, shared_data):
    with pytest.raises(SlideError, match=r"slide 'memory': the file states no resolution.*--mpp-override"):
        _ = make_memory_slide(noise(20, 20), mpp_x=None, mpp_y=None).mpp
    with Slide.open(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs") as slide:
        assert slide.thumbnail_within(100).image.shape == (81, 100, 3)  # Needs no resolution.
        with pytest.raises(SlideError, match=r"slide 'tcga-cr-7395-01a-01-ts1': the file states no resolution"):
            slide.thumbnail(8.0)


def test_absurd_resolution(shared_data):
    path = shared_data / "slides" / "edge_cases" / "boxes.tiff"
    with Slide.open(path) as slide, pytest.raises(SlideError, match=r"'boxes': .* 0\.05 to 20 µm/px, got 352\.778"):
        _ = slide.mpp
    with Slide.open(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5
    with pytest.raises(SlideError, match=r"'boxes': .* got 100 \(given by the user\)"):
        Slide.open(path, mpp=100.0)


def test_anisotropic_pixels(make_memory_slide):
    image = noise(20, 20)
    assert make_memory_slide(image, mpp_x=0.5, mpp_y=0.51).mpp == pytest.approx(0.505)
    assert make_memory_slide(image, mpp_x=0.5, mpp_y=None).mpp == 0.5
    slide = make_memory_slide(image, mpp_x=0.25, mpp_y=0.5)
    with pytest.raises(SlideError, match=r"square within 5%, got 0\.25 x 0\.5 µm/px"):
        _ = slide.mpp
    assert make_memory_slide(image, mpp_x=0.25, mpp_y=0.5, mpp=0.3).mpp == 0.3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edge_cases/broken.svs", r"slide 'broken': not a slide format that OpenSlide reads: .*broken\.svs"),
        ("edge_cases/unopenable.tiff", r"slide 'unopenable': cannot open .*Unsupported TIFF compression"),
        ("edge_cases/absent.svs", r"slide 'absent': no such file: .*absent\.svs"),
    ],
)
def test_files_that_do_not_open(shared_data, name, message):
    with pytest.raises(SlideError, match=message):
        Slide.open(shared_data / "slides" / name)


def test_damaged_pixels(shared_data):
    with Slide.open(shared_data / "slides" / "edge_cases" / "unreadable.svs") as slide:
        assert (slide.width, slide.mpp, slide.magnification) == (16, 0.499, 20.0)
        for _ in range(2):
            with pytest.raises(SlideError, match=r"slide 'unreadable': cannot read 16 x 16 px .* Bogus marker length"):
                slide.read_tile(0, 0, size_level0_px=16, out_px=16)


def test_a_damaged_place_does_not_spoil_the_others(tmp_path, write_slide):
    image = noise(512, 512)
    path = write_slide(tmp_path / "a.tiff", image, downsamples=(1,))
    content = bytearray(path.read_bytes())
    middle = len(content) // 8  # Within the first of four equally long blocks.
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(content))
    with Slide.open(path) as slide, ThreadPoolExecutor(4) as pool:

        def read(corner):
            try:
                return slide.read_tile(*corner, size_level0_px=256, out_px=256)
            except SlideError:
                return None

        corners = [(x, y) for y in (0, 256) for x in (0, 256)] * 20
        tiles = list(pool.map(read, corners))
    for (x, y), tile in zip(corners, tiles, strict=True):
        if (x, y) == (0, 0):
            assert tile is None
        else:
            assert np.array_equal(tile, image[y : y + 256, x : x + 256])


def test_four_threads_read_what_one_reads(shared_data):
    with Slide.open(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        corners = [(x, y) for y in range(0, 2600, 257) for x in range(0, 1900, 257)]

        def read(corner):
            return slide.read_tile(*corner, size_level0_px=257, out_px=256)

        serial = [read(corner) for corner in corners]
        with ThreadPoolExecutor(4) as pool:
            parallel = list(pool.map(read, corners))
    assert len(corners) == 88
    assert all(np.array_equal(one, four) for one, four in zip(serial, parallel, strict=True))


def test_close_lets_the_file_go_and_reading_is_refused(tmp_path, write_slide):
    slide = Slide.open(write_slide(tmp_path / "a.tiff", noise(64, 64), downsamples=(1,)), reader="openslide")
    handle = weakref.ref(slide._reader._handle)
    slide.close()
    slide.close()
    assert handle() is None
    with pytest.raises(SlideError, match="slide 'a': read after it was closed"):
        slide.read_tile(0, 0, size_level0_px=16, out_px=16)


def test_importing_the_package_imports_no_library():
    heavy = "{'openslide', 'cv2', 'numpy', 'torch'}"
    code = f"import sys, acmil.preprocessing; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, acmil.preprocessing.tiling; print('openslide' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_public_names_are_lazy():
    assert acmil.preprocessing.Slide is Slide
    assert acmil.preprocessing.SlideError is SlideError
    assert {"find_tissue", "tile_grid", "create_encoder", "preprocess"} <= set(dir(acmil.preprocessing))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = acmil.preprocessing.nothing


def test_an_objective_that_does_not_go_with_the_resolution_is_an_alarm(tmp_path, write_slide, monkeypatch):
    path = write_slide(tmp_path / "a.tiff", np.full((300, 300, 3), 240, np.uint8), mpp=0.5)
    for objective, said in ((20.0, False), (40.0, True)):
        monkeypatch.setattr(Slide, "magnification", objective)
        with Slide.open(path) as slide:
            assert ("an objective of 40x and 0.5 µm/px do not go together" in " ".join(slide.resolution_alarms)) == said
