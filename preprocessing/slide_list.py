"""Which slides a job is about: files, folders and CSV lists, named and checked before anything starts."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from acmil.preprocessing.ledger import COLUMNS as JOB_COLUMNS

logger = logging.getLogger(__name__)

# The formats that OpenSlide reads, https://openslide.org/formats
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn"),
    *(".svslide", ".bif", ".vms", ".vmu", ".dcm", ".czi"),
)
# Plain images, which Pillow reads. Folders of slides often hold pictures that are no slides: see `_without_pictures`.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_TILED_IN_JPEG = (".vms", ".vmu")  # Formats that keep their pixels in JPEG files beside them.
# What this package leaves in folders whose pictures show results, each a set of names that stand side by side.
_RESULTS = (
    ("config.yaml", "slides.csv", "features", "previews"),  # a job
    ("model.json", "config.yaml"),  # a run
    ("metrics.json", "predictions.csv"),  # an evaluation
    ("umap.csv", "umap.png"),
    ("index.html", "summary.json"),  # the demo
)
_LIST_SUFFIX = ".csv"
_DICOM_SUFFIX = ".dcm"
_OF_SYSTEMS = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}  # folders of disks, without slides
_MAX_NAMED = 5  # more slides than this are counted, not listed
_MOST_BYTES = 160  # of a name: files named after it, and hidden ones while they are written, have 255
_COLUMNS = ("path", "slide_id", "mpp")


class SlideListError(ValueError):
    """A list of slides that cannot be used."""


@dataclass(frozen=True)
class SlideSource:
    """A slide that was asked for.

    Attributes:
        slide_id: Its name in every file of the job.
        path: The slide file.
        mpp: Resolution of level 0 in µm/px as the user states it, None to take the file's.
    """

    slide_id: str
    path: Path
    mpp: float | None = None


def list_slides(
    given: Iterable[Path], *, mpp: float | None = None, with_tiles: bool = False
) -> tuple[SlideSource, ...]:
    """Expand files, folders and CSV lists into slides.

    Args:
        given: Slide files; folders, searched with all folders inside, in sorted order, where plain images that come
            with a slide or show a result are left out; CSV files with a column `path` (relative to the CSV's folder)
            and, if there, `slide_id` and `mpp`.
        mpp: Resolution of level 0 in µm/px for slides that the CSV states none for.
        with_tiles: Of a job's table leave out the slides that have none: those that failed, are empty or not done yet.

    Returns:
        The slides in the order given.

    Raises:
        SlideListError: If a path does not exist, or none in a list (one of many that does not is a slide that fails), a
            folder or list holds no slide, a list cannot be read, a slide_id cannot name a file, or two slides have one
            slide_id.
    """
    sources = [source for path in given for source in _expand(Path(path), mpp, with_tiles)]
    missing = [source.path for source in sources if not source.path.exists()]
    named_here = {Path(path) for path in given}
    if missing and (len(missing) == len(sources) or not named_here.isdisjoint(missing)):
        named = ", ".join(map(str, missing[:_MAX_NAMED]))
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise SlideListError(f"slide file must exist, found none ({named}{more}).")
    for source in sources:
        _check_slide_id(source)
    by_id: dict[str, SlideSource] = {}
    for source in sources:
        other = by_id.setdefault(source.slide_id, source)
        if other is not source:
            raise SlideListError(
                f"slide_id must be unique, got {source.slide_id!r} for {other.path} and {source.path}. "
                "Rename one file, or give a CSV of path,slide_id."
            )
    return tuple(sources)


def _expand(path: Path, mpp: float | None, with_tiles: bool) -> list[SlideSource]:
    if path.is_dir():
        return _from_folder(path, mpp)
    if path.suffix.lower() == _LIST_SUFFIX and path.is_file():
        return list(_from_csv(path, mpp, with_tiles))
    return [SlideSource(path.stem, path, mpp)]


def _from_folder(folder: Path, mpp: float | None) -> list[SlideSource]:
    suffixes = (*SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
    # A leading dot marks what file systems and copying programs leave beside a slide, under the slide's suffix.
    named = [path for path in _files_below(folder) if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    found = [path for path in named if path.is_file()]
    if len(found) < len(named):
        gone = next(path for path in named if not path.is_file())
        logger.warning("%s: %d links lead nowhere, such as %s", folder, len(named) - len(found), gone)
    slides = _one_of_each_series(_without_pictures(found, folder))
    if not slides:
        raise SlideListError(f"no slides found in {folder}, suffixes looked for: {', '.join(suffixes)}.")
    return [SlideSource(path.stem, path, mpp) for path in slides]


def _files_below(folder: Path) -> list[Path]:
    """All files, sorted, also of folders that are links; each folder once."""
    seen: set[Path] = set()
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise SlideListError(
            f"all folders inside {folder} must be readable, as slides may lie in them: {error.strerror} "
            f"({error.filename}). Make it readable, or name the folders that are."
        ) from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if name not in _OF_SYSTEMS]
        real = Path(parent).resolve()
        if real in seen:
            folders.clear()  # a link to a folder that was searched already
            continue
        seen.add(real)
        found += [Path(parent, name) for name in names]
    return sorted(found)


def _one_of_each_series(slides: list[Path]) -> list[Path]:
    """Leave one file of each DICOM series in a folder: its files, levels and label, are one slide."""
    kept: list[Path] = []
    series: set[tuple[Path, str]] = set()
    for path in slides:
        name = _series_of(path) if path.suffix.lower() == _DICOM_SUFFIX else None
        if name is None or (path.parent, name) not in series:
            kept.append(path)
        if name is not None:
            series.add((path.parent, name))
    if len(kept) < len(slides):
        logger.info("%d DICOM files are parts of slides that other files stand for", len(slides) - len(kept))
    return kept


def _series_of(path: Path) -> str | None:
    """The series that a DICOM file is of; None where it cannot be read, which its turn will show."""
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except openslide.OpenSlideError:
        return None


def _without_pictures(found: list[Path], folder: Path) -> list[Path]:
    """Leave out the plain images that come with a slide or show a result; the log says how many."""
    beside: dict[Path, list[Path]] = {}  # the slides of each folder
    for path in found:
        if path.suffix.lower() in SLIDE_SUFFIXES:
            beside.setdefault(path.parent, []).append(path)
    slides: list[Path] = []
    pictures: list[Path] = []
    for path in found:
        is_picture = path.suffix.lower() in IMAGE_SUFFIXES and (
            _belongs_to_a_slide(path, beside.get(path.parent, ())) or _shows_a_result(path, folder)
        )
        (pictures if is_picture else slides).append(path)
    if pictures:
        logger.warning(
            "%s: %d images are not taken for slides, as they come with a slide or show a result, such as %s. "
            "Name a file, or list it in a CSV, to have it taken.",
            *(folder, len(pictures), pictures[0].relative_to(folder)),
        )
    return slides


def _belongs_to_a_slide(image: Path, slides: Iterable[Path]) -> bool:
    """Whether an image is a part of a slide beside it, or by its name a picture of it: a.svs, a.png, a_mask.png."""
    return any(
        slide.suffix.lower() in _TILED_IN_JPEG
        or (image.stem.startswith(slide.stem) and not image.stem[len(slide.stem) :][:1].isalnum())
        for slide in slides
    )


def _shows_a_result(path: Path, folder: Path) -> bool:
    """Whether an image is a preview, a heatmap or a figure that this package wrote."""
    if path.with_suffix(".geojson").is_file():
        return True
    inside = [parent for parent in path.parents if parent == folder or folder in parent.parents]
    return any(all((parent / name).exists() for name in names) for parent in inside for names in _RESULTS)


def _from_csv(path: Path, mpp: float | None, with_tiles: bool) -> Iterator[SlideSource]:
    # -sig: spreadsheets begin a file with a byte order mark
    with _as_text(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = columns = [_column_name(name) for name in reader.fieldnames or []]
        if "path" not in columns:
            raise SlideListError(
                f"slide list must have a column 'path', got {', '.join(columns) or 'nothing'} ({path})."
            )
        ignored = [column for column in columns if column not in _COLUMNS]
        if ignored and tuple(columns) != JOB_COLUMNS:
            logger.warning("slide list %s: columns %s are not used", path, ", ".join(ignored))
        rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise SlideListError(f"slide list must hold at least one slide, got none ({path}).")
    is_job = tuple(columns) == JOB_COLUMNS
    if with_tiles and is_job:
        without = Counter(row["status"] for _, row in rows if row["status"] != "done")
        rows = [(line, row) for line, row in rows if row["status"] == "done"]
        said = ", ".join(f"{count} {status}" for status, count in sorted(without.items()))
        if not rows:
            raise SlideListError(f"no slide of the job has tiles ({path}: {said}).")
        if without:
            logger.info("slides of %s without tiles are left out: %s", path, said)
    for line, row in rows:
        where = f"{path}, line {line}"
        if None in row or None in row.values():
            raise SlideListError(
                f"slide list must have {len(columns)} fields in every row, as its header has, found others ({where}). "
                "Put quotes round values that hold a comma."
            )
        if not (row["path"] or "").strip():
            raise SlideListError(f"slide list must have a path in every row, found none ({where}).")
        slide = path.parent / row["path"].strip()  # an absolute path stays as it is
        # Of a job's table only what was stated to the job: the rest is what the slides say themselves, rounded.
        stated = "" if is_job and row["mpp_given"] != "true" else (row.get("mpp") or "").strip()
        yield SlideSource(
            slide_id=(row.get("slide_id") or "").strip() or slide.stem,
            path=slide,
            mpp=_number(stated, where) if stated else mpp,
        )


def _column_name(name: str) -> str:
    """A column as it is called here, however a spreadsheet writes it; a name that is none of ours stays as it is."""
    simple = name.strip().lower().replace(" ", "_")
    return simple if simple in _COLUMNS else name


@contextmanager
def _as_text(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise SlideListError(
            f"slide list must be CSV text in UTF-8: {error} ({path}). Save it as 'CSV UTF-8'."
        ) from error


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SlideListError(f"mpp must be a number in µm/px, got {text!r} ({where}).") from None


def _check_slide_id(source: SlideSource) -> None:
    slide_id = source.slide_id
    if slide_id.startswith(".") or not slide_id or any(sign in slide_id for sign in "/\\\0\n\r"):
        raise SlideListError(f"slide_id must be fit for a file name, got {slide_id!r} ({source.path}).")
    try:
        n_bytes = len(slide_id.encode())
        str(source.path.parent).encode()
    except UnicodeEncodeError as error:
        what = "file" if error.object == slide_id else "folder"
        raise SlideListError(
            f"slide_id and path must be text, got {str(source.path)!a}. Rename the {what} to UTF-8."
        ) from None
    if n_bytes > _MOST_BYTES:
        raise SlideListError(
            f"slide_id must have at most {_MOST_BYTES} bytes in UTF-8, got {n_bytes} ({source.path}). "
            "Rename the file, or give a CSV of path,slide_id."
        )
