"""Features from one tool's files to another's: the command `features convert`."""

import csv
import io
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from acmil.cohort import read_cohort, sort_labels
from acmil.feature_commands import check_finite, feature_files, read_any
from acmil.preprocessing.atomic import write_text
from acmil.preprocessing.feature_file import SUFFIX, UNKNOWN_PX, FeatureFileError, FeatureMeta, write_feature_file
from acmil.preprocessing.formats import (
    ACMIL,
    FormatError,
    Geometry,
    StoredFeatures,
    acmil_reference,
    clam,
    stamp,
    trident,
)
from acmil.preprocessing.formats.acmil_reference import ReferenceSlide
from acmil.preprocessing.output_folder import make_output_folder
from acmil.preprocessing.progress import SilentProgress

if TYPE_CHECKING:
    from acmil.config import FeaturesConvertConfig
    from acmil.preprocessing.progress import Progress
    from acmil.preprocessing.slide_list import SlideSource

logger = logging.getLogger(__name__)

COHORT_FILE = "cohort.csv"

# What a format cannot be written without. `coords` stands for coordinates in level-0 px.
_NEEDS = {
    ACMIL: ("coords", "level0_mpp", "tile_px", "tile_level0_px", "level0_width", "level0_height"),
    trident.NAME: ("coords", "tile_px", "tile_level0_px"),
    clam.NAME: (),
    stamp.NAME: ("coords", "level0_mpp", "tile_px", "tile_mpp"),
    acmil_reference.NAME: ("coords",),
}
_FROM_SLIDES = {"level0_mpp", "level0_width", "level0_height"}


class _OntoItselfError(FormatError):
    """A file that would be written over the one that is read."""


class ConversionSummary(NamedTuple):
    """What `acmil features convert` leaves."""

    target: str
    where: Path
    n_slides: int
    n_tiles: int
    cohort: Path | None
    unknown: Mapping[str, int]  # what is not known -> of how many slides
    failed: int  # slides that are not among them

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.n_slides} slides, {self.n_tiles} tiles, as {self.target}"]
        if self.failed:
            lines[0] += f"; {self.failed} slides were not converted, the log says why"
        if self.cohort:
            lines.append(f"{self.cohort}: the labels")
        if self.unknown:
            lines.append(
                f"not known of up to {max(self.unknown.values())} slides: {', '.join(self.unknown)}; heatmaps need it, "
                "training does not"
            )
        return "\n".join(lines)


class _Slide(NamedTuple):
    """One slide, ready to be written."""

    stored: StoredFeatures
    geometry: Geometry
    coords: np.ndarray | None  # (N, 2) int64, level-0 px
    encoder: str

    def features(self) -> np.ndarray:
        """The features (N, D), finite, float16 or float32."""
        features = self.stored.features()
        check_finite(features, self.stored.path)
        return features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)


def convert(config: "FeaturesConvertConfig", *, progress: "Progress | None" = None) -> ConversionSummary:
    """Convert feature files, and write `cohort.csv` where the source holds labels.

    All files are looked into before the first is written: nothing is written unless every slide states what the target
    needs, or the options do.

    Raises:
        FormatError: If a file cannot be read, the target needs what is not known, an option contradicts a file, or a
            feature is NaN or infinite.
    """
    if config.to == ACMIL and (config.out / "config.yaml").is_file():
        raise FormatError(f"--out must not be the folder of a job, whose features would be replaced ({config.out}).")
    slides = partial(_slides, config, feature_files(config.path), _slide_sources(config.slides))
    labels, n_tiles, unknown = _survey(config, slides())
    if config.to == acmil_reference.NAME and config.cohort:
        labels = {row.slide_id: row.label for row in read_cohort(config.cohort, require_labels=False).rows}
    progress = progress or SilentProgress()
    progress.begin(f"converting to {config.to}", len(n_tiles))

    def told() -> Iterator[_Slide]:
        for slide in slides():
            yield slide
            progress.advance(note=slide.stored.slide_id)

    make_output_folder(config.out)
    cohort, failed = None, set[str]()
    if config.to == acmil_reference.NAME:
        where = _write_reference(config.out, told(), labels, list(n_tiles))
    else:
        cohort = _write_cohort(config.out / COHORT_FILE, labels) if labels else None
        where, failed = _write_each(config, told())
        n_tiles = {slide_id: n for slide_id, n in n_tiles.items() if slide_id not in failed}
    progress.end()
    return ConversionSummary(config.to, where, len(n_tiles), sum(n_tiles.values()), cohort, unknown, len(failed))


