"""Plain images as slides: what is read, at what resolution, and what is refused."""

import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from acmil.preprocessing.prepare import prepare_slide
from acmil.preprocessing.readers.pillow import PillowReader
from acmil.preprocessing.slide import Slide, SlideError
from acmil.preprocessing.slide_list import SlideSource

DPI_HALF_MICRON = 25_400 / 0.5


def noise(height=60, width=90, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def level_0(slide):
    return slide.thumbnail_within(10_000).image


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF"])
def test_pixels_size_and_resolution(tmp_path, suffix):
    image = noise()
    path = tmp_path / f"a{suffix}"
    Image.fromarray(image).save(path, dpi=(DPI_HALF_MICRON, DPI_HALF_MICRON))
    with Slide.open(path) as slide:
        assert (slide.width, slide.height, slide.magnification) == (90, 60, None)
        assert slide.vendor == {".png": "png", ".bmp": "bmp"}.get(suffix, "tiff")
        assert slide.mpp == pytest.approx(0.5, rel=1e-5)
        assert np.array_equal(level_0(slide), image)
        tile = slide.read_tile(-10, 20, size_level0_px=64, out_px=64)
    assert np.array_equal(tile[:40, 10:], image[20:60, :54])
    assert (tile[:, :10] == 255).all()
    assert (tile[40:] == 255).all()


def test_jpeg(tmp_path):
    image = np.full((64, 80, 3), (200, 100, 150), np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(image).save(path, quality=95, dpi=(25_400, 25_400))
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp) == ("jpeg", 1.0)
        assert np.abs(level_0(slide).astype(int) - image).max() <= 3


@pytest.mark.parametrize("compression", ["zlib", "lzma", None])
@pytest.mark.parametrize(("unit", "per_unit"), [("CENTIMETER", 1e4 / 0.25), ("INCH", 25_400 / 0.25)])
def test_flat_tiff(tmp_path, compression, unit, per_unit):
    image = noise()
    path = tmp_path / "a.tif"
    resolution = {"resolution": (per_unit, per_unit), "resolutionunit": unit}
    tifffile.imwrite(path, image, photometric="rgb", compression=compression, **resolution)
    with Slide.open(path) as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-6)
        assert np.array_equal(level_0(slide), image)


def test_a_pyramid_that_openslide_does_not_know_is_read_at_its_largest_page(tmp_path):
    image = noise(64, 96)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:  # In strips, the overview first.
        tiff.write(image[::4, ::4], photometric="rgb", subfiletype=1, resolution=(1e4, 1e4), resolutionunit=3)
        tiff.write(image, photometric="rgb", resolution=(4e4, 4e4), resolutionunit=3)
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.width, slide.mpp) == ("tiff", 96, 0.25)
        assert np.array_equal(level_0(slide), image)


@pytest.mark.parametrize("dpi", [72, 96, 300, 1200, None])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_a_printers_resolution_counts_as_none(tmp_path, suffix, dpi):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise()).save(path, **({"dpi": (dpi, dpi)} if dpi else {}))
    with Slide.open(path) as slide, pytest.raises(SlideError, match=r"'a': the file states no resolution.*--mpp-over"):
        _ = slide.mpp
    with Slide.open(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_resolution_without_a_unit_counts_as_none(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(), photometric="rgb", resolution=(2e4, 2e4), resolutionunit="NONE")
    with Slide.open(tmp_path / "a.tif") as slide, pytest.raises(SlideError, match="states no resolution"):
        _ = slide.mpp


@pytest.mark.parametrize(
    ("unit", "per_unit"), [("micron", 4.0), ("um", 4.0), ("\\u00B5m", 4.0), ("nm", 0.004), ("mm", 4000.0)]
)
def test_imagejs_pixel_size(tmp_path, unit, per_unit):
    image = noise()
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, imagej=True, resolution=(per_unit, per_unit / 1.01), metadata={"unit": unit})
    with Image.open(path) as written:
        assert f"unit={unit}\n" in written.tag_v2[270]
    reader = PillowReader(path, slide_id="a")
    assert (reader.facts.mpp_x, reader.facts.mpp_y) == pytest.approx((0.25, 0.2525), rel=1e-5)
    with Slide.open(path) as slide:
        assert np.array_equal(level_0(slide), image)


@pytest.mark.parametrize("unit", ["pixel", "inch", "parsec", None])
def test_imagejs_other_units_count_as_none(tmp_path, unit):
    metadata = {} if unit is None else {"unit": unit}
    tifffile.imwrite(tmp_path / "a.tif", noise(), imagej=True, resolution=(4.0, 4.0), metadata=metadata)
    with Slide.open(tmp_path / "a.tif") as slide, pytest.raises(SlideError, match="states no resolution"):
        _ = slide.mpp


