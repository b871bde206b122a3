"""The planted-lesion cohort: what is drawn, what is left alone, and the truth kept beside it."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from acmil.cohort import read_cohort
from acmil.config_file import load_config
from acmil.demo.canvas import MIN_TISSUE, TILE_PX, draw_outline, quilt
from acmil.demo.lesion_truth import lesion_outlines, outlines_geojson, tile_lesion_fraction
from acmil.demo.lesions import draw_lesions, lesion_tiles, plan_lesions
from acmil.demo.nuclei import NucleusStamps, cut_stamps
from acmil.demo.planted import PlantedCohort, SlideComposer, compose_cohort, plan_cohort
from acmil.demo.pyramid import write_pyramid
from acmil.demo.stains import DENSITY_TO_STAINS, STAINS
from acmil.demo.tissue_source import PAD_PX, TissuePart, TissueSource, read_source
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import find_tissue
from acmil.splits import check_splits

N_SLIDES = 12


@pytest.fixture(scope="module")
def source_slide(fetch_or_skip) -> Path:
    return fetch_or_skip("cmu-1-small-region")


@pytest.fixture(scope="module")
def source(source_slide: Path) -> TissueSource:
    return read_source(source_slide)


@pytest.fixture(scope="module")
def part(source: TissueSource) -> TissuePart:
    return source.part("test")


@pytest.fixture(scope="module")
def stamps(part: TissuePart) -> NucleusStamps:
    return cut_stamps(part)


@pytest.fixture(scope="module")
def cohort(source_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> PlantedCohort:
    return compose_cohort(source_slide, tmp_path_factory.mktemp("planted"), n_slides=N_SLIDES, seed=3, workers=2)


def test_cohort_is_balanced_and_split_by_case(cohort: PlantedCohort) -> None:
    table = read_cohort(cohort.cohort_csv)
    check_splits(table)
    assert Counter(row.label for row in table.rows) == {"planted": 6, "normal": 6}
    by_split = Counter((row.split, row.label) for row in table.rows)
    assert by_split == {(split, label): 2 for split in ("train", "val", "test") for label in ("planted", "normal")}
    assert set(Counter(row.case_id for row in table.rows).values()) == {2}


def test_default_cohort_layout() -> None:
    plan = plan_cohort(80, seed=0)
    assert Counter(slide.split for slide in plan) == {"train": 40, "val": 12, "test": 28}
    assert Counter(slide.label for slide in plan) == {"planted": 40, "normal": 40}
    for case in {slide.case_id for slide in plan}:
        assert len({(slide.split, slide.label) for slide in plan if slide.case_id == case}) == 1
    for pair in {slide.pair_index for slide in plan}:
        assert Counter(slide.label for slide in plan if slide.pair_index == pair) == {"planted": 2, "normal": 2}


def test_too_few_slides_are_refused() -> None:
    with pytest.raises(ValueError, match="n_slides must be at least 12, got 4"):
        plan_cohort(4, seed=0)


def test_difficulty_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"difficulty must be in \[0, 1\], got 1.5"):
        compose_cohort(Path("absent.svs"), tmp_path, difficulty=1.5)


def test_same_bytes_whatever_the_workers(cohort: PlantedCohort, source_slide: Path, tmp_path: Path) -> None:
    plan = plan_cohort(N_SLIDES, seed=3)
    composer = SlideComposer(source_slide, tmp_path, difficulty=cohort.difficulty, seed=3)
    for index in (5, 0):  # in this process, and in another order
        composer.compose(plan[index])
        written = cohort.slides[index]
        assert (tmp_path / "slides" / written.name).read_bytes() == written.read_bytes()
        lesions = f"{written.stem}.geojson"
        assert (tmp_path / "lesions" / lesions).read_bytes() == (cohort.lesions / lesions).read_bytes()


def test_at_difficulty_one_a_lesion_slide_is_a_normal_slide(source_slide: Path, tmp_path: Path) -> None:
    slide = next(slide for slide in plan_cohort(N_SLIDES, seed=3) if slide.label == "planted")
    name = f"{slide.slide_id}.tif"
    invisible = SlideComposer(source_slide, tmp_path / "invisible", difficulty=1.0, seed=3)
    invisible.compose(slide)
    plain = dataclasses.replace(invisible, out=tmp_path / "plain", difficulty=0.0)
    plain.compose(dataclasses.replace(slide, label="normal"))
    assert (tmp_path / "invisible/slides" / name).read_bytes() == (tmp_path / "plain/slides" / name).read_bytes()
    plain.compose(slide)
    assert (tmp_path / "invisible/slides" / name).read_bytes() != (tmp_path / "plain/slides" / name).read_bytes()


def test_slides_open_with_resolution_and_pyramid(cohort: PlantedCohort) -> None:
    for path in cohort.slides:
        with openslide.OpenSlide(path) as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, abs=1e-6)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, abs=1e-6)
            assert slide.level_downsamples[:2] == pytest.approx((1.0, 2.0), abs=2e-3)
            assert slide.properties["openslide.level[0].tile-width"] == "256"


def test_the_preset_tiles_as_the_cohort_counts() -> None:
    preset = load_config(PreprocessConfig, "preprocess/demo.yaml", slides=["s"], out="o")
    assert (preset.min_tissue, preset.tile_px, preset.tile_mpp) == (MIN_TISSUE, TILE_PX, 0.5)


def test_lesions_make_up_three_to_ten_percent_of_the_tiles(cohort: PlantedCohort) -> None:
    for row, path in zip(read_cohort(cohort.cohort_csv).rows, cohort.slides, strict=True):
        with Slide.open(path) as slide:
            grid = tile_grid(slide, find_tissue(slide), tile_px=224, tile_mpp=0.5, min_tissue=MIN_TISSUE)
        assert grid.tile_level0_px == 224
        with openslide.OpenSlide(path) as native:
            assert native.properties["tiff.ImageDescription"].startswith("Synthetic test slide")
        assert 50 <= len(grid.coords) <= 90
        share = tile_lesion_fraction(cohort.lesions / f"{row.slide_id}.geojson", grid.coords, 224)
        if row.label == "planted":
            assert 0.03 <= (share >= 0.5).mean() <= 0.10
        else:
            assert share.max() == 0.0


def test_parts_of_the_source_share_no_pixel(source: TissueSource) -> None:
    train, test = source.part_mask("train"), source.part_mask("test")
    assert not (train & test).any()
    gap = cv2.distanceTransform(1 - test.astype(np.uint8), cv2.DIST_L2, 5)[train].min()
    assert gap >= 32.0  # px between any two pixels of different parts
    for name, mask in (("train", train), ("test", test)):
        cut = source.part(name)
        inner = np.s_[PAD_PX:-PAD_PX, PAD_PX:-PAD_PX]
        assert cut.density[inner][~mask].max() == 0.0
        assert cut.depth_px[inner][~mask].max() == 0.0
        assert cut.density.sum() == pytest.approx(cut.density[inner][mask].sum(), rel=1e-3)
        assert mask.sum() > 0.15e6  # px of tissue in the part


@pytest.mark.parametrize("severity", [0.0, 0.5, 1.0])
def test_lesions_keep_the_mean_of_every_stain(part: TissuePart, stamps: NucleusStamps, severity: float) -> None:
    rng = np.random.default_rng(7)
    outline = draw_outline(rng)
    before = quilt(part, outline, rng)
    plan = plan_lesions(outline, before, rng)
    assert 0.03 <= lesion_tiles(plan.depth_px, outline).sum() / outline.tissue_tiles.sum() <= 0.10
    after = before.copy()
    draw_lesions(after, plan, stamps, severity=severity, rng=np.random.default_rng(8))
    depth_px = cv2.resize(plan.depth_px, before.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    changed = np.abs(after - before).max(axis=2) > 1e-6
    assert changed[depth_px > 24].mean() > 0.9
    assert not changed[depth_px < -24].any()  # nothing but the lesions and their soft edge
    stains_before, stains_after = ((density[changed] @ DENSITY_TO_STAINS).mean(axis=0) for density in (before, after))
    np.testing.assert_allclose(stains_after, stains_before, atol=2e-3)  # of about 0.4 haematoxylin and 0.5 eosin


def test_fractions_are_exact_areas(tmp_path: Path) -> None:
    rings = [np.array([[100, 0], [200, 0], [200, 50], [100, 50]]), np.array([[0, 200], [100, 200], [0, 300]])]
    path = tmp_path / "lesions.geojson"
    path.write_text(json.dumps(outlines_geojson(rings)))
    coords = np.array([[0, 0], [100, 0], [150, 25], [0, 200], [50, 200], [400, 400]])
    share = tile_lesion_fraction(path, coords, 100)
    np.testing.assert_allclose(share, [0.0, 0.5, 0.125, 0.5, 0.125, 0.0], atol=1e-7)
    assert share.dtype == np.float32


def test_a_hole_is_no_lesion(tmp_path: Path) -> None:
    square, hole = ([[a, a], [b, a], [b, b], [a, b], [a, a]] for a, b in ((0, 100), (25, 75)))
    path = tmp_path / "lesions.geojson"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [square, hole]}))
    assert tile_lesion_fraction(path, np.array([[0, 0]]), 100)[0] == pytest.approx(0.75)


def test_no_lesions_cover_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lesions.geojson"
    path.write_text(json.dumps(outlines_geojson([])))
    assert tile_lesion_fraction(path, np.array([[0, 0]]), 224).tolist() == [0.0]


def test_outlines_cover_the_planned_area(part: TissuePart) -> None:
    rng = np.random.default_rng(2)
    outline = draw_outline(rng)
    plan = plan_lesions(outline, quilt(part, outline, rng), rng)
    rings = lesion_outlines(plan)
    n_lesions, _ = cv2.connectedComponents((plan.depth_px > 0).astype(np.uint8), connectivity=8)
    assert len(rings) == n_lesions - 1  # label 0 is the rest
    planned_px2 = (cv2.resize(plan.depth_px, None, fx=16, fy=16, interpolation=cv2.INTER_CUBIC) > 0).sum()
    traced_px2 = sum(cv2.contourArea(ring.astype(np.float32)) for ring in rings)
    assert traced_px2 == pytest.approx(planned_px2, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_lesions_lie_in_tissue(part: TissuePart, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outline = draw_outline(rng)
    plan = plan_lesions(outline, quilt(part, outline, rng), rng)
    assert (plan.depth_px > 0).sum() > 0
    assert outline.depth_px[plan.depth_px > 0].min() > -16.0  # px: rounded corners, no more


def test_stains_are_a_basis() -> None:
    np.testing.assert_allclose(STAINS @ DENSITY_TO_STAINS, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(STAINS, axis=1), 1.0)


def test_pyramid_holds_the_image(tmp_path: Path) -> None:
    y, x = np.mgrid[0:1030, 0:1290]
    image = np.stack([x // 6, y // 5, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    write_pyramid(tmp_path / "a.tif", image, mpp=0.25, description="A test.")
    write_pyramid(tmp_path / "b.tif", image, mpp=0.25, description="A test.")
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((1290, 1030), (645, 515))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, abs=1e-6)
        for level, expected in ((0, image), (1, cv2.resize(image, (645, 515), interpolation=cv2.INTER_AREA))):
            found = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))
            assert np.abs(found.astype(int) - expected).mean() < 2.0
