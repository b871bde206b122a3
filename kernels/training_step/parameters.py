"""The parameters of ACMIL with gated attention, and their places in one flat buffer."""

from typing import NamedTuple

import torch
from torch import Tensor


class GatedParameters(NamedTuple):
    """Parameters in the order in which they lie in a flat buffer; matrices first, which begin at multiples of 16."""

    reduction_weight: Tensor  # W1 (L, D)
    v_weight: Tensor  # V (A, L)
    u_weight: Tensor  # U (A, L)
    branch_head_weight: Tensor  # Wc (K, C, L)
    bag_head_weight: Tensor  # Ws (C, L)
    v_bias: Tensor  # bV (A,)
    u_bias: Tensor  # bU (A,)
    score_weight: Tensor  # w (K, A)
    score_bias: Tensor  # b (K,)
    branch_head_bias: Tensor  # bc (K, C)
    bag_head_bias: Tensor  # bs (C,)


class Sizes(NamedTuple):
    """The letters of the shapes."""

    features: int  # D
    hidden: int  # L
    gate: int  # A
    branches: int  # K
    classes: int  # C

    @property
    def n_large(self) -> int:
        """Numbers in the matrices: W1, V, U and the heads' weights."""
        return self.hidden * (self.features + 2 * self.gate + self.n_logits)

    @property
    def n_small(self) -> int:
        """Numbers in bV, bU, w and b."""
        return 2 * self.gate + self.branches * (self.gate + 1)

    @property
    def n_logits(self) -> int:
        """Logits of all branches and of the bag: rows of the heads' weights, and numbers in their biases."""
        return (self.branches + 1) * self.classes

    @property
    def n_all(self) -> int:
        """Numbers in all parameters."""
        return self.n_large + self.n_small + self.n_logits

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter, in the order of `GatedParameters`."""
        d, l, a, k, c = self  # noqa: E741
        return (l, d), (a, l), (a, l), (k, c, l), (c, l), (a,), (a,), (k, a), (k,), (k, c), (c,)


def sizes_of(parameters: GatedParameters) -> Sizes:
    """Read D, L, A, K and C off the parameters.

    Raises:
        ValueError: If a shape disagrees with the others.
    """
    n_hidden, n_features = parameters.reduction_weight.shape
    n_branches, n_gate = parameters.score_weight.shape
    sizes = Sizes(n_features, n_hidden, n_gate, n_branches, parameters.bag_head_bias.shape[0])
    for name, tensor, shape in zip(GatedParameters._fields, parameters, sizes.shapes(), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")
    return sizes


def views_of(flat: Tensor, sizes: Sizes) -> GatedParameters:
    """Views of a flat buffer, one a parameter."""
    shapes = sizes.shapes()
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return GatedParameters(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