def _slide_sources(folder: Path | None) -> "dict[str, SlideSource]":
    if folder is None:
        return {}
    from acmil.preprocessing.slide_list import list_slides

    return {source.slide_id: source for source in list_slides([folder])}


def _slides(
    config: "FeaturesConvertConfig", files: list[Path], sources: "Mapping[str, SlideSource]"
) -> Iterator[_Slide]:
    """The slides of all files, each with what the file, the slide and the options state."""
    stated = Geometry(**{item.name: getattr(config, item.name, None) for item in fields(Geometry)})
    for path in files:
        for stored in read_any(path):
            geometry, where = stored.geometry, str(path)
            if source := sources.get(stored.slide_id):
                where = f"{path}, {source.path}"
                geometry = geometry.completed(_slide_geometry(source), where=where)
            geometry = geometry.completed(stated, where=where)
            if stored.encoder and config.encoder not in (None, stored.encoder):
                raise FormatError(
                    f"encoder must be what the file says, {stored.encoder!r}, got {config.encoder!r} ({path}). "
                    "Leave the option out."
                )
            if config.coords_mpp is not None and stored.coords_unit:
                raise FormatError(
                    f"coords_mpp is for files that do not state the unit of their coordinates, this one counts "
                    f"{stored.coords_unit} ({path}). Leave the option out."
                )
            coords = stored.level0_coords(geometry, coords_mpp=config.coords_mpp)
            yield _Slide(stored, geometry, coords, stored.encoder or config.encoder or "")


def _slide_geometry(source: "SlideSource") -> Geometry:
    """What the slide itself states; its resolution stays open where it states none or an absurd one."""
    from acmil.preprocessing.slide import Slide, SlideError

    with Slide.open(source.path) as slide:
        try:
            level0_mpp = slide.mpp
        except SlideError as error:
            logger.warning("%s", error)
            level0_mpp = None
        return Geometry(level0_width=slide.width, level0_height=slide.height, level0_mpp=level0_mpp)


def _survey(
    config: "FeaturesConvertConfig", slides: Iterator[_Slide]
) -> tuple[dict[str, str | None], dict[str, int], Counter[str]]:
    """Labels and numbers of tiles by slide, and what is not known of how many; refuse what cannot be converted."""
    labels: dict[str, str | None] = {}
    n_tiles: dict[str, int] = {}
    unknown: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    first = None
    for slide in slides:
        stored = slide.stored
        if stored.format.removesuffix("-pt") == config.to:
            raise FormatError(f"features must be of another format than {config.to!r}, these are ({stored.path}).")
        if stored.slide_id in n_tiles:
            raise FormatError(f"every slide must occur once, {stored.slide_id!r} occurs again ({stored.path}).")
        n_tiles[stored.slide_id] = stored.n_tiles
        if "label" in stored.extras:
            labels[stored.slide_id] = _label(stored.extras["label"])
        gaps = _gaps(slide, _NEEDS[config.to])
        unknown.update(_gaps(slide, _NEEDS[ACMIL]) if config.to == ACMIL else ())
        if gaps and not (config.to == ACMIL and (config.without_geometry or stored.coords is None)):
            missing.update(_mend(slide, gaps))
            first = first or stored.path
    if missing:
        raise FormatError(_describe_missing(config.to, missing, len(n_tiles), first))
    return labels, n_tiles, unknown


