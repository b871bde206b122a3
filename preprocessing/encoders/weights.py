"""Reading weights from a file into a model: every name and shape is checked, and pickled code is never run."""

import hashlib
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from acmil.preprocessing.encoders.facts import EncoderError
from acmil.preprocessing.encoders.weight_names import timm_names

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".torch")
# Training scripts wrap the model's weights in a dictionary under one of these names.
_WRAPPERS = ("state_dict", "model", "teacher")
_PREFIXES = ("module.", "_orig_mod.")
_BACKBONE_PREFIX = "backbone."
# What the two readers raise on files that are cut, of another kind, or hold more than tensors.
_READ_ERRORS = (
    *(pickle.UnpicklingError, SafetensorError, OSError, RuntimeError, EOFError, ValueError),
    *(LookupError, TypeError, AttributeError, struct.error),
)
_EFFICIENTNET_PYTORCH_MARK = "_conv_stem.weight"
_EFFICIENTNET_PYTORCH_CLASSIFIER = ("_fc.weight", "_fc.bias")


def load_weights(model: nn.Module, path: Path, *, classifiers: Sequence[str] = ()) -> None:
    """Load the weights of a file into a model.

    Args:
        model: The model without its classifier.
        path: A `.safetensors` file, or a `.pth`, `.pt`, `.bin` or `.torch` file of tensors alone (read with
            `weights_only=True`): a state dict, or a dictionary that holds one as `state_dict`, `model` or `teacher`.
            A vision transformer's may have the names of timm, of the package transformers or of DINOv2.
        classifiers: Names of the model's classifier layers: their weights in the file are left out.

    Raises:
        EncoderError: If the file cannot be read, or a tensor is missing, unknown, or of another shape.
    """
    weights = read_weights(path)
    if _EFFICIENTNET_PYTORCH_MARK in weights:
        weights = _from_efficientnet_pytorch(weights, model.state_dict(), path)
    else:
        heads = tuple(f"{name}." for name in classifiers)
        weights = timm_names(weights)
        weights = {name: tensor for name, tensor in weights.items() if not (heads and name.startswith(heads))}
    _check_names_and_shapes(weights, model.state_dict(), path)
    model.load_state_dict(weights, strict=True)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the named tensors of a weights file, without wrappers and prefixes that training scripts add."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise EncoderError(f"weights must be a file ending in {', '.join(SUFFIXES)}, got {path.name!r} ({path}).")
    if not path.is_file():
        raise EncoderError(f"weights file must exist, found none ({path}).")
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise EncoderError(
            f"weights file must hold tensors alone and be whole, got: {reason} ({path}). "
            "A file with other Python objects is not read, as that can run any code: save the state dict by itself."
        ) from error
    return _without_prefixes(_unwrapped(stored, path))


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 (hex) of a model's tensors in name order: name, type, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unwrapped(stored: object, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(stored, Mapping):
        inner = next((stored[name] for name in _WRAPPERS if isinstance(stored.get(name), Mapping)), None)
        if inner is None:
            break
        stored = inner
    if not isinstance(stored, Mapping) or not stored:
        raise EncoderError(f"weights file must hold a dictionary of tensors, got {type(stored).__name__} ({path}).")
    for name, value in stored.items():
        if not isinstance(value, torch.Tensor):
            raise EncoderError(
                f"weights file must hold tensors, got {type(value).__name__} under {name!r} ({path}). "
                f"A dictionary that wraps the weights names them one of: {', '.join(_WRAPPERS)}."
            )
    return dict(stored)


def _without_prefixes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    backbone = {name: tensor for name, tensor in weights.items() if name.startswith(_BACKBONE_PREFIX)}
    if backbone:  # a self-supervised teacher: beside its backbone lies a projection head, which is not for features
        return {name.removeprefix(_BACKBONE_PREFIX): tensor for name, tensor in backbone.items()}
    return weights


def _from_efficientnet_pytorch(
    weights: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Rename EfficientNet-PyTorch's tensors to timm's: both list the same layers in the same order."""
    kept = {name: tensor for name, tensor in weights.items() if name not in _EFFICIENTNET_PYTORCH_CLASSIFIER}
    # The last part (weight, bias, running_mean …) has one meaning in both: it would differ if the order did.
    is_in_order = [name.rpartition(".")[2] for name in kept] == [name.rpartition(".")[2] for name in expected]
    if not is_in_order:
        raise EncoderError(
            f"weights with EfficientNet-PyTorch's names must hold the layers of the chosen EfficientNet in order, got "
            f"{len(kept)} tensors without the classifier for a model of {len(expected)} ({path}). "
            "Choose the timm name of the same network, such as tf_efficientnet_lite0."
        )
    return dict(zip(expected, kept.values(), strict=True))


def _check_names_and_shapes(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path
) -> None:
    for name, tensor in expected.items():
        if name not in weights:
            raise EncoderError(
                f"tensor {name!r} must have shape {tuple(tensor.shape)}, found none in the weights file ({path}). "
                "Are these the weights of another model?"
            )
        if weights[name].shape != tensor.shape:
            raise EncoderError(
                f"tensor {name!r} must have shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)} ({path}). "
                "Are these the weights of another model?"
            )
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise EncoderError(
            f"weights file must hold the model's tensors and no others, got {len(unknown)} more, first {unknown[0]!r} "
            f"({path}). Are these the weights of another model?"
        )
