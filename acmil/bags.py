"""Bags: the tile features of a slide, read lazily from feature files, and packed without padding.

A packed batch holds the bags one after the other, `features` (ΣN, D), with `offsets` (B+1,): bag b is the rows
`offsets[b]` to `offsets[b+1]`.
"""

import difflib
import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, overload
from weakref import WeakValueDictionary

import numpy as np
import torch

from acmil.cohort import CohortRow
from acmil.models.defaults import MPP_TOLERANCE
from acmil.preprocessing.feature_file import SUFFIX, UNKNOWN_PX, FeatureFile, FeatureMeta, open_feature_file

logger = logging.getLogger(__name__)

_MAX_NAMED = 5  # more slides than this are counted, not listed


class BagError(ValueError):
    """Features that cannot be used together, or that are not there."""


@dataclass(frozen=True, eq=False)
class Bag:
    """The tiles of one slide.

    Attributes:
        slide_id: The slide's name.
        features: (N, D) float16 or float32 as stored; read-only and memory-mapped unless read into memory.
        coords: (N, 2) int64, (x, y) of each tile's top-left corner in level-0 px.
        label: Index of the slide's class, or None where it is not known.
        case_id: The patient.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    label: int | None
    case_id: str


@dataclass(frozen=True, eq=False)
class PackedBags:
    """Bags one after the other on a device, without padding.

    Attributes:
        features: (ΣN, D).
        offsets: (B+1,) int64; bag b is the rows `offsets[b]` to `offsets[b+1]`.
        labels: (B,) int64, or None where the bags have no labels.
    """

    features: torch.Tensor
    offsets: torch.Tensor
    labels: torch.Tensor | None


class BagDataset(Sequence[Bag]):
    """The bags of a cohort's slides, each read when it is asked for.

    All files are opened and checked once, here; reading a bag afterwards maps its features into memory, so that only
    the pages which are used are read from the disk. Reading from several threads at once is safe, and the dataset can
    be pickled (without the features, unless they are held in memory).

    Attributes:
        feature_dir: The folder of feature files, one `<slide_id>.h5` a slide.
        rows: The cohort's rows, one a bag, in order.
        classes: The class names; a label is an index into them. None: bags have no labels.
        n_features: D, the same for all bags.
        metas: Where each bag's features come from.
        n_tiles: N of each bag.
        labels: Class index of each bag, or None where it is not known.
    """

    def __init__(
        self,
        feature_dir: Path,
        rows: Sequence[CohortRow],
        *,
        classes: Sequence[str] | None,
        in_memory: bool = False,
        check_values: bool = True,
        mpp_tolerance: float | None = MPP_TOLERANCE,
    ) -> None:
        """Open and check the feature files of `rows`.

        Args:
            feature_dir: The folder of feature files.
            rows: The slides.
            classes: Class names, in the order of the model's outputs; None leaves the bags without labels.
            in_memory: Read all features now and hold them.
            check_values: Look for NaN and infinities, which reads every feature once.
            mpp_tolerance: Share by which the slides' tile resolutions may differ; None: by any.

        Raises:
            BagError: If there is no row, a slide has no feature file or a label that is none of `classes`, or the
                slides' features do not go together.
            FeatureFileError: If a feature file is damaged.
        """
        self.feature_dir = Path(feature_dir)
        self.rows = tuple(rows)
        self.classes = None if classes is None else tuple(classes)
        if not self.rows:
            raise BagError(f"a data set must have at least 1 slide, got none ({self.feature_dir}).")
        self.labels = tuple(_label_index(row, self.classes) for row in self.rows)
        paths = _feature_paths(self.feature_dir, [row.slide_id for row in self.rows])
        self._files = tuple(open_feature_file(path, check_values=check_values) for path in paths)
        self.metas: tuple[FeatureMeta, ...] = tuple(file.meta for file in self._files)
        self.n_tiles = tuple(file.n_tiles for file in self._files)
        _check_compatible(self.rows, self._files)
        if mpp_tolerance is not None:
            _check_resolutions(self.rows, self.metas, mpp_tolerance)
        self.n_features = self._files[0].n_features
        self._held = [(np.array(file.features()), file.coords()) for file in self._files] if in_memory else None
        self._in_use: WeakValueDictionary[str, Bag] = WeakValueDictionary()  # by slide
        self._samples: dict[Path, str] = {}  # digests of some features of a file, of all selections

    @property
    def origin(self) -> dict[str, Any]:
        """What the features are, by what their files say, wherever these lie.

        Encoder and tiles, each as far as any file knows it (else empty, -1 or None; of `tile_mpp` the finest and the
        coarsest), and a `digest` over all slides: their number of tiles, feature size, encoder, the preprocessing that
        made them, and the features of three tiles.
        """

        def known(values: Iterable[Any]) -> Any:
            return next((value for value in values if value not in ("", UNKNOWN_PX) and value == value), None)

        resolutions = [meta.tile_mpp for meta in self.metas if meta.tile_mpp > 0]  # NaN: not known
        slides = sorted(
            (
                row.slide_id,
                file.n_tiles,
                meta.encoder,
                meta.encoder_digest,
                meta.preprocessing_digest,
                meta.tile_px,
                meta.tile_mpp,
                self._sample(file),
            )
            for row, file, meta in zip(self.rows, self._files, self.metas, strict=True)
        )
        return {
            "encoder": known(meta.encoder for meta in self.metas) or "",
            "encoder_digest": known(meta.encoder_digest for meta in self.metas) or "",
            "tile_px": known(meta.tile_px for meta in self.metas) or UNKNOWN_PX,
            "tile_mpp": None if not resolutions else [min(resolutions), max(resolutions)],
            "digest": hashlib.sha256(repr((self.n_features, slides)).encode()).hexdigest(),
        }

    def _sample(self, file: FeatureFile) -> str:
        """Digest of a file's first, middle and last features: those of converted files may be all that tells them."""
        if file.path not in self._samples:
            features = file.features()
            some = np.ascontiguousarray(features[[0, file.n_tiles // 2, file.n_tiles - 1]])
            self._samples[file.path] = hashlib.sha256(some.tobytes()).hexdigest()
        return self._samples[file.path]

    def select(self, slide_ids: Iterable[str]) -> "BagDataset":
        """Return the bags of some of the slides, in the order given; files are not opened and checked again.

        While a bag is in use, all selections give the same object, so that its file is open once.

        Raises:
            BagError: If no slide is asked for, or one that is not here.
        """
        position_of = {row.slide_id: position for position, row in enumerate(self.rows)}
        wanted = list(slide_ids)
        strange = [slide_id for slide_id in wanted if slide_id not in position_of]
        if strange or not wanted:
            found = repr(strange[0]) if strange else "none"
            raise BagError(f"a selection must be of slides of the data set, got {found} ({self.feature_dir}).")
        positions = [position_of[slide_id] for slide_id in wanted]
        chosen = copy(self)
        for name in ("rows", "labels", "_files", "metas", "n_tiles"):
            setattr(chosen, name, tuple(getattr(self, name)[position] for position in positions))
        chosen._held = None if self._held is None else [self._held[position] for position in positions]
        chosen._in_use = self._in_use
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_in_use"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._in_use = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Bag: ...
    @overload
    def __getitem__(self, index: slice) -> list[Bag]: ...
    def __getitem__(self, index: int | slice) -> Bag | list[Bag]:
        """Return one bag, or the bags of a slice."""
        if isinstance(index, slice):
            return [self._bag(position) for position in range(*index.indices(len(self)))]
        return self._bag(range(len(self))[index])  # raises IndexError, and counts from the end

    def __iter__(self) -> Iterator[Bag]:
        return (self._bag(position) for position in range(len(self)))

    def _bag(self, position: int) -> Bag:
        row, file = self.rows[position], self._files[position]
        bag = self._in_use.get(row.slide_id)
        if bag is None:
            features, coords = (file.features(), file.coords()) if self._held is None else self._held[position]
            bag = self._in_use[row.slide_id] = Bag(row.slide_id, features, coords, self.labels[position], row.case_id)
        return bag


def pack(bags: Sequence[Bag], *, device: torch.device | str, dtype: torch.dtype = torch.float32) -> PackedBags:
    """Put bags one after the other on a device, without padding.

    The features go to the device as they are stored (float16 is half the bytes) and take their type there.

    Args:
        bags: B bags of one feature size, all with a label or all without.
        device: Where the tensors go.
        dtype: Type of the features there.

    Returns:
        The features (ΣN, D), the offsets (B+1,) int64 and the labels (B,) int64, all on `device`.

    Raises:
        BagError: If there is no bag, feature sizes differ, or some bags have a label and some have none.
    """
    if not bags:
        raise BagError("a batch must have at least 1 bag, got none.")
    for bag in bags:
        if bag.features.shape[1] != bags[0].features.shape[1]:
            raise BagError(
                f"bags must have one feature size, got {bags[0].features.shape[1]} for {bags[0].slide_id!r} and "
                f"{bag.features.shape[1]} for {bag.slide_id!r}."
            )
    ends = np.cumsum([0, *(len(bag.features) for bag in bags)], dtype=np.int64)  # (B+1,)
    stored = np.concatenate([bag.features for bag in bags])  # (ΣN, D): a copy, as memory-mapped features are read-only
    return PackedBags(
        features=torch.from_numpy(stored).to(device).to(dtype),
        offsets=torch.from_numpy(ends).to(device),
        labels=_pack_labels(bags, device),
    )


def _pack_labels(bags: Sequence[Bag], device: torch.device | str) -> torch.Tensor | None:
    labels = [bag.label for bag in bags if bag.label is not None]
    if not labels:
        return None
    if len(labels) < len(bags):
        bare = next(bag.slide_id for bag in bags if bag.label is None)
        raise BagError(f"all bags of a batch must have a label, or none, {bare!r} has none.")
    return torch.tensor(labels, dtype=torch.int64, device=device)


def _label_index(row: CohortRow, classes: tuple[str, ...] | None) -> int | None:
    if classes is None or row.label is None:
        return None
    if row.label not in classes:
        raise BagError(
            f"label of slide {row.slide_id!r} must be one of {', '.join(map(repr, classes))}, got {row.label!r}. "
            "The classes are those of the training cohort: correct the label, or leave it empty."
        )
    return classes.index(row.label)


def _feature_paths(feature_dir: Path, slide_ids: Sequence[str]) -> list[Path]:
    """The file of each slide; all of them are there."""
    if not feature_dir.is_dir():
        raise BagError(f"features must be a folder of {SUFFIX} files, found none ({feature_dir}).")
    files = [path for path in feature_dir.iterdir() if path.name.endswith(SUFFIX)]
    found = {path.name.removesuffix(SUFFIX): path for path in files}
    found = {unicodedata.normalize("NFC", name): path for name, path in found.items()} | found  # as cohorts are read
    missing = [slide_id for slide_id in slide_ids if slide_id not in found]
    if missing:
        raise BagError(_describe_missing(feature_dir, missing, set(found), slide_ids))
    return [found[slide_id] for slide_id in slide_ids]


def _describe_missing(feature_dir: Path, missing: Sequence[str], found: set[str], slide_ids: Sequence[str]) -> str:
    named = ", ".join(map(repr, missing[:_MAX_NAMED]))
    more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    return (
        f"every slide must have a feature file <slide_id>{SUFFIX}, {len(missing)} of {len(slide_ids)} have none: "
        f"{named}{more} ({feature_dir}, which holds {len(found)}). "
        f"{_mend_missing(feature_dir, missing, found, found.difference(slide_ids))}"
    )


def _mend_missing(feature_dir: Path, missing: Sequence[str], found: set[str], not_asked_for: set[str]) -> str:
    suffixed = next((slide_id for slide_id in missing if PurePath(slide_id).stem in found), None)
    if suffixed is not None:
        return f"Write slide ids without the file ending: {PurePath(suffixed).stem!r}, not {suffixed!r}."
    if not found and any((feature_dir / "features").glob(f"*{SUFFIX}")):
        return f"Did you mean {feature_dir / 'features'}?"
    if not found and any(path.suffix in (".pt", ".npz") for path in feature_dir.iterdir()):
        return "It holds files of another tool: 'acmil features convert' makes them usable."
    for slide_id in missing[:_MAX_NAMED]:
        if near := difflib.get_close_matches(slide_id, not_asked_for, n=1, cutoff=0.75):
            return f"Is {slide_id!r} the slide whose features are {near[0] + SUFFIX!r}? Correct the id."
    return "Preprocess these slides, or drop them from the cohort."


def _check_compatible(rows: Sequence[CohortRow], files: Sequence[FeatureFile]) -> None:
    """All slides have one feature size, encoder, tile size and resolution."""
    _check_same("n_features", [file.n_features for file in files], rows)
    _check_same("encoder", [file.meta.encoder for file in files], rows)
    _check_same("encoder_digest", [file.meta.encoder_digest for file in files], rows)
    _check_same("tile_px", [file.meta.tile_px for file in files], rows)
    strange = [
        (row.slide_id, file.meta.slide_id)
        for row, file in zip(rows, files, strict=True)
        if file.meta.slide_id not in ("", row.slide_id)
    ]
    if strange:
        logger.warning(
            "%d feature files say that they are of another slide, the first is %s%s, of '%s'",
            len(strange),
            strange[0][0],
            SUFFIX,
            strange[0][1],
        )


def _check_resolutions(rows: Sequence[CohortRow], metas: Sequence[FeatureMeta], tolerance: float) -> None:
    """All slides have about one resolution; tiles cut by nominal magnification differ by scanner."""
    pairs = [(meta.tile_mpp, row.slide_id) for row, meta in zip(rows, metas, strict=True)]
    known = [pair for pair in pairs if pair[0] > 0]  # converted files may not know it
    if not known:
        return
    (finest, fine_slide), (coarsest, coarse_slide) = min(known), max(known)
    difference = coarsest / finest - 1
    found = f"{finest:.4g} µm/px for {fine_slide!r} and {coarsest:.4g} µm/px for {coarse_slide!r}"
    if difference > tolerance:
        raise BagError(
            f"all slides must have one tile_mpp within {tolerance:.2g} of each other (mpp_tolerance), got {found}: "
            f"{difference:.2g}. Preprocess them with the same tile_mpp, or allow as much."
        )
    if difference > MPP_TOLERANCE:
        logger.warning("The slides' tiles are not of one resolution: %s. Going on, as asked.", found)


def _check_same(name: str, values: Iterable[str | int], rows: Sequence[CohortRow]) -> None:
    """One value for all slides; one that is not known, as in converted files, agrees with any."""
    first: tuple[str | int, str] | None = None
    for value, row in zip(values, rows, strict=True):
        if value in ("", UNKNOWN_PX):
            continue
        first = first or (value, row.slide_id)
        if value != first[0]:
            raise BagError(
                f"all slides must have the same {name}, got {first[0]!r} for {first[1]!r} and {value!r} for "
                f"{row.slide_id!r}. Use features of one preprocessing."
            )