@pytest.mark.parametrize(
    ("unit", "length", "mpp"), [("µm", 0.5, 0.5), ("nm", 500.0, 0.5), ("mm", 5e-4, 0.5), (None, 0.5, 0.5)]
)
def test_omes_pixel_size(tmp_path, unit, length, mpp):
    path = tmp_path / "a.ome.tif"
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    metadata = {"axes": "YXS", "PhysicalSizeX": length, "PhysicalSizeY": length, **units}
    tifffile.imwrite(path, noise(), photometric="rgb", metadata=metadata)
    with Slide.open(path) as slide:
        assert slide.mpp == pytest.approx(mpp)


def test_omes_pixel_size_is_that_of_the_page_that_is_read(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:  # an overview and the slide, each an image of its own
        for image, mpp in ((noise(20, 30), 3.0), (noise(), 0.25)):
            metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(image, photometric="rgb", metadata=metadata)
    with Slide.open(path) as slide:
        assert (slide.width, slide.mpp) == (90, 0.25)


@pytest.mark.parametrize(
    "pixels",
    [
        'SizeX="90" SizeY="60"',
        'SizeX="90" SizeY="60" PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"',
        'SizeX="900" SizeY="600" PhysicalSizeX="0.5" PhysicalSizeY="0.5"',
        'SizeX="90" SizeY="60" PhysicalSizeX="0.5" PhysicalSizeY="0.5"/><Pixels SizeX="90" SizeY="60"',
    ],
)
def test_ome_that_does_not_tell_counts_as_none(tmp_path, pixels):
    description = f'<?xml version="1.0"?><OME xmlns="urn:x"><Image><Pixels {pixels}/></Image></OME>'
    options = {"resolution": (300, 300), "resolutionunit": "INCH", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", noise(), photometric="rgb", description=description, **options)
    with Slide.open(tmp_path / "a.tif") as slide, pytest.raises(SlideError, match="states no resolution"):
        _ = slide.mpp


@pytest.mark.parametrize("description", ["<OME broken", "made by <OME> hand", "ImageJ=1.54\n"])
def test_other_descriptions_leave_it_to_the_tags(tmp_path, description):
    options = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", noise(), photometric="rgb", description=description, **options)
    with Slide.open(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(0.5)


def test_grey_palette_and_transparency(tmp_path):
    grey = noise(channels=1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with Slide.open(tmp_path / "grey.png") as slide:
        assert np.array_equal(level_0(slide), np.repeat(grey[..., None], 3, axis=2))

    black_on_white = grey > 127
    Image.fromarray(black_on_white).save(tmp_path / "two.png")
    with Slide.open(tmp_path / "two.png") as slide:
        assert np.array_equal(level_0(slide)[..., 1], black_on_white * np.uint8(255))

    palette = Image.fromarray(grey % 3)
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([(10, 20, 30), (40, 50, 60), (255, 255, 255)], np.uint8)  # The third is transparent: white.
    palette.save(tmp_path / "palette.png", transparency=2)
    with Slide.open(tmp_path / "palette.png") as slide:
        assert np.array_equal(level_0(slide), colours[grey % 3])

    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3], rgba[0, :, 3] = 100, (0, 51, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    with Slide.open(tmp_path / "alpha.png") as slide:
        assert level_0(slide)[0, :, 0].tolist() == [255, 224, 100]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.jpg", lambda p: Image.new("CMYK", (9, 9)).save(p), r"grey or RGB, got CMYK .*printer's profile.*Convert"),
        ("a.png", lambda p: Image.fromarray(np.zeros((9, 9), np.uint16)).save(p), r"8 bits a channel, got I;16"),
        ("a.tif", lambda p: tifffile.imwrite(p, np.zeros((9, 9, 3), np.uint16), photometric="rgb"), "8 bits a channel"),
        ("a.tif", lambda p: tifffile.imwrite(p, np.zeros((9, 9), np.float32)), "8 bits a channel, got F"),
        (
            "a.tif",
            lambda p: tifffile.imwrite(p, np.zeros((3, 9, 9), np.uint8), photometric="minisblack"),
            r"one page of its largest size, got 3 of 9 x 9 px.*Save the page",
        ),
        ("a.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\nnothing"), r"cannot read .*a\.png as PNG, JPEG, BMP"),
        ("a.png", lambda p: p.write_text("no image"), r"cannot read .*a\.png as PNG, JPEG, BMP"),
    ],
)
def test_what_is_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(SlideError, match=rf"slide 'a': .*{message}"):
        Slide.open(tmp_path / name)


def test_deep_rgb_png_is_refused(tmp_path):

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((9, 9, 3), np.uint16))
    with pytest.raises(SlideError, match="8 bits a channel, got RGB of more"):
        Slide.open(tmp_path / "a.png")


