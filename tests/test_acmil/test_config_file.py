"""Options: file under flags, unknown keys, values out of range, presets."""

from pathlib import Path

import pytest

from acmil.config import TrainConfig
from acmil.config_file import ConfigError, find_config_file, list_presets, load_config
from acmil.preprocessing.config import PreprocessConfig

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = {"cohort": "c.csv", "features": "f", "out": "o"}


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("epochs: 7\nlearning_rate: 0.5\n")
    config = load_config(TrainConfig, file, **REQUIRED, epochs=9)
    assert (config.epochs, config.learning_rate, config.weight_decay) == (9, 0.5, 1e-5)


def test_misspelt_key_names_file_and_nearest_key(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("learning_rat: 0.5\n")
    with pytest.raises(
        ConfigError, match=r"unknown option 'learning_rat' in .*options.yaml\. Did you mean 'learning_rate'\?"
    ):
        load_config(TrainConfig, file, **REQUIRED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 0\n", r"epochs should be greater than or equal to 1, got 0 \(.*options.yaml\)"),
        ("epochs: many\n", r"epochs should be a valid integer.*got 'many'"),
        ("- epochs\n", r"options.yaml must hold one mapping"),
        ("epochs: [\n", r"options.yaml is not valid YAML"),
        ("device: tpu\n", r"device .*got 'tpu'"),
        ("n_heads: 3\n", r"^n_heads is an option of acmil_mha and does nothing for acmil_ga, got 3 \(.*yaml\)\.$"),
        ("model: acmil_mha\nattention_features: 7\n", r"^attention_features is an option of acmil_ga"),
        ("epochs: 3\nwarmup_epochs: 3\n", r"^warmup_epochs must be less than epochs 3, got 3 \(.*options.yaml\)\.$"),
        (
            "min_learning_rate: 0.001\n",
            r"^min_learning_rate must not be above learning_rate 0.0001, got 0.001 \(.*options.yaml\)\.$",
        ),
    ],
)
def test_values_that_are_not_allowed(tmp_path, text, message):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, file, **REQUIRED)


def test_an_option_may_be_called_as_a_parameter_of_the_loader():
    assert load_config(TrainConfig, None, **REQUIRED, model="acmil_mha").model == "acmil_mha"


def test_missing_option_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"features is missing\. Give --features, or set 'features:'"):
        load_config(TrainConfig, cohort="c.csv", out="o")


def test_every_preset_loads():
    encoders = sorted(path.name for path in (REPOSITORY / "configs" / "preprocess").iterdir())
    assert {"demo.yaml", "gigapath.yaml", "resnet50.yaml", "uni2_h.yaml", "virchow2.yaml"} < set(encoders)
    assert list_presets() == [
        *(f"preprocess/{name}" for name in encoders),
        *("train/abmil.yaml", "train/acmil_ga.yaml", "train/acmil_mha.yaml", "train/demo.yaml"),
    ]
    for name in list_presets():
        model, options = (
            (TrainConfig, REQUIRED) if name.startswith("train/") else (PreprocessConfig, {"slides": ["s"], "out": "o"})
        )
        load_config(model, name, **options)


def test_presets_say_what_their_names_promise():
    abmil = load_config(TrainConfig, "train/abmil.yaml", **REQUIRED)
    assert (abmil.model, abmil.n_branches, abmil.mask_top_k) == ("acmil_ga", 1, 0)
    reference = load_config(TrainConfig, "train/acmil_ga.yaml", **REQUIRED)
    assert reference == TrainConfig(**REQUIRED), "the reference's recipe is the default"
    assert load_config(TrainConfig, "train/acmil_mha.yaml", **REQUIRED) == reference.model_copy(
        update={"model": "acmil_mha"}
    )
    demo = load_config(PreprocessConfig, "preprocess/demo.yaml", slides=["s"], out="o")
    assert (demo.encoder, demo.tile_px, demo.tile_mpp) == ("tf_efficientnet_lite0", 224, 0.5)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ConfigError, match=r"no configuration file .*nothing.yaml.*train/abmil.yaml"):
        find_config_file("nothing.yaml")
    assert find_config_file("configs/train/abmil.yaml").is_file()
