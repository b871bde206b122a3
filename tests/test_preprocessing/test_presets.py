"""The presets in configs/preprocess hold what the registry of encoders recommends, and cannot drift from it."""

import re
from pathlib import Path

import pytest
import yaml

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.registry import encoder_facts, list_encoders, tile_advice

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "preprocess"
PRESETS = sorted(FOLDER.glob("*.yaml"))
RECOMMENDED = {facts.name for facts in list_encoders() if facts.is_built_here and facts.tile_mpp is not None}
NATURAL = {"demo", "resnet50"}  # trained on photographs: nobody recommends a resolution


def options(preset: Path) -> dict:
    return yaml.safe_load(preset.read_text(encoding="utf-8"))


def test_each_pathology_encoder_that_is_built_here_has_one():
    assert {preset.stem for preset in PRESETS} == RECOMMENDED | NATURAL


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_what_the_registry_recommends(preset):
    given = options(preset)
    facts = encoder_facts(given["encoder"])
    assert facts.is_built_here
    assert given["encoder"] == facts.name  # not an alias
    config = PreprocessConfig(slides=["slides"], out="job", **given)
    assert tile_advice(facts, tile_px=config.tile_px, tile_mpp=config.tile_mpp) == []
    if preset.stem in NATURAL:
        return
    assert (preset.stem, config.tile_px, config.tile_mpp) == (facts.name, facts.tile_px, facts.tile_mpp)
    assert set(given) == {"encoder", "tile_px", "tile_mpp"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_where_it_is_from_and_at_what_magnification(preset):
    text, given = preset.read_text(encoding="utf-8"), options(preset)
    facts = encoder_facts(given["encoder"])
    if preset.stem != "demo":
        assert facts.source in text.splitlines()[0]
    (nominal,) = re.findall(r"tile_mpp: .*about (\d+)x", text)
    assert int(nominal) * given["tile_mpp"] == 10  # 10 µm/px at 1x, roughly, on every scanner


def test_the_usual_pairs():
    pairs = {preset.stem: (options(preset)["tile_px"], options(preset)["tile_mpp"]) for preset in PRESETS}
    assert pairs["uni"] == pairs["uni2_h"] == pairs["gigapath"] == (256, 0.5)
    assert pairs["virchow2"] == pairs["h_optimus_1"] == pairs["phikon_v2"] == (224, 0.5)
    assert pairs["gpfm"] == (512, 0.25)
    assert pairs["retccl"] == (256, 1.0)