def test_an_image_over_the_limit_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (32_768, 1)).save(path)
    header = bytearray(path.read_bytes())
    header[20:24] = (32_769).to_bytes(4, "big")  # The height in the first chunk; its checksum is behind it.

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    path.write_bytes(header)
    with pytest.raises(SlideError, match=r"at most 1,024 MiB decoded, got 1,024 MiB for 32768 x 32769 px.*tiffsave"):
        Slide.open(path)
    Image.new("RGB", (100, 100)).save(path)
    with pytest.raises(SlideError, match="at most 0 MiB decoded"):
        PillowReader(path, slide_id="a", max_decoded_bytes=39_999)
    assert PillowReader(path, slide_id="a", max_decoded_bytes=40_000).facts.level_sizes == ((100, 100),)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_pillows_own_limit_is_out_of_the_way_and_back_afterwards(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = noise()
    Image.fromarray(image).save(tmp_path / name)
    with Slide.open(tmp_path / name) as slide:
        assert np.array_equal(level_0(slide), image)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_truncated_image_is_an_error_of_its_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with Slide.open(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"slide 'a': cannot read .*a\.png.*copy it anew"):
                slide.read_tile(0, 0, size_level0_px=16, out_px=16)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, np.array), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1))]
)
def test_a_picture_is_turned_upright(tmp_path, suffix, orientation, turned):
    image = np.repeat(np.repeat(noise(4, 6), 16, axis=0), 16, axis=1) // 2
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(image).save(tmp_path / f"a{suffix}", exif=exif, dpi=(25_400, 50_800))
    with Slide.open(tmp_path / f"a{suffix}") as slide:
        upright = turned(image)
        assert (slide.height, slide.width) == upright.shape[:2]
        picture = level_0(slide).astype(int)
        pitches = slide._reader.facts.mpp_x, slide._reader.facts.mpp_y
    assert np.abs(picture - upright).mean() < (8 if suffix == ".jpg" else 1e-9)
    assert pitches == pytest.approx((0.5, 1.0) if orientation == 6 else (1.0, 0.5), rel=1e-4)


def test_reading_after_close_is_refused_and_threads_read_the_same(tmp_path):
    image = noise(300, 300)
    Image.fromarray(image).save(tmp_path / "a.png")
    with Slide.open(tmp_path / "a.png") as slide, ThreadPoolExecutor(4) as pool:
        corners = [(x, y) for y in range(0, 256, 16) for x in range(0, 256, 16)]
        tiles = list(pool.map(lambda c: slide.read_tile(*c, size_level0_px=32, out_px=32), corners))
    for (x, y), tile in zip(corners, tiles, strict=True):
        assert np.array_equal(tile, image[y : y + 32, x : x + 32])
    with pytest.raises(SlideError, match="slide 'a': read after it was closed"):
        slide.read_tile(0, 0, size_level0_px=16, out_px=16)


def test_which_reader_opens_what(tmp_path, write_slide, shared_data):
    path = write_slide(tmp_path / "tiled.tif", noise(300, 300))
    with Slide.open(path) as slide, Slide.open(path, reader="pillow") as plain:
        assert (slide.vendor, plain.vendor) == ("generic-tiff", "tiff")
        assert np.array_equal(level_0(slide), level_0(plain))
        assert slide.mpp == pytest.approx(plain.mpp)
    Image.fromarray(noise()).save(tmp_path / "b.png")
    with pytest.raises(SlideError, match=r"slide 'b': not a slide format that OpenSlide reads"):
        Slide.open(tmp_path / "b.png", reader="openslide")
    Image.fromarray(noise()).save(tmp_path / "c.jpg")
    shutil.move(tmp_path / "c.jpg", tmp_path / "c.mrxs")  # A MIRAX slide without its data is an overview.
    with pytest.raises(SlideError, match="not a slide format that OpenSlide reads"):
        Slide.open(tmp_path / "c.mrxs")
    with Slide.open(shared_data / "tiles" / "CRC-VAL-HE-7K-NORM-TCGA-YLVCMEHK.tif") as slide:
        assert (slide.vendor, slide.width, slide.height) == ("tiff", 224, 224)
        with pytest.raises(SlideError, match="states no resolution"):
            _ = slide.mpp


def test_a_plain_image_is_tiled_like_a_slide(tmp_path, make_tissue_picture, write_slide):
    """The same pixels in a PNG and in a pyramid give the same tiles."""
    image = make_tissue_picture(900, 700, ellipses=[(450, 350, 300, 250)])
    Image.fromarray(image).save(tmp_path / "plain.png", dpi=(DPI_HALF_MICRON, DPI_HALF_MICRON))
    write_slide(tmp_path / "pyramid.tiff", image, downsamples=(1,))
    options = {"tile_px": 64, "tile_mpp": 1.0, "overlap_px": 0, "min_tissue": 0.25, "tissue_mpp": 4.0}
    prepared = [
        prepare_slide(SlideSource(path.stem, path), **options, previews=True, reader="auto")
        for path in (tmp_path / "plain.png", tmp_path / "pyramid.tiff")
    ]
    plain, pyramid = (one.grid for one in prepared)
    assert len(plain) > 10
    assert np.array_equal(plain.coords, pyramid.coords)
    assert np.array_equal(prepared[0].preview, prepared[1].preview)
    for x, y in plain.coords:
        tiles = [one.slide.read_tile(x, y, size_level0_px=plain.tile_level0_px, out_px=64) for one in prepared]
        assert np.array_equal(*tiles)
