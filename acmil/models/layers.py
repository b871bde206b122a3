"""Layers with one set of weights a branch, computed for all branches at once."""

import math

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """K linear maps side by side: `y_k = W_k x_k + b_k`, each initialised as `torch.nn.Linear` initialises its own.

    Args:
        n_stacks: K.
        in_features: Size of each `x_k`.
        out_features: Size of each `y_k`.
    """

    def __init__(self, n_stacks: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_stacks, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_stacks, out_features))
        bound = 1.0 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K, in) to (…, K, out)."""
        batch = x.reshape(-1, *self.weight.shape[::2]).transpose(0, 1)  # (K, …, in)
        mapped = torch.baddbmm(self.bias[:, None], batch, self.weight.mT)  # (K, …, out)
        return mapped.transpose(0, 1).reshape(*x.shape[:-1], -1)


def sampled_dropout(x: Tensor, *, p: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout that draws from a generator, which `torch.nn.functional.dropout` cannot."""
    if p == 0.0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep / (1.0 - p)


def check_options(**options: int) -> None:
    """Refuse sizes that are not whole numbers of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")


def check_masking(mask_top_k: int, mask_ratio: float) -> None:
    """Refuse a pool size below 0 or a share outside [0, 1]."""
    if not isinstance(mask_top_k, int) or isinstance(mask_top_k, bool) or mask_top_k < 0:
        raise ValueError(f"mask_top_k must be a whole number >= 0 (0 masks nothing), got {mask_top_k!r}.")
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask_ratio must be in [0, 1], got {mask_ratio!r}. The paper uses 0.6.")


def prepare_features(features: Tensor, weight: Tensor) -> Tensor:
    """Check instance features (ΣN, D) against the first weight (L, D), and bring them to the type of the products.

    bf16 stays: that is how a caller asks for products in bf16. Any other type, as features are stored, becomes that of
    the weights.
    """
    n_features = weight.shape[1]
    if features.dim() != 2 or features.shape[1] != n_features or features.shape[0] < 1:
        raise ValueError(
            f"features must have shape (N, {n_features}) with N >= 1, got {tuple(features.shape)}. "
            "Use features of the encoder that the model was made for."
        )
    if not features.is_floating_point():
        raise ValueError(f"features must be floating point, got {features.dtype}.")
    return features if features.dtype == torch.bfloat16 else features.to(weight.dtype)


def rows_of_bags(features: Tensor, offsets: Tensor | None) -> int:
    """ΣN; on a CPU padding may follow, since products of bf16 want few sizes there. A GPU's offsets stay unread."""
    return len(features) if offsets is None or features.device.type != "cpu" else int(offsets[-1])


def offsets_of_one_bag(features: Tensor) -> Tensor:
    """The offsets [0, N], made on the device without copying from the host."""
    n_instances = features.shape[0]
    return torch.arange(0, n_instances + 1, n_instances, device=features.device)
