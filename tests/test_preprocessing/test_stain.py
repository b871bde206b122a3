"""Stain normalisation: the libraries' numbers, one map for a whole slide, and slides that it cannot be done on."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.job_folder import JobError
from acmil.preprocessing.slide import SlideError
from acmil.preprocessing.stain import (
    GLASS_LIGHT,
    REFERENCE_AMOUNTS,
    REFERENCE_MEAN,
    REFERENCE_STAINS,
    REFERENCE_STD,
    _stain_vectors,
    estimate_stain_map,
    macenko_map,
    reinhard_map,
    sample_pixels,
)
from acmil.preprocessing.tiling import TileGrid

RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # another lab's haematoxylin and eosin
DENSE = np.array(
    [[0.65, 0.70, 0.29], [0.25, 0.90, 0.30]]
)  # dense enough in each channel that libraries count all of it
PLACES = ([0, 10, 40, 95, 63], [0, 50, 7, 95, 31])
MAPS = {"macenko": macenko_map, "reinhard": reinhard_map}
ENCODER = "test_efficientnet"


def stained(stains, *, size_px=96, strength=1.0, glass=GLASS_LIGHT):
    """Synthetic tissue of two stains, without chance: uint8 RGB (size, size, 3)."""
    row, column = np.mgrid[0:size_px, 0:size_px]
    haematoxylin = 0.35 + 1.1 * (0.5 + 0.5 * np.sin(row * 0.37) * np.cos(column * 0.23)) ** 3
    eosin = 0.3 + 0.5 * (0.5 + 0.5 * np.cos(row * 0.11 + column * 0.19))
    units = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    density = haematoxylin[..., None] * units[0] + eosin[..., None] * units[1]
    return np.clip(np.rint(glass * np.exp(-strength * density)), 0, 255).astype(np.uint8)


def densities(image):
    return -np.log((image.reshape(-1, 3) + 1.0) / GLASS_LIGHT)


# Computed once, outside: torchstain 1.4.1 (numpy, its own reference), and HistomicsTK's `reinhard` with its standard.
# Both cut the fractions off, so that they are half a level darker.
@pytest.mark.parametrize(
    ("method", "mean", "pixels"),
    [
        (
            "macenko",
            [156.545, 102.515, 138.611],
            [[172, 93, 126], [177, 124, 157], [172, 96, 129], [117, 91, 137], [193, 105, 134]],
        ),
        (
            "reinhard",
            [194.761, 138.826, 183.176],
            [[190, 92, 159], [249, 190, 221], [195, 99, 166], [143, 136, 174], [226, 109, 177]],
        ),
    ],
)
def test_the_libraries_come_to_the_same(method, mean, pixels):
    image = stained(DENSE)
    result = MAPS[method](image.reshape(-1, 3))(image[None])[0]
    np.testing.assert_allclose(result.reshape(-1, 3).mean(axis=0) - 0.5, mean, atol=0.6)
    np.testing.assert_allclose(result[PLACES], pixels, atol=1)


def test_known_stains_are_found():
    vectors = _stain_vectors(densities(stained(RUIFROK)))
    units = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
    cosines = (vectors * units).sum(axis=1)
    # no pixel is of one stain alone, so both lie a little inside
    assert np.degrees(np.arccos(cosines)).max() < 15
    assert vectors[0, 0] > vectors[1, 0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0)


def test_macenko_gives_the_reference_its_stains_and_amounts():
    image = stained(RUIFROK, strength=0.8)
    density = densities(macenko_map(image.reshape(-1, 3))(image[None]))
    amounts = density @ np.linalg.pinv(REFERENCE_STAINS)
    np.testing.assert_allclose(amounts @ REFERENCE_STAINS, density, atol=0.02)  # in the reference's plane
    np.testing.assert_allclose(np.percentile(amounts, 99, axis=0), REFERENCE_AMOUNTS, rtol=0.02)


def test_reinhard_gives_the_reference_its_mean_and_spread():
    image = stained(RUIFROK)
    result = reinhard_map(image.reshape(-1, 3))(image[None])
    to_lms = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    log_lms = np.log(result.reshape(-1, 3) @ to_lms.T)
    rotation = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    lab = log_lms @ rotation.T
    np.testing.assert_allclose(lab.mean(axis=0), REFERENCE_MEAN, atol=0.03)
    np.testing.assert_allclose(lab.std(axis=0), REFERENCE_STD, atol=0.03)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_two_labs_become_alike(method):
    one, other = stained(RUIFROK), stained(RUIFROK * [[1, 1.1, 1.2], [2, 1, 2]], strength=0.7)
    maps = [MAPS[method](image.reshape(-1, 3)) for image in (one, other)]
    results = [stain_map(image[None]) for stain_map, image in zip(maps, (one, other), strict=True)]
    before = np.abs(one.astype(int) - other).mean()
    after = np.abs(results[0].astype(int) - results[1]).mean()
    assert before > 15
    assert after < before / 4


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_colour_becomes_the_same_in_every_tile(method):
    """Neighbours share their map: what a pixel becomes depends on its colour alone, not on its tile or its place."""
    colours = stained(RUIFROK, size_px=256)
    stain_map = MAPS[method](colours[::3, ::3].reshape(-1, 3))
    tiles = np.stack([colours, colours[::-1], np.full_like(colours, colours[5, 5])])
    together = stain_map(tiles)
    np.testing.assert_array_equal(together[1], together[0][::-1])
    assert (together[2] == together[0][5, 5]).all()
    np.testing.assert_array_equal(stain_map(tiles[1:2])[0], together[1])
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(stain_map, [tiles] * 8):
            np.testing.assert_array_equal(result, together)
    assert tiles.dtype == together.dtype == np.uint8


def test_glass_stays_glass_with_macenko():
    stain_map = macenko_map(stained(RUIFROK).reshape(-1, 3))
    glass = np.array([[[[240, 240, 240], [243, 243, 244], [255, 255, 255]]]], np.uint8)
    result = stain_map(glass).astype(int)
    assert np.abs(result - glass).max() <= 12
    assert result.min() >= 235


def test_black_and_white_have_a_colour():
    extremes = np.array([[[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]]], np.uint8)
    for method in MAPS.values():
        result = method(stained(RUIFROK).reshape(-1, 3))(extremes)
        assert result[0, 0, 0].max() < 40 < result[0, 0, 1].min()


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_too_little_tissue_or_one_colour_is_refused(method):
    glass = np.full((5000, 3), 240, np.uint8)
    glass[:300] = (150, 90, 150)
    with pytest.raises(ValueError, match=r"at least 1000 .* got 300 of the 5000"):
        MAPS[method](glass)
    one_colour = np.full((5000, 3), [150, 90, 150], np.uint8)
    one_colour[::2] += method == "macenko"  # noise
    with pytest.raises(ValueError, match=r"must differ in colour by 5°|must have more than one colour"):
        MAPS[method](one_colour)


def test_the_sample_is_of_evenly_spaced_tiles(make_memory_slide):
    image = cv2.resize(stained(RUIFROK, size_px=128), (1280, 1280), interpolation=cv2.INTER_NEAREST)
    slide = make_memory_slide(image)
    y, x = np.mgrid[0:20, 0:20] * 64
    coords = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)
    grid = TileGrid(coords, np.ones(400, np.float32), 64, 64, 0.5, 0)
    pixels = sample_pixels(slide, grid)
    assert pixels.shape == (32 * 64 * 64, 3)  # small tiles are taken whole
    chosen = np.linspace(0, 399, 32).round().astype(int)
    left, top = coords[chosen[7]]
    np.testing.assert_array_equal(pixels[7 * 4096 : 8 * 4096], image[top : top + 64, left : left + 64].reshape(-1, 3))
    large = TileGrid(coords[:1], np.ones(1, np.float32), 1024, 1024, 0.5, 0)
    assert 7000 < len(sample_pixels(slide, large)) <= 8192
    with pytest.raises(SlideError, match=r"slide 'memory': stained pixels .*turn stain_normalisation off"):
        estimate_stain_map(make_memory_slide(np.full_like(image, 240)), grid, "macenko")


@pytest.fixture(scope="module")
def job_options(tmp_path_factory, write_slide, make_tissue_picture):
    """Two synthetic slides of stained tissue, one of tissue of a single colour, and one of glass."""
    folder = tmp_path_factory.mktemp("stain")
    (folder / "slides").mkdir()
    torch.manual_seed(0)
    save_file(import_timm().create_model(ENCODER).state_dict(), folder / "random.safetensors")
    for name, strength in (("dark", 1.0), ("pale", 0.6)):
        picture = np.full((500, 600, 3), 243, np.uint8)
        picture[60:444, 60:444] = stained(RUIFROK, size_px=384, strength=strength)
        write_slide(folder / "slides" / f"{name}.tiff", picture)
    plain = np.full((500, 600, 3), 243, np.uint8)
    plain[60:444, 60:444] = (190, 120, 170)
    write_slide(folder / "slides" / "plain.tiff", plain)
    write_slide(folder / "slides" / "glass.tiff", make_tissue_picture(400, 400, ellipses=[]))
    common = {"encoder": ENCODER, "weights": folder / "random.safetensors", "tile_px": 64, "precision": "fp32"}
    return (
        common
        | {"slides": [folder / "slides"], "device": "cpu", "batch_size": 16, "workers": 2}
        | {
            "save_tiles": "folder",
            "tile_format": "png",
        }
    )


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_job_normalises_whatever_the_threads(job_options, tmp_path, method):
    plain = preprocess(PreprocessConfig(**job_options, out=tmp_path / "none"))
    assert (plain.done, plain.empty) == (3, 1)
    jobs = {}
    for workers in (1, 3):
        options = job_options | {"workers": workers, "stain_normalisation": method}
        summary = preprocess(PreprocessConfig(**options, out=tmp_path / str(workers)))
        assert (summary.done, summary.empty, summary.failed) == (2, 1, 1)
        jobs[workers] = [(tmp_path / str(workers) / f"features/{name}.h5").read_bytes() for name in ("dark", "pale")]
    assert jobs[1] == jobs[3]
    table = (tmp_path / "1/slides.csv").read_text(encoding="utf-8")
    assert "slide 'plain': its" in table
    assert "turn stain_normalisation off" in table

    def difference(job):
        """Of one tissue, stained by two labs: levels between the tiles that the encoder got."""
        folders = [tmp_path / job / "tiles" / name for name in ("dark", "pale")]
        names = [{path.name for path in folder.iterdir()} for folder in folders]
        pairs = [[cv2.imread(str(folder / name)).astype(int) for folder in folders] for name in names[0] & names[1]]
        return np.mean([np.abs(dark - pale).mean() for dark, pale in pairs])

    assert difference("none") > 20
    assert difference("1") < difference("none") / 3


def test_it_is_one_of_the_options_that_a_job_must_keep(job_options, tmp_path):
    preprocess(PreprocessConfig(**job_options, out=tmp_path / "job"))
    stored = yaml.safe_load((tmp_path / "job/config.yaml").read_text(encoding="utf-8"))
    assert stored["numbers"]["stain_normalisation"] == "none"
    with pytest.raises(JobError, match="stain_normalisation: none → reinhard"):
        preprocess(PreprocessConfig(**job_options | {"stain_normalisation": "reinhard"}, out=tmp_path / "job"))


def test_fluorescence_has_no_stains_to_normalise(job_options, tmp_path):
    options = job_options | {"tissue": "dark", "stain_normalisation": "macenko"}
    with pytest.raises(ValidationError, match="must be none with tissue dark, got macenko"):
        PreprocessConfig(**options, out=tmp_path / "job")
