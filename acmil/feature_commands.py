"""Feature files of any tool, looked into and checked: the commands `features info` and `features verify`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acmil import bag_archive
from acmil.cohort import read_cohort
from acmil.preprocessing.feature_file import FeatureFileError
from acmil.preprocessing.formats import ACMIL, SUFFIXES, FormatError, Geometry, StoredFeatures, read_slides
from acmil.preprocessing.progress import SilentProgress

if TYPE_CHECKING:
    from acmil.config import FeaturesInfoConfig, FeaturesVerifyConfig
    from acmil.preprocessing.progress import Progress

ANY_SUFFIX = (*SUFFIXES, bag_archive.SUFFIX)

_COLUMNS = ("file", "format", "slides", "tiles", "D", "dtype", "mpp", "tile", "encoder", "notes")
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class FeatureTable:
    """What `acmil features info` shows: one row a file.

    Attributes:
        rows: The columns by name, as text; `notes` says what is missing, or why a file cannot be read.
        failed: Number of files that cannot be read.
    """

    rows: tuple[dict[str, str], ...]
    failed: int = 0

    def __str__(self) -> str:
        lines = [_COLUMNS, *([row[name] for name in _COLUMNS] for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@dataclass(frozen=True)
class FileCheck:
    """What `acmil features verify` found of one file, or of one slide that should be there.

    Attributes:
        name: The file (with the slide, where a file holds several), or the missing slide.
        problems: What is wrong; none when all is well.
    """

    name: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"wrong  {self.name}: {' '.join(self.problems)}" if self.problems else f"ok     {self.name}"


@dataclass(frozen=True)
class VerifyReport:
    """What `acmil features verify` shows: a line for each slide found or missing, and the count."""

    checks: tuple[FileCheck, ...]

    @property
    def failed(self) -> int:
        """Number of slides with a problem."""
        return sum(bool(check.problems) for check in self.checks)

    @property
    def failures(self) -> str:
        """The lines of the slides with a problem, which are shown even when little is."""
        return "\n".join(str(check) for check in self.checks if check.problems)

    def __str__(self) -> str:
        count = f"{self.failed} of {len(self.checks)} wrong" if self.failed else f"all {len(self.checks)} ok"
        return "\n".join([*map(str, self.checks), count])


def feature_files(path: Path) -> list[Path]:
    """List the feature files of a folder, sorted; a file stands for itself.

    Raises:
        FormatError: If there is none.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FormatError(f"features must be a file or a folder, found nothing ({path}).")
        return [path]
    found = _files_in(path)
    if not found:
        inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _files_in(folder)]
        hint = f" Did you mean {inner[0]}?" if inner else ""
        raise FormatError(f"a folder of features must hold {', '.join(ANY_SUFFIX)} files, found none ({path}).{hint}")
    return found


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in ANY_SUFFIX and not file.name.startswith("."))


def read_any(path: Path, *, check_values: bool = False) -> Iterator[StoredFeatures]:
    """Read the slides or bags of a file of any format, `.npz` archives too; see `read_slides`."""
    if path.suffix == bag_archive.SUFFIX:
        return bag_archive.read_bag_archive(path)
    return read_slides(path, check_values=check_values)


