"""Checkpoints of the ACMIL reference implementation, read into this project's models."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acmil.checkpoint import UnreadableError, WeightsError, check_weights, load_plain
from acmil.models.acmil_gated import ACMILGated

_NAMES = {
    "dimreduction.fc1.weight": "reduction.weight",
    "attention.attention_V.0.weight": "gate_v.weight",
    "attention.attention_V.0.bias": "gate_v.bias",
    "attention.attention_U.0.weight": "gate_u.weight",
    "attention.attention_U.0.bias": "gate_u.bias",
    "attention.attention_weights.weight": "score.weight",
    "attention.attention_weights.bias": "score.bias",
    "Slide_classifier.fc.weight": "bag_head.weight",
    "Slide_classifier.fc.bias": "bag_head.bias",
}
_SIZES_FROM = ("dimreduction.fc1.weight", "attention.attention_weights.weight", "Slide_classifier.fc.weight")


def load_reference_checkpoint(path: Path | str) -> tuple[ACMILGated, dict[str, Any]]:
    """Read a checkpoint of the reference's gated model (`arch: ga`).

    The sizes are those of the tensors. Masking is no part of the weights and matters in training alone: the model gets
    this project's defaults.

    Args:
        path: The reference's file: a pickle `{"model": state dict, …}`, or a state dict alone. Only tensors and plain
            values are read from it.

    Returns:
        The model in evaluation mode, and its options: `create_model("acmil_ga", **options)` builds the same.

    Raises:
        WeightsError: If the file holds pickled objects, is damaged, or its tensors are not those of that model.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    for name in _SIZES_FROM:
        if name not in tensors or tensors[name].dim() != 2:
            raise WeightsError(
                f"{path} must hold a matrix '{name}', as the reference's gated model does; it holds {sorted(tensors)}."
            )
    reduction, score, bag_head = (tensors[name] for name in _SIZES_FROM)
    model = ACMILGated(
        in_features=reduction.shape[1],
        n_classes=bag_head.shape[0],
        n_branches=score.shape[0],
        hidden_features=reduction.shape[0],
        attention_features=score.shape[1],
    )
    check_weights(tensors, _expected_shapes(model), path)
    model.load_state_dict(_renamed(tensors, score.shape[0]))
    return model.eval(), model.options


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of the file."""
    try:
        content = load_plain(path)
    except UnreadableError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise WeightsError(_refusal(path, str(error))) from error
        raise WeightsError(f"{path} is not a readable PyTorch checkpoint ({error}). Copy it again.") from error
    weights = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise WeightsError(f"{path} must hold a dict of tensors, or one under 'model', got {type(weights).__name__}.")
    return dict(weights)


def _refusal(path: Path, reason: str) -> str:
    """Why a file that is more than tensors and plain values is not read, and the way round it."""
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    if found is None:
        return f"{path} is not a checkpoint of tensors and plain values, or is damaged. Copy it again."
    return (
        f"{path} holds pickled objects of '{found.group(1)}', which can run code when they are read, so it is refused. "
        "If you trust the file, take its weights out where it was made: "
        "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW_FILE)."
    )


def _expected_shapes(model: ACMILGated) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by the reference's name."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {theirs: ours[name] for theirs, name in _NAMES.items()}
    n_branches, n_classes, n_hidden = ours["branch_head.weight"]
    for branch in range(n_branches):
        expected[f"classifier.{branch}.fc.weight"] = (n_classes, n_hidden)
        expected[f"classifier.{branch}.fc.bias"] = (n_classes,)
    return expected


def _renamed(tensors: Mapping[str, Tensor], n_branches: int) -> dict[str, Tensor]:
    """The reference's tensors by our names, the branches' heads stacked."""
    renamed = {name: tensors[theirs] for theirs, name in _NAMES.items()}
    for part in ("weight", "bias"):
        heads = [tensors[f"classifier.{branch}.fc.{part}"] for branch in range(n_branches)]
        renamed[f"branch_head.{part}"] = torch.stack(heads)
    return renamed
