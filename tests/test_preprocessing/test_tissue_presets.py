"""Dark backgrounds, and the alarms that a slide's tissue raises."""

import cv2
import numpy as np
import pytest

from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tissue import find_tissue, glow_mask

MPP = {"mpp_x": 8.0, "mpp_y": 8.0}  # The picture itself is the thumbnail.


def glowing(level: int = 120, *, background: int = 4) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, background, (240, 300, 3)).astype(np.uint8)
    cv2.circle(image, (150, 120), 60, (0, 0, level), -1)
    return image


@pytest.mark.parametrize(("level", "background"), [(20, 4), (120, 4), (250, 4), (90, 30)])
def test_the_dark_preset_finds_what_is_brighter_than_the_background(make_memory_slide, level, background):
    image = glowing(level, background=4)
    image = np.clip(image.astype(int) + background - 4, 0, 255).astype(np.uint8)
    tissue = find_tissue(make_memory_slide(image, **MPP), preset="dark")
    assert tissue.mask.sum() == pytest.approx(np.pi * 60**2, rel=0.05)
    assert tissue.mask[120, 150]
    assert (tissue.ink_removed, tissue.alarms) == (0.0, ())


def test_darkness_alone_has_no_tissue():
    for spread in (1, 3, 6):
        assert not glow_mask(np.random.default_rng(0).integers(0, spread, (200, 200, 3)).astype(np.uint8)).any()


def test_a_dark_slide_suggests_the_dark_preset_and_keeps_its_blue(make_memory_slide):
    tissue = find_tissue(make_memory_slide(glowing(), **MPP))
    assert tissue.alarms[0] == "the slide is dark: if it is fluorescence, use --tissue dark"
    assert (tissue.ink_fraction, tissue.ink_removed) == (0.0, 0.0)


def test_a_bright_slide_suggests_brightfield(make_memory_slide, make_tissue_picture):
    slide = make_memory_slide(make_tissue_picture(300, 240, ellipses=[(150, 120, 100, 80)]), **MPP)
    assert find_tissue(slide, preset="dark").alarms[0].endswith("use --tissue brightfield")


def test_the_real_fluorescence_slide(shared_data):
    with Slide.open(shared_data / "slides" / "test3-DAPI-2-(387).ndpi") as slide:
        dark, bright = find_tissue(slide, preset="dark"), find_tissue(slide)
    assert "use --tissue dark" in bright.alarms[0]
    assert 0.5 < dark.fraction < 0.9
    assert dark.fraction > bright.fraction
    assert not any("--tissue" in alarm for alarm in dark.alarms)


@pytest.mark.parametrize(
    ("radius", "alarms"),
    [(8, ["only 0.28% of the slide is tissue"]), (60, []), (400, ["100.0% of the slide is tissue"])],
)
def test_hardly_any_and_nearly_all_tissue_raise_an_alarm(make_memory_slide, make_tissue_picture, radius, alarms):
    slide = make_memory_slide(make_tissue_picture(300, 240, ellipses=[(150, 120, radius, radius)]), **MPP)
    tissue = find_tissue(slide)
    area = tissue.mask.mean()
    assert list(tissue.alarms) == [alarm.replace("0.28%", f"{area:.2%}") for alarm in alarms]


def test_much_taken_out_as_specks_or_filled_raises_an_alarm(make_memory_slide, make_tissue_picture):
    specks = [(x, y, 4, 4) for x in range(20, 300, 20) for y in range(20, 130, 20)]
    picture = make_tissue_picture(300, 240, ellipses=[*specks, (150, 190, 50, 30)])
    assert find_tissue(make_memory_slide(picture, **MPP), min_area_um2=0.0).alarms == ()
    tissue = find_tissue(make_memory_slide(picture, **MPP), min_area_um2=20000.0)
    assert tissue.mask.sum() == pytest.approx(np.pi * 50 * 30, rel=0.05)
    (alarm,) = tissue.alarms
    share = 1 - np.pi * 50 * 30 / (np.pi * 50 * 30 + len(specks) * np.pi * 16)
    assert alarm.endswith("% of the tissue was taken out as specks")
    assert int(alarm.split("%")[0]) / 100 == pytest.approx(share, abs=0.06)
    picture = make_tissue_picture(300, 240, ellipses=[(150, 120, 80, 80)])
    cv2.circle(picture, (150, 120), 60, (243, 243, 244), -1)
    filled = find_tissue(make_memory_slide(picture, **MPP), max_hole_um2=1e6)
    assert filled.alarms == ("56% of the tissue is filled holes",)
