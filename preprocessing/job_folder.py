"""What a preprocessing job leaves on the disk, and whether a folder's earlier results fit the options given now."""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import yaml

from acmil.preprocessing.atomic import TEMPORARY_SUFFIX, remove, remove_leftovers, write_bytes, write_text
from acmil.preprocessing.feature_file import SUFFIX, FeatureFile, FeatureFileError, is_for_now, open_feature_file
from acmil.preprocessing.leases import BEAT_SECONDS, Leases
from acmil.preprocessing.ledger import Ledger
from acmil.preprocessing.output_folder import make_output_folder
from acmil.preprocessing.prepare import PreparedSlide
from acmil.preprocessing.slide_list import SlideSource
from acmil.preprocessing.tile_images import TileStore, tile_image_paths
from acmil.preprocessing.tissue_outlines import (
    OutlineError,
    Polygon,
    outlines_path,
    read_tissue_outlines,
    to_feature,
)

_PACKAGES = (
    *("acmil", "torch", "timm", "numpy", "opencv-python-headless"),
    *("openslide-python", "openslide-bin", "simplejpeg", "pillow", "cucim-cu12", "cucim-cu13"),
)
_JPEG_QUALITY = 85
MPP_ROUNDING = 1e-5  # relative; the table keeps six digits
_MPP_MEND = " mpp_override is for every slide; for single ones, list them in a CSV with a column mpp."


class JobError(ValueError):
    """A job folder that cannot be used with the options given."""