def check_finite(features: np.ndarray, path: Path) -> None:
    """Refuse NaN and infinities in features (N, D), block by block.

    Raises:
        FormatError: If there is one; the message names the tile.
    """
    block_tiles = max(1, _BLOCK_VALUES // features.shape[1])
    for start in range(0, len(features), block_tiles):
        is_bad = ~np.isfinite(features[start : start + block_tiles]).all(axis=1)
        if is_bad.any():
            tile = start + int(is_bad.argmax())
            raise FormatError(f"features must be finite, got NaN or infinity in tile {tile} ({path}).")


def info(config: "FeaturesInfoConfig", *, progress: "Progress | None" = None) -> FeatureTable:
    """Look into feature files: format, sizes, and what geometry they state and leave out.

    Raises:
        FormatError: If there is no feature file.
    """
    rows, failed = [], 0
    for path in _told(feature_files(config.path), "looking into files", progress):
        try:
            rows.append(_describe(path, list(read_any(path))))
        except (FormatError, FeatureFileError) as error:
            failed += 1
            rows.append(dict.fromkeys(_COLUMNS, "") | {"file": path.name, "notes": f"unreadable: {error}"})
    return FeatureTable(tuple(rows), failed)


def _told(files: Sequence[Path], title: str, progress: "Progress | None") -> Iterator[Path]:
    """Give the files one by one, and tell of each."""
    progress = progress or SilentProgress()
    progress.begin(title, len(files))
    for path in files:
        yield path
        progress.advance(note=path.name)
    progress.end()


def _describe(path: Path, slides: Sequence[StoredFeatures]) -> dict[str, str]:
    first = slides[0]
    geometry = first.geometry
    labelled = sum("label" in slide.extras for slide in slides)
    notes = [*first.notes, *([f"{labelled} labels"] if labelled else [])]
    tile_mpp = "" if geometry.tile_mpp is None else f" at {geometry.tile_mpp:.4g}"
    return {
        "file": path.name,
        "format": first.format,
        "slides": str(len(slides)),
        "tiles": str(sum(slide.n_tiles for slide in slides)),
        "D": _distinct(slide.n_features for slide in slides),
        "dtype": _distinct(slide.dtype for slide in slides),
        "mpp": "?" if geometry.level0_mpp is None else f"{geometry.level0_mpp:.4g}",
        "tile": "?" if geometry.tile_px is None else f"{geometry.tile_px} px{tile_mpp}",
        "encoder": first.encoder or "?",
        "notes": "; ".join(notes),
    }


def _distinct(values: Iterable[object]) -> str:
    return "/".join(sorted({str(value) for value in values}))


def verify(config: "FeaturesVerifyConfig", *, progress: "Progress | None" = None) -> VerifyReport:
    """Check feature files: whole, finite, of one shape, encoder and resolution, and there for every slide of a cohort.

    Tiles must have places of their own, in the slide, as far as the files say where they lie.

    Raises:
        FormatError: If there is no feature file.
        CohortError: If the cohort cannot be read.
    """
    cohort = read_cohort(config.cohort, require_labels=False) if config.cohort else None
    checks: list[FileCheck] = []
    slides: list[tuple[int, StoredFeatures]] = []  # place in `checks`, and the slide
    found: set[str] = set()
    for path in _told(feature_files(config.path), "checking files", progress):
        try:
            for slide in read_any(path, check_values=True):
                slides.append((len(checks), replace(slide, coords=None)))  # coordinates need not be kept
                problems = (*_check_slide(slide), *_check_places(slide), *_check_sizes(slide))
                checks.append(FileCheck(_name(slide), problems))
                found.add(slide.slide_id)
        except (FormatError, FeatureFileError) as error:
            checks.append(FileCheck(path.name, (str(error),)))
            found.add(path.stem)
    for place, differences in _disagreements(slides, encoder=config.encoder, mpp_tolerance=config.mpp_tolerance):
        checks[place] = FileCheck(checks[place].name, (*checks[place].problems, *differences))
    if cohort is not None:
        missing = [row.slide_id for row in cohort.rows if row.slide_id not in found]
        checks += [FileCheck(name, (f"no features, it is in {cohort.path}.",)) for name in missing]
    return VerifyReport(tuple(checks))


def _name(slide: StoredFeatures) -> str:
    return slide.path.name if slide.slide_id == slide.path.stem else f"{slide.path.name}: {slide.slide_id}"


def _check_slide(slide: StoredFeatures) -> tuple[str, ...]:
    """What is wrong with one slide by itself; the values of our own files were checked on reading."""
    if slide.format == ACMIL:
        is_named = slide.slide_id == slide.path.stem
        return () if is_named else (f"slide_id must be the file's name, got {slide.slide_id!r}.",)
    try:
        check_finite(slide.features(), slide.path)
    except FormatError as error:
        return (str(error),)
    return ()


def _check_sizes(slide: StoredFeatures) -> Iterator[str]:
    """What is wrong with the sizes that the file states, as the tiles' resolution follows from the others."""
    try:
        slide.geometry.completed(Geometry(), where="")
    except FormatError as error:
        yield str(error).removesuffix(" Leave it out: it follows from the others.")


def _check_places(slide: StoredFeatures) -> Iterator[str]:
    """What is wrong with where the tiles lie, as far as the file says it: two at one place, or one beside the slide."""
    if slide.coords is None or slide.coords_unit != "level0_px":
        return
    n_repeated = len(slide.coords) - len(np.unique(slide.coords, axis=0))
    if n_repeated:
        yield f"coords must differ from tile to tile, got {n_repeated} where another tile is."
    width, height = slide.geometry.level0_width, slide.geometry.level0_height
    if width is None or height is None:
        return
    is_outside = ((slide.coords < 0) | (slide.coords >= (width, height))).any(axis=1)
    if is_outside.any():
        tile = int(is_outside.argmax())
        x, y = slide.coords[tile]
        yield f"coords must lie in the slide, {width} x {height} level-0 px, got ({x}, {y}) at tile {tile}."


def _disagreements(
    slides: Sequence[tuple[int, StoredFeatures]], *, encoder: str | None, mpp_tolerance: float
) -> Iterator[tuple[int, list[str]]]:
    """What sets slides apart from the encoder asked for, and from what most of them are."""
    n_features = _most_common(slide.n_features for _, slide in slides)
    wanted = encoder or _most_common(slide.encoder for _, slide in slides)
    digest = _most_common(slide.extras.get("encoder_digest") for _, slide in slides)
    tile_mpp = _most_common(slide.geometry.tile_mpp for _, slide in slides)
    tile_px = _most_common(slide.geometry.tile_px for _, slide in slides)
    for place, slide in slides:
        problems = []
        if slide.n_features != n_features:
            problems.append(f"D must be {n_features}, as in most files, got {slide.n_features}.")
        if (slide.encoder or encoder) and slide.encoder != wanted:
            stated = repr(slide.encoder) if slide.encoder else "none stated"
            problems.append(f"encoder must be {wanted!r}{'' if encoder else ', as in most files'}, got {stated}.")
        elif (found := slide.extras.get("encoder_digest")) and found != digest:
            problems.append(f"encoder weights must have digest {digest[:12]}, as in most files, got {found[:12]}.")
        mpp = slide.geometry.tile_mpp
        if mpp is not None and abs(mpp / tile_mpp - 1) > mpp_tolerance:
            problems.append(f"tile_mpp must be {tile_mpp:.4g}, as in most files, got {mpp:.4g}.")
        if slide.geometry.tile_px not in (None, tile_px):
            problems.append(f"tile_px must be {tile_px}, as in most files, got {slide.geometry.tile_px}.")
        if problems:
            yield place, problems


def _most_common(values: Iterable[Any]) -> Any:
    """The value most often there, of those that are known; None where none is."""
    counted = Counter(value for value in values if value).most_common(1)
    return counted[0][0] if counted else None
