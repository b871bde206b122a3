"""The precision that training computes in, chosen once for the trainer and for what is said of a machine."""

from typing import Literal, NamedTuple, get_args

import torch

from acmil.preprocessing.devices import cpu_multiplies_bf16

Precision = Literal["fp32", "bf16"]


class PrecisionChoice(NamedTuple):
    """How training computes, and why."""

    precision: Precision
    reason: str


def choose_precision(precision: str, device: torch.device) -> PrecisionChoice:
    """Choose what `auto` stands for on a device; the other names are checked and kept.

    `bf16` rounds the operands of the products over instances to bf16 and adds up in float32. Weights, softmax, losses,
    heads and optimizer stay in float32.

    Args:
        precision: `auto`, `fp32` or `bf16`. `auto` takes bf16 where the device multiplies it itself: elsewhere it would
            be emulated, and slower than float32.
        device: Where training computes.

    Raises:
        ValueError: If the name is none of these.
    """
    if precision in get_args(Precision):
        return PrecisionChoice(precision, "as asked")  # type: ignore[arg-type]
    if precision != "auto":
        raise ValueError(f"precision must be auto, {' or '.join(get_args(Precision))}, got {precision!r}.")
    what = "GPU" if device.type == "cuda" else "CPU"
    if _multiplies_bf16(device):
        return PrecisionChoice("bf16", f"the {what} multiplies bf16 itself")
    return PrecisionChoice("fp32", f"the {what} does not multiply bf16 itself")


def as_computed(features: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Features as a model must get them to compute in a precision: for `fp32` as stored, the model converts them."""
    if precision == "fp32":
        return features
    if features.device.type == "cpu":
        features = features.float()  # exact, and vectorised by torch, as the way from float16 to bf16 is not
    return features.to(torch.bfloat16)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bf16()