class JobFolder:
    """The folder of one job: `config.yaml`, `slides.csv`, `tissue/`, `previews/`, `features/`; `tiles/` if asked for.

    Beside these, for the processes that share the job and for a resumed one: `rows/`, a file for each row of the table,
    and `leases/`, which slides are being worked on.

    Args:
        path: The folder; it is made.
        numbers: Every option that changes the numbers, as in force.
        outlines: Folder of the outlines that tissue is taken from; None where it is found.
        tiles: Where pictures of the tiles are written, in what form; None for none.
        beat_seconds: Time between signs of life, see `Leases`.
    """

    def __init__(
        self,
        path: Path,
        *,
        numbers: Mapping[str, Any],
        outlines: Path | None = None,
        tiles: TileStore | None = None,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        _check_outlines(outlines, path)
        if (path / "config.yaml").is_file():
            read_numbers(path / "config.yaml")  # refuses a folder that is something else
        self._outlines = outlines
        self.tiles = tiles
        self.path = path
        self.numbers = dict(numbers)
        self.digest = _digest(self.numbers)
        has_tiles = tiles is not None or (path / "tiles").is_dir()
        for name in ("", "features", "tissue", "previews", "rows", *(["tiles"] if has_tiles else [])):
            remove_leftovers(make_output_folder(path / name))
        self.ledger = Ledger(path / "slides.csv", rows=path / "rows")
        self.leases = Leases(path / "leases", beat_seconds=beat_seconds)

    def features(self, slide_id: str) -> Path:
        """Where a slide's feature file is."""
        return self.path / "features" / f"{slide_id}{SUFFIX}"

    def digest_of(self, outlines: Sequence[Polygon]) -> str:
        """The digest of one slide's result: of the options and, where tissue is given, of its outlines."""
        if self._outlines is None:
            return self.digest
        return _digest({**self.numbers, "outlines": [to_feature(polygon) for polygon in outlines]})

    def write_config(self, options: Mapping[str, Any]) -> None:
        """Write `config.yaml`: options, what they came to, versions.

        Raises:
            JobError: If the folder holds results of other options, or others are working on such.
        """
        path = self.path / "config.yaml"
        self._check_same_numbers(path)
        content = {
            "options": dict(options),
            "numbers": self.numbers,  # what preprocessing_digest is of
            "preprocessing_digest": self.digest,
            "versions": {package: _version(package) for package in _PACKAGES},
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def finished(self, source: SlideSource) -> FeatureFile | None:
        """Return a slide's feature file if it is whole and of these options, so that nothing is left to do.

        Where pictures of the tiles are asked for, they must be there too: a job that is given that option later does
        its slides again, and comes to the same features.
        """
        file = self.features_of(source)
        if file is None or self.tiles is None or self.tiles.has(source.slide_id, file.n_tiles):
            return file
        return None

    def features_of(self, source: SlideSource) -> FeatureFile | None:
        """Return a slide's feature file if it is whole and of these options.

        Raises:
            FeatureFileError: If it cannot be read now, as it is locked, say: then nothing is known of it.
        """
        try:
            file = open_feature_file(self.features(source.slide_id), check_values=False)  # they were when written
        except FeatureFileError as error:
            if is_for_now(error.__cause__):
                raise
            return None
        is_same = file.meta.preprocessing_digest == self._digest_now(source.slide_id)
        is_same = is_same and file.meta.slide_id == source.slide_id
        is_same = is_same and _agrees(source.mpp, file.meta.level0_mpp) and self._has_same_outlines(source.slide_id)
        return file if is_same else None

    def was_empty(self, source: SlideSource) -> bool:
        """Whether a slide has been found to have no tiles before, with these options."""
        row = self.ledger.get(source.slide_id)
        was_empty = row is not None and row.status == "empty" and _agrees(source.mpp, row.mpp)
        return was_empty and self._has_same_outlines(source.slide_id)

    def clear(self, slide_id: str, *, keep_features: bool = False) -> None:
        """Remove what earlier tries left of a slide, so that nothing of them stays if this one fails.

        Features that are right as they are may be kept, and the outlines that they are of.
        """
        kept = (self.features(slide_id), self._tissue(slide_id)) if keep_features else ()
        for path in self._outputs(slide_id):
            if path not in kept:
                remove(path)
        self.ledger.forget(slide_id)

    def clear_leftovers(self, slide_id: str) -> None:
        """Remove what a process was writing of a slide when it died; the slide must be held."""
        for path in self._outputs(slide_id):
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
                remove(leftover)

    def write_outlines(self, prepared: PreparedSlide) -> None:
        """Write a slide's tissue outlines and, if there is one, its preview."""
        slide_id = prepared.source.slide_id
        write_text(self._tissue(slide_id), json.dumps(prepared.tissue.to_geojson()))
        if prepared.preview is not None:
            bgr = cv2.cvtColor(prepared.preview, cv2.COLOR_RGB2BGR)
            _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            write_bytes(self._preview(slide_id), encoded.tobytes())

    def _digest_now(self, slide_id: str) -> str | None:
        """The digest of a slide's result that is of the outlines given now; None where these cannot be used."""
        try:
            return self.digest_of(() if self._outlines is None else read_tissue_outlines(self._outlines, slide_id))
        except OutlineError:
            return None

    def _has_same_outlines(self, slide_id: str) -> bool:
        """Whether a slide's result is of the outlines that are given now, which may have been edited since.

        What they were is kept as the slide's own outlines, and compared point by point: a slide whose outlines were
        edited is done anew, the others are left alone.
        """
        if self._outlines is None:
            return True
        try:
            given, used = (read_tissue_outlines(folder, slide_id) for folder in (self._outlines, self.path / "tissue"))
        except OutlineError:
            return False
        return [to_feature(polygon) for polygon in given] == [to_feature(polygon) for polygon in used]

    def _outputs(self, slide_id: str) -> tuple[Path, ...]:
        """All that a slide may leave, but for its row; the feature file first, as that one says that it is done."""
        tiles = tile_image_paths(self.path / "tiles", slide_id)
        return self.features(slide_id), self._tissue(slide_id), self._preview(slide_id), *tiles

    def _tissue(self, slide_id: str) -> Path:
        return outlines_path(self.path / "tissue", slide_id)

    def _preview(self, slide_id: str) -> Path:
        return self.path / "previews" / f"{slide_id}.jpg"

    def _check_same_numbers(self, path: Path) -> None:
        # A killed run leaves finished slides that its table does not name yet.
        has_files = any((self.path / "features").glob(f"*{SUFFIX}"))
        has_results = has_files or any(row.status in ("done", "empty") for row in self.ledger)
        if not path.is_file() or not (has_results or self.leases.others()):
            return
        before = read_numbers(path)
        names = [name for name in {**before, **self.numbers} if before.get(name) != self.numbers.get(name)]
        if names:
            changes = "; ".join(f"{name}: {before.get(name)} → {self.numbers.get(name)}" for name in names)
            raise JobError(
                f"a job must keep the options that change its numbers, got {changes} ({path}). "
                f"Choose another --out, or give the options as they were.{_MPP_MEND if 'mpp_override' in names else ''}"
            )


def _check_outlines(outlines: Path | None, job: Path) -> None:
    if outlines is None:
        return
    if not outlines.is_dir():
        raise JobError(f"tissue_from must be a folder of <slide_id>.geojson, found none ({outlines}).")
    if outlines.resolve() == (job / "tissue").resolve():
        raise JobError(
            f"tissue_from must not be the job's own folder, which the job writes anew, got {outlines}. "
            "Copy the edited outlines elsewhere, or choose another --out."
        )


def read_numbers(path: Path) -> dict[str, Any]:
    """Read from a job's `config.yaml` the options that its numbers are of.

    Raises:
        JobError: If it is not as a job wrote it.
    """
    try:
        numbers = yaml.safe_load(path.read_text(encoding="utf-8"))["numbers"]
        return dict(numbers)
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        raise JobError(
            f"config.yaml must be as the job wrote it, it cannot be read: {error} ({path}). Choose another --out."
        ) from error


def _digest(numbers: Mapping[str, Any]) -> str:
    canonical = json.dumps(numbers, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _agrees(stated_mpp: float | None, mpp: float | None) -> bool:
    """Whether a result at `mpp` is still what the user asks for, who may state none."""
    return stated_mpp is None or (mpp is not None and abs(mpp - stated_mpp) <= MPP_ROUNDING * stated_mpp)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
