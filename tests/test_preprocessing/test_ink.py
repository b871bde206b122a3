"""Pen strokes are found, and nothing that H&E makes is taken for one."""

import cv2
import numpy as np
import pytest

from acmil.preprocessing.ink import pen_ink
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tissue import find_tissue, tissue_mask

INKS = {
    "blue": (40, 60, 160),
    "light blue": (70, 100, 190),
    "violet blue": (50, 45, 160),
    "green": (30, 130, 70),
    "light green": (90, 170, 120),
    "red": (225, 40, 60),
    "dark red": (200, 20, 40),
    "black": (40, 38, 45),
    "grey": (70, 70, 75),
}
TISSUES = {
    "dense haematoxylin": (70, 40, 110),
    "haematoxylin": (90, 60, 140),
    "blue haematoxylin": (110, 90, 170),
    "eosin": (230, 120, 170),
    "strong eosin": (225, 90, 130),
    "red cells": (190, 60, 80),
    "bright red cells": (200, 80, 100),
    "melanin": (90, 60, 45),
    "DAB": (140, 90, 50),
}
SLIDES = (("CMU-1-Small-Region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 1.0))


def stroke(image: np.ndarray, colour: tuple[int, int, int], *, width_px: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Draw a soft-edged line across the middle; the picture and where the line is dense, bool (h, w)."""
    height, width = image.shape[:2]
    cover = np.zeros((height, width), np.float32)
    cv2.line(cover, (0, height // 2 - 10), (width, height // 2 + 30), 1.0, width_px)
    cover = cv2.GaussianBlur(cover, (0, 0), 1.0)[..., None]
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    drawn = np.clip(image * (1 - cover) + (np.array(colour) + noise) * cover, 0, 255).astype(np.uint8)
    return drawn, cover[..., 0] > 0.95


@pytest.mark.parametrize("colour", INKS.values(), ids=INKS)
def test_strokes_on_glass_and_tissue_are_found(make_tissue_picture, colour):
    image = make_tissue_picture(300, 240, ellipses=[(150, 120, 100, 80)])
    drawn, dense = stroke(image, colour)
    ink = pen_ink(drawn, pitch_um=8.0)
    assert ink[dense].mean() > 0.99
    assert ink.sum() == pytest.approx(dense.sum(), rel=0.25)  # its soft edge
    assert not pen_ink(image, pitch_um=8.0).any()


@pytest.mark.parametrize("colour", TISSUES.values(), ids=TISSUES)
def test_broad_tissue_of_any_stain_is_no_ink(make_tissue_picture, colour):
    image = make_tissue_picture(300, 240, ellipses=[(150, 120, 100, 80)])
    assert pen_ink(stroke(image, colour, width_px=60)[0], pitch_um=8.0).sum() == 0


@pytest.mark.parametrize("pitch_um", [4.0, 8.0, 16.0])
def test_a_stroke_has_a_width_in_um(make_tissue_picture, pitch_um):
    image = make_tissue_picture(300, 240, ellipses=[])
    narrow, broad = (stroke(image, INKS["blue"], width_px=round(width / pitch_um))[0] for width in (60, 300))
    assert pen_ink(narrow, pitch_um=pitch_um).sum() == 0
    assert pen_ink(broad, pitch_um=pitch_um).sum() * pitch_um == pytest.approx(300 * 300, rel=0.3)


def test_unlit_edges_are_no_ink(make_tissue_picture):
    image = make_tissue_picture(300, 240, ellipses=[])
    image[:60] = np.random.default_rng(0).integers(0, 12, (60, 300, 3))
    assert pen_ink(image, pitch_um=8.0).sum() == 0


@pytest.mark.parametrize(("name", "mpp"), SLIDES)
@pytest.mark.parametrize("thumbnail_mpp", [2.0, 8.0])
def test_real_tissue_without_pen_keeps_every_pixel(shared_data, name, mpp, thumbnail_mpp):
    with Slide.open(shared_data / "slides" / name, mpp=mpp) as slide:
        assert pen_ink(slide.thumbnail(thumbnail_mpp).image, pitch_um=thumbnail_mpp).sum() == 0


@pytest.mark.parametrize("colour", INKS.values(), ids=INKS)
def test_strokes_over_a_real_slide(shared_data, colour):
    with Slide.open(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", mpp=1.0) as slide:
        image = slide.thumbnail(8.0).image
    drawn, dense = stroke(image, colour)
    ink = pen_ink(drawn, pitch_um=8.0)
    assert ink[dense].mean() > 0.98
    far = cv2.dilate(dense.astype(np.uint8), np.ones((25, 25), np.uint8)) == 0
    assert ink[far].sum() == 0


def test_ink_is_taken_out_of_the_tissue_and_counted(make_memory_slide, make_tissue_picture):
    # At 8 µm/px the picture itself is the thumbnail.
    image = make_tissue_picture(300, 240, ellipses=[(150, 120, 100, 80)])
    drawn, dense = stroke(image, INKS["green"])
    clean, marked = (find_tissue(make_memory_slide(picture, mpp_x=8.0, mpp_y=8.0)) for picture in (image, drawn))
    assert (clean.ink_fraction, clean.ink_removed) == (0.0, 0.0)
    assert clean.alarms == ()
    assert marked.mask[dense].sum() == 0
    away = cv2.dilate(dense.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
    assert (marked.mask == clean.mask)[away].mean() > 0.999
    assert marked.ink_fraction == pytest.approx(dense.mean(), rel=0.25)
    assert marked.ink_removed == pytest.approx((dense & tissue_mask(drawn)).sum() / tissue_mask(drawn).sum(), rel=0.25)
    assert marked.ink_removed > 1 / 3
    (alarm,) = marked.alarms
    assert alarm.startswith(f"{marked.ink_removed:.0%} of the tissue was taken out as pen ink")
    kept = find_tissue(make_memory_slide(drawn, mpp_x=8.0, mpp_y=8.0), remove_ink=False)
    assert (kept.mask[dense].all(), kept.ink_removed, kept.alarms) == (True, 0.0, ())
