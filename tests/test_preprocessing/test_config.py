"""Options of preprocessing: defaults, ranges, and no heavy imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from acmil.preprocessing.config import PreprocessConfig

GIVEN = {"slides": ["slides"], "out": "job", "encoder": "resnet18"}
PRESETS = Path(__file__).resolve().parents[2] / "configs" / "preprocess"


def test_defaults():
    config = PreprocessConfig(**GIVEN)
    assert config.model_dump(exclude={"slides", "out", "encoder"}) == {
        "weights": None,
        "tile_px": 256,
        "tile_mpp": 0.5,
        "overlap_px": 0,
        "min_tissue": 0.25,
        "mpp_override": None,
        "tissue_mpp": 8.0,
        "tissue": "brightfield",
        "remove_ink": True,
        "tissue_from": None,
        "reader": "auto",
        "workers": None,
        "batch_size": 64,
        "compile": False,
        "device": "auto",
        "precision": "auto",
        "feature_dtype": "float16",
        "min_focus": None,
        "max_pen": None,
        "max_fold": None,
        "max_blood": None,
        "max_dark": None,
        "min_stain": None,
        "previews": True,
        "save_tiles": "none",
        "tile_format": "jpeg",
        "stain_normalisation": "none",
    }
    assert config.slides == [Path("slides")]


def test_every_option_is_described():
    assert [name for name, field in PreprocessConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("slides", []),
        ("encoder", ""),
        ("tile_px", 0),
        ("tile_mpp", -0.5),
        ("tile_mpp", 352.8),
        ("overlap_px", 256),
        ("min_tissue", 1.5),
        ("mpp_override", 0.0),
        ("workers", 0),
        ("batch_size", 0),
        ("device", "gpu"),
        ("precision", "fp8"),
        ("feature_dtype", "float64"),
        ("tile_size", 256),
        ("min_focus", -0.1),
        ("max_pen", 1.5),
        ("max_fold", -0.1),
        ("min_stain", -1.0),
    ],
)
def test_what_makes_no_sense_is_refused(option, value):
    with pytest.raises(ValidationError):
        PreprocessConfig(**GIVEN | {option: value})


def test_limits_of_quality_are_those_given_and_of_brightfield():
    assert PreprocessConfig(**GIVEN).quality_limits == {}
    given = {"min_focus": 0.3, "max_dark": 0.0}
    assert PreprocessConfig(**GIVEN | given).quality_limits == given
    assert PreprocessConfig(**GIVEN, tissue="dark").quality_limits == {}
    with pytest.raises(ValidationError, match="min_focus must not be given with tissue dark"):
        PreprocessConfig(**GIVEN | given, tissue="dark")


def test_options_do_not_change_afterwards():
    with pytest.raises(ValidationError):
        PreprocessConfig(**GIVEN).tile_px = 512


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.name)
def test_presets_are_valid(preset):
    options = yaml.safe_load(preset.read_text(encoding="utf-8"))
    assert PreprocessConfig(**{"slides": ["slides"], "out": "job", **options}).encoder == options["encoder"]


def test_importing_the_options_imports_no_torch():
    heavy = {"torch", "timm", "openslide", "cv2"}
    code = f"import sys, acmil.preprocessing.config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
