"""The planted-lesion cohort: small slides composed of real tissue, half of them with lesions whose place is known.

The texture is real, the disease is not: the cohort tests a pipeline from slide files to attention maps, and has no
medical meaning. Slides with and without lesions differ in the lesions alone: the same tissue, outline, stain,
resampling, pasting and compression (see `acmil.demo.lesions` for what a slide without lesions goes through in their
place).
"""

import csv
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from acmil.demo.canvas import draw_outline, edge_opacity, quilt
from acmil.demo.lesion_truth import lesion_outlines, outlines_geojson, tile_lesion_fraction
from acmil.demo.lesions import LesionPlan, draw_lesions, plan_lesions
from acmil.demo.manifest import composing_options, read_manifest, write_manifest
from acmil.demo.nuclei import NucleusStamps, cut_stamps
from acmil.demo.pyramid import write_pyramid
from acmil.demo.stains import StainJitter, draw_stain_jitter
from acmil.demo.tissue_source import TissuePart, read_source
from acmil.preprocessing.progress import SilentProgress

if TYPE_CHECKING:
    from acmil.preprocessing.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_DIFFICULTY = 0.5
__all__ = ["DEFAULT_DIFFICULTY", "PlantedCohort", "compose_cohort", "plan_cohort", "tile_lesion_fraction"]

SLIDE_MPP = 0.5
DESCRIPTION = "Synthetic test slide of acmil: texture of CMU-1-Small-Region, planted lesions, no medical meaning."
NEGATIVE, POSITIVE = LABELS = ("normal", "planted")
SLIDES_PER_CASE = 2

_MIN_SLIDES = 12
_SPLIT_SHARES = {"val": 0.15, "test": 0.35}  # of the pairs of cases; the rest trains
_CELLULARITY_SPREAD = 2.0
_NOISE_LEVELS = 1.2  # grain of the camera, in levels of 0-255
_GRAIN_PX = 256


@dataclass(frozen=True)
class PlannedSlide:
    """One row of the cohort, before it is drawn.

    Attributes:
        index: Number of the slide; its own random numbers come from it.
        slide_id: Name of the slide.
        case_id: Name of its case.
        pair_index: Number of the pair of cases, one of each label, that were processed alike.
        number_in_case: Its number in its case.
        label: One of `LABELS`.
        split: `train`, `val` or `test`.
    """

    index: int
    slide_id: str
    case_id: str
    pair_index: int
    number_in_case: int
    label: str
    split: str

    @property
    def files(self) -> tuple[str, str]:
        """Its image and its outlines, in the folder of the cohort."""
        return f"slides/{self.slide_id}.tif", f"lesions/{self.slide_id}.geojson"


@dataclass(frozen=True)
class PlantedCohort:
    """What `compose_cohort` wrote.

    Attributes:
        slides: The slide files, in the order of the cohort.
        cohort_csv: `slide_id,label,case_id,split`.
        lesions: Folder of `<slide_id>.geojson`: outlines in level-0 px, none on normal slides.
        n_slides: Number of slides.
        difficulty: The difficulty they were drawn with.
        seed: The seed they were drawn from.
    """

    slides: tuple[Path, ...]
    cohort_csv: Path
    lesions: Path
    n_slides: int
    difficulty: float
    seed: int


