"""Weights and state on disk: round trips, refusals, and files that are whole or not there."""

import argparse

import numpy as np
import pytest
import torch

from acmil.checkpoint import WeightsError, load_state, load_weights, save_state, save_weights
from acmil.models import create_model, load_reference_checkpoint


def build(**options):
    return create_model("acmil_ga", **{"in_features": 12, "n_classes": 2, "n_branches": 3} | options)


def test_weights_round_trip_bit_for_bit(tmp_path):
    model, other = build(), build()
    save_weights(tmp_path / "model.safetensors", model)
    load_weights(tmp_path / "model.safetensors", other)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_of_another_shape_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, build())
    with pytest.raises(WeightsError) as error:
        load_weights(path, build(in_features=10, hidden_features=6))
    assert "'reduction.weight' must have shape (6, 10), got (6, 12)" in str(error.value)
    assert str(path) in str(error.value)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, create_model("acmil_mha", in_features=12, n_classes=2))
    with pytest.raises(WeightsError, match=r"missing \['gate_u.bias'.*unknown \['bag_norm.bias'"):
        load_weights(path, build())


def test_a_damaged_weights_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, build())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(path, build())


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.safetensors", build())
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.pt")


def test_state_round_trip(tmp_path):
    state = {"a": torch.arange(3), "b": {"c": [1, 2.5, "x", None, True]}, "d": (0.9, 0.999), 0: torch.ones(1)}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["a"], state["a"])
    assert (loaded["b"], loaded["d"]) == (state["b"], state["d"])


@pytest.mark.parametrize("value", [np.float64(1.0), argparse.Namespace(), {1, 2}])
def test_a_state_that_could_not_be_read_back_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] must be a tensor or a plain value"):
        save_state(tmp_path / "state.pt", {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_a_state_with_objects_or_damage_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"a": argparse.Namespace()}, path)
    with pytest.raises(WeightsError, match="not a readable training state"):
        load_state(path)
    save_state(path, {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(WeightsError, match="not a readable training state"):
        load_state(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, {"a": 1})

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"a": 2})
    assert load_state(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("content", [b"", b"junk text", bytes(range(256)) * 4, b"half"])
def test_whatever_is_no_state_is_one_error(tmp_path, content):
    path = tmp_path / "state.pt"
    save_state(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == b"half" else content)
    with pytest.raises(WeightsError, match=r"state\.pt is not a readable training state"):
        load_state(path)
    with pytest.raises(WeightsError, match=r"state\.pt.*Copy it again"):
        load_reference_checkpoint(path)
