"""Weights and training state on disk: written whole or not at all, read without running anyone's code."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acmil.preprocessing.atomic import replacing

if TYPE_CHECKING:
    from acmil.models import MILModel

_PLAIN = (bool, int, float, str, type(None))


class WeightsError(ValueError):
    """Weights or a training state that cannot be read, or do not fit the model."""


class UnreadableError(ValueError):
    """A file that torch cannot read without running code."""


def save_weights(path: Path | str, model: "nn.Module | MILModel") -> None:
    """Write a model's weights as safetensors, through a temporary file in the same folder.

    Args:
        path: File to write; one that exists is replaced.
        model: The model; its tensors are written with the dtype they have.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path | str, model: nn.Module) -> None:
    """Read weights written by `save_weights` into a model of the same architecture.

    Args:
        path: A safetensors file.
        model: The model to fill; it keeps its device and dtype.

    Raises:
        WeightsError: If the file is damaged, or a tensor is missing, unknown, or of another shape than the model's.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}). Copy or train it again.") from error
    check_weights(tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, path)
    model.load_state_dict(tensors)


def check_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse tensors whose names or shapes are not those expected.

    Args:
        tensors: What was read.
        expected: Shape by name.
        path: Where it was read from, for the message.

    Raises:
        WeightsError: Naming what is missing or unknown, or the first tensor of another shape, with both shapes.
    """
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"tensors of {path} must be those of the model: missing {missing or 'none'}, unknown {unknown or 'none'}. "
            "Build the model with the options it was trained with."
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(
                f"tensor '{name}' must have shape {shape}, got {tuple(tensors[name].shape)} ({path}). "
                "Build the model with the options it was trained with."
            )


def save_state(path: Path | str, state: Mapping[str, Any]) -> None:
    """Write a training state, through a temporary file in the same folder.

    Args:
        path: File to write; one that exists is replaced.
        state: Tensors, numbers, strings, booleans and None, in dicts, lists and tuples.

    Raises:
        TypeError: If the state holds anything else, which reading it back safely would refuse.
        OSError: If the file cannot be written.
    """
    _check_plain(state, "state")
    with replacing(Path(path)) as temporary:
        torch.save(dict(state), temporary)


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain values alone, on the CPU.

    Raises:
        UnreadableError: If the file is damaged, or holds anything else; the reason is its cause.
        OSError: If the file cannot be opened.
    """
    with path.open("rb") as file:
        content = io.BytesIO(file.read())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch stumbles over in bytes that are no such file
        raise UnreadableError(f"{error}") from error


def load_state(path: Path | str) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        WeightsError: If the file is damaged, or holds anything but plain values and tensors.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    try:
        state = load_plain(path)
    except UnreadableError as error:
        raise WeightsError(f"{path} is not a readable training state. Delete it to start the run afresh.") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path} must hold a dict, got {type(state).__name__}. Delete it to start the run afresh.")
    return state


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `weights_only=True` would not read back; numpy's numbers are among it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise TypeError(f"{where} must be a tensor or a plain value, got {type(value).__name__}.")