def compose_cohort(
    source_slide: Path,
    out: Path,
    *,
    n_slides: int = 80,
    difficulty: float = DEFAULT_DIFFICULTY,
    seed: int = 0,
    workers: int | None = None,
    progress: "Progress | None" = None,
) -> PlantedCohort:
    """Compose the cohort: `out/slides/*.tif`, `out/lesions/*.geojson` and `out/cohort.csv`.

    Slides that an earlier call with the same options left whole are kept, by the digests in `out/composed.json`; those
    of a cohort of other options are removed where this one has no slide of that name, and composed anew where it has.
    Each slide depends on the seed and its own number alone: the same bytes come out on one machine whatever the number
    of workers.

    Args:
        source_slide: CMU-1-Small-Region.svs.
        out: Folder to write to.
        n_slides: Number of slides, at least 12; rounded up to whole cases, half of them with lesions.
        difficulty: 0 (plain) to 1 (lesions are no different from the tissue around them).
        seed: Of everything that is drawn.
        workers: Processes; by default one a core.
        progress: Told of every slide done.

    Returns:
        The files written.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty must be in [0, 1], got {difficulty}. 0 is plain, 1 is invisible.")
    plan = plan_cohort(n_slides, seed=seed)
    lesions = out / "lesions"
    (out / "slides").mkdir(parents=True, exist_ok=True)
    lesions.mkdir(exist_ok=True)
    options = composing_options(source_slide, n_slides=n_slides, difficulty=difficulty, seed=seed)
    todo = _left_to_compose(out, plan, options)
    if todo:
        progress = progress or SilentProgress()
        progress.begin("composing slides", len(todo))
        for slide in _composed(source_slide, out, todo, difficulty, seed, workers or os.cpu_count() or 1):
            progress.advance(note=slide.slide_id)
        progress.end()
    _write_cohort(out / "cohort.csv", plan)
    if todo:
        write_manifest(out, options, [name for slide in plan for name in slide.files])
    paths = tuple(out / "slides" / f"{slide.slide_id}.tif" for slide in plan)
    return PlantedCohort(paths, out / "cohort.csv", lesions, len(plan), difficulty, seed)


def plan_cohort(n_slides: int, *, seed: int) -> tuple[PlannedSlide, ...]:
    """Lay out cases, labels and splits: cases come in pairs, one of each label, and a pair lies in one split.

    Args:
        n_slides: Number of slides, rounded up to whole pairs of cases.
        seed: Of the order of the cases.

    Raises:
        ValueError: If `n_slides` is below 12, too few for both labels in every split.
    """
    if n_slides < _MIN_SLIDES:
        raise ValueError(f"n_slides must be at least {_MIN_SLIDES}, got {n_slides}: each split needs both labels.")
    n_pairs = -(-n_slides // (len(LABELS) * SLIDES_PER_CASE))
    n_val, n_test = (max(1, round(_SPLIT_SHARES[split] * n_pairs)) for split in ("val", "test"))
    splits = ["train"] * (n_pairs - n_val - n_test) + ["val"] * n_val + ["test"] * n_test
    kinds = [(pair, label, split) for pair, split in enumerate(splits) for label in LABELS]
    slides: list[PlannedSlide] = []
    for place, kind in enumerate(np.random.default_rng([seed, 0]).permutation(len(kinds))):
        pair, label, split = kinds[kind]
        case_id = f"case{place + 1:02d}"
        for number in range(SLIDES_PER_CASE):
            slide_id = f"{case_id}_{number + 1}"
            slides.append(PlannedSlide(len(slides), slide_id, case_id, pair, number, label, split))
    return tuple(slides)


def _left_to_compose(out: Path, plan: tuple[PlannedSlide, ...], options: Mapping[str, Any]) -> tuple[PlannedSlide, ...]:
    """The slides that are not there, or not whole, or of other options; what another cohort left over is removed."""
    before = read_manifest(out)
    if before is None:
        return plan
    for name in set(before.files).difference(*(slide.files for slide in plan)):
        (out / name).unlink(missing_ok=True)
    if before.options != options:
        return plan
    whole = before.whole(out)
    todo = tuple(slide for slide in plan if not whole.issuperset(slide.files))
    logger.info("%d of %d slides are composed already", len(plan) - len(todo), len(plan))
    return todo


def _composed(
    source_slide: Path, out: Path, plan: tuple[PlannedSlide, ...], difficulty: float, seed: int, workers: int
) -> Iterator[PlannedSlide]:
    arguments = (source_slide, out, difficulty, seed)
    if workers == 1:
        composer = SlideComposer(*arguments)
        for slide in plan:
            composer.compose(slide)
            yield slide
        return
    context = multiprocessing.get_context("spawn")  # forking a process that holds threads can hang
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=arguments) as pool:
        yield from pool.map(_compose_in_worker, plan)


_worker_composer: "list[SlideComposer]" = []  # one a process, made by the pool's initializer


def _start_worker(source_slide: Path, out: Path, difficulty: float, seed: int) -> None:
    cv2.setNumThreads(1)  # the processes share the cores already
    _worker_composer.append(SlideComposer(source_slide, out, difficulty, seed))


def _compose_in_worker(slide: PlannedSlide) -> PlannedSlide:
    _worker_composer[0].compose(slide)
    return slide


@dataclass(frozen=True)
class SlideComposer:
    """Draws slides of one cohort, with the source read once.

    Attributes:
        source_slide: CMU-1-Small-Region.svs.
        out: Folder of `slides` and `lesions`.
        difficulty: 0 (plain) to 1 (invisible).
        seed: The cohort's.
    """

    source_slide: Path
    out: Path
    difficulty: float
    seed: int

    @cached_property
    def parts(self) -> dict[str, TissuePart]:
        """The parts of the source tissue, by what they are for."""
        source = read_source(self.source_slide)
        return {name: source.part(name) for name in ("train", "test")}

    @cached_property
    def stamps(self) -> dict[str, NucleusStamps]:
        """Single nuclei of each part."""
        return {name: cut_stamps(part) for name, part in self.parts.items()}

    def compose(self, slide: PlannedSlide) -> None:
        """Draw one slide and write its image and outlines."""
        rng = np.random.default_rng([self.seed, 1, slide.index])
        look = draw_look(self.seed, slide.pair_index, slide.number_in_case)
        name = "test" if slide.split == "test" else "train"
        severity = 1.0 - self.difficulty if slide.label == POSITIVE else 0.0
        image, plan = compose_slide(self.parts[name], self.stamps[name], look, severity=severity, rng=rng)
        for folder in ("slides", "lesions"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        picture, lesions = (self.out / name for name in slide.files)
        write_pyramid(picture, image, mpp=SLIDE_MPP, description=DESCRIPTION)
        outlines = lesion_outlines(plan) if slide.label == POSITIVE else []
        lesions.write_text(json.dumps(outlines_geojson(outlines)), encoding="utf-8")


@dataclass(frozen=True)
class SlideLook:
    """What makes slides look different whatever their label.

    Attributes:
        jitter: Its stain.
        cellularity: Preference for tissue with many nuclei (positive) or few (negative), about -5 to 5.
    """

    jitter: StainJitter
    cellularity: float


def draw_look(seed: int, pair_index: int, number_in_case: int) -> SlideLook:
    """Draw the look of a slide: partly its case's, partly its own, and the same in both cases of a pair.

    Every slide with lesions so has a counterpart without, of equal stain and equal mixture of tissue, in the same
    split: over a split, global colour tells nothing of the label.
    """
    case_rng = np.random.default_rng([seed, 2, pair_index])
    slide_rng = np.random.default_rng([seed, 3, pair_index, number_in_case])
    return SlideLook(draw_stain_jitter(case_rng, slide_rng), float(slide_rng.normal(0.0, _CELLULARITY_SPREAD)))


def compose_slide(
    part: TissuePart, stamps: NucleusStamps, look: SlideLook, *, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, LesionPlan]:
    """Draw one slide.

    Args:
        part: Tissue to compose it of.
        stamps: Nuclei of the same part.
        look: Its stain and mixture of tissue.
        severity: Of its lesions, 0 (null lesions) to 1.
        rng: The slide's own; used in the same way whatever the severity.

    Returns:
        RGB uint8 (h, w, 3) at 0.5 µm/px, and where its lesions, or null lesions, lie.
    """
    outline = draw_outline(rng)
    density = quilt(part, outline, rng, cellularity=look.cellularity)
    plan = plan_lesions(outline, density, rng)
    draw_lesions(density, plan, stamps, severity=severity, rng=rng)
    opacity = edge_opacity(outline, density, rng)
    return _photograph(density, opacity, look.jitter, rng), plan


def _photograph(density: np.ndarray, opacity: np.ndarray, jitter: StainJitter, rng: np.random.Generator) -> np.ndarray:
    """Light through stained tissue on glass, with a little grain: uint8 (h, w, 3)."""
    stained: np.ndarray = cv2.transform(density, np.ascontiguousarray(jitter.density_map().T))
    stained += jitter.density_offset()
    stained *= -opacity[..., None]
    np.exp(stained, out=stained)
    stained *= jitter.glass.astype(np.float32)
    height, width = density.shape[:2]
    grain = rng.normal(0.0, _NOISE_LEVELS, size=(_GRAIN_PX, _GRAIN_PX, 3)).astype(np.float32)
    stained += cv2.repeat(grain, -(-height // _GRAIN_PX), -(-width // _GRAIN_PX))[:height, :width]
    return cv2.convertScaleAbs(np.maximum(stained, 0.0, out=stained))  # rounds, and cuts at 255


def _write_cohort(path: Path, plan: tuple[PlannedSlide, ...]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["slide_id", "label", "case_id", "split"])
        writer.writerows([slide.slide_id, slide.label, slide.case_id, slide.split] for slide in plan)