def _gaps(slide: _Slide, names: tuple[str, ...]) -> list[str]:
    geometry = slide.geometry
    return [name for name in names if (slide.coords if name == "coords" else getattr(geometry, name)) is None]


def _mend(slide: _Slide, gaps: list[str]) -> list[str]:
    """The options, or what no option can give, that close the gaps."""
    options = [name for name in gaps if name != "coords"]
    if "coords" in gaps and slide.stored.coords is None:
        options.append("coords")
    elif "coords" in gaps:
        if not slide.stored.coords_unit:
            options.append("coords_mpp")
        if slide.geometry.level0_mpp is None and "level0_mpp" not in options:
            options.append("level0_mpp")
    return options


def _describe_missing(target: str, missing: Counter[str], n_slides: int, first: Path | None) -> str:
    text = (
        f"converting to {target} needs {', '.join(missing)}, which up to {max(missing.values())} of {n_slides} slides "
        f"do not state, the first is {first}."
    )
    if "coords" in missing:
        return f"{text} Without coordinates only acmil and clam can be written."
    options = [f"--{name.replace('_', '-')}" for name in missing]
    mend = f" Give {', '.join(options)}"
    if not _FROM_SLIDES.isdisjoint(missing):
        mend += ", or --slides, the folder of the slides, which state their size and mostly their resolution"
    if target == ACMIL:
        mend += "; or --without-geometry, which is enough to train and not for heatmaps"
    return f"{text}{mend}."


def _label(value: Any) -> str | None:
    """A label as text; numbers as numpy keeps them become what Python writes."""
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode() if isinstance(value, bytes) else value
    return str(value) if str(value) else None


def _write_cohort(path: Path, labels: Mapping[str, str | None]) -> Path:
    """Write slide_id,label; a table already there is not overwritten unless it is the same."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["slide_id", "label"])
    writer.writerows((slide_id, label or "") for slide_id, label in labels.items())
    if path.is_file() and path.read_text(encoding="utf-8") != table.getvalue():
        raise FormatError(f"{path} must not exist, or be what is to be written. Delete it, or give another --out.")
    write_text(path, table.getvalue())
    return path


def _write_each(config: "FeaturesConvertConfig", slides: Iterator[_Slide]) -> tuple[Path, set[str]]:
    """Write one file a slide into the folders that the target's own tool makes, whose last it returns.

    A slide whose features are damaged costs the others nothing: the log tells of it, and its name is returned.

    Raises:
        FormatError: If no slide at all can be converted, or one would be written over itself.
    """
    folder, n_written, failed = config.out, 0, set[str]()
    last: Exception | None = None
    for slide in slides:
        try:
            folder = _write_slide(config, slide)
            n_written += 1
        except _OntoItselfError:
            raise
        except (FormatError, FeatureFileError) as error:
            logger.error("%s: %s", slide.stored.slide_id, error)
            failed.add(slide.stored.slide_id)
            last = error
    if last is not None and not n_written:
        raise FormatError(f"no slide could be converted, the last: {last}") from last
    return folder, failed


def _write_slide(config: "FeaturesConvertConfig", slide: _Slide) -> Path:
    encoder = slide.encoder.replace("/", "_") or "unknown"
    if config.to == ACMIL:
        return _write_acmil(config.out / "features", slide)
    if config.to == trident.NAME:
        return _write_one(config.out / f"{trident.FOLDER_PREFIX}{encoder}", slide, trident.write_trident)
    if config.to == stamp.NAME:
        return _write_one(config.out / encoder, slide, stamp.write_stamp)
    return _write_clam(config.out, slide)


def _file_in(folder: Path, slide: _Slide, suffix: str = SUFFIX) -> Path:
    """The file to write, its folder made; never the one that is read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slide.stored.slide_id}{suffix}"
    if path.exists() and path.samefile(slide.stored.path):
        raise _OntoItselfError(f"a file cannot be converted onto itself ({path}). Give another --out.")
    return path


def _write_one(folder: Path, slide: _Slide, write: Any) -> Path:
    write(
        _file_in(folder, slide),
        slide_id=slide.stored.slide_id,
        features=slide.features(),
        coords=slide.coords,
        geometry=slide.geometry,
        encoder=slide.encoder,
    )
    return folder


def _write_clam(out: Path, slide: _Slide) -> Path:
    """Write the tensor, and HDF5 beside it where the coordinates are known."""
    if slide.coords is not None:
        _write_one(out / "h5_files", slide, clam.write_clam)
    folder = out / "pt_files"
    clam.write_clam_pt(_file_in(folder, slide, clam.SUFFIX_PT), features=slide.features())
    return out


def _write_acmil(folder: Path, slide: _Slide) -> Path:
    """Write our own format, tiles in y-then-x order; what is not known is written as not known."""
    path = _file_in(folder, slide)
    stored, geometry, features = slide.stored, slide.geometry, slide.features()
    coords = slide.coords
    if coords is None:
        coords = np.full((stored.n_tiles, 2), UNKNOWN_PX, dtype=np.int64)
    else:
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        features, coords = features[order], coords[order]
    unknown = {"level0_mpp": math.nan, "tile_mpp": math.nan, "level0_magnification": None, "target_magnification": None}
    sizes: dict[str, Any] = {
        name: unknown.get(name, UNKNOWN_PX) if value is None else value for name, value in vars(geometry).items()
    }
    meta = FeatureMeta(
        slide_id=stored.slide_id,
        encoder=slide.encoder,
        encoder_digest="",
        preprocessing_digest="",
        **sizes,
    )
    write_feature_file(
        path,
        features=features,
        coords=coords,
        tissue_fraction=np.full(stored.n_tiles, math.nan, dtype=np.float32),
        meta=meta,
    )
    return folder


def _write_reference(
    out: Path, slides: Iterator[_Slide], labels: Mapping[str, str | None], slide_ids: list[str]
) -> Path:
    """Write one file for all slides; its name says the encoder, which is that of the first slide."""
    numbers = _class_numbers(labels, slide_ids)
    first = next(slides)
    path = out / f"{acmil_reference.FILE_PREFIX}{first.encoder.replace('/', '_') or 'unknown'}{SUFFIX}"

    def groups() -> Iterator[ReferenceSlide]:
        yield _group(first, numbers)
        for slide in slides:
            yield _group(slide, numbers)

    acmil_reference.write_reference(path, groups())
    return path


def _group(slide: _Slide, numbers: Mapping[str, int]) -> ReferenceSlide:
    slide_id = slide.stored.slide_id
    return ReferenceSlide(slide_id, slide.features(), slide.coords, {"label": np.int64(numbers[slide_id])})


def _class_numbers(labels: Mapping[str, str | None], slide_ids: list[str]) -> dict[str, int]:
    """The label of each slide as a number from 0, which is what the reference's loaders take it for."""
    bare = [slide_id for slide_id in slide_ids if labels.get(slide_id) is None]
    if bare:
        raise FormatError(
            f"{acmil_reference.NAME} keeps a label for every slide, {len(bare)} of {len(slide_ids)} have none, first "
            f"{bare[0]!r}. Give --cohort, a CSV of slide_id,label."
        )
    chosen = {slide_id: str(labels[slide_id]) for slide_id in slide_ids}
    classes = sort_labels(set(chosen.values()))
    if all(label.isdecimal() for label in classes) and (len(classes) == 1 or int(classes[0]) == 0):
        return {slide_id: int(label) for slide_id, label in chosen.items()}
    numbers = ", ".join(f"{label} = {index}" for index, label in enumerate(classes))
    logger.warning("labels as numbers from 0: %s", numbers)
    return {slide_id: classes.index(label) for slide_id, label in chosen.items()}
