"""Stochastic top-k masking in plain PyTorch: the specification of the operator, and its path on any device."""

import torch
from torch import Tensor

from acmil.kernels.checks import bag_lengths
from acmil.kernels.top_k_masking.counts import n_masked


def stochastic_top_k_mask(
    scores: Tensor, *, top_k: int, ratio: float, generator: torch.Generator | None, offsets: Tensor | None
) -> Tensor:
    """Keep mask (R, ΣN), bag by bag."""
    bags = scores.detach().split(bag_lengths(offsets, scores.shape[-1]), dim=-1)
    keeps = [_mask_one_bag(bag, top_k, ratio, generator) for bag in bags]
    return keeps[0] if len(keeps) == 1 else torch.cat(keeps, dim=-1)


def _mask_one_bag(scores: Tensor, top_k: int, ratio: float, generator: torch.Generator | None) -> Tensor:
    """Keep mask (R, N) of one bag."""
    n_instances = scores.shape[-1]
    keep = torch.ones_like(scores, dtype=torch.bool)
    n_drop = n_masked(n_instances, top_k, ratio)
    if n_drop == 0:
        return keep
    pool = scores.topk(min(top_k, n_instances), dim=-1).indices  # (R, n)
    # The positions of the largest of n independent uniforms are a uniform draw without replacement.
    draw = torch.rand(pool.shape, generator=generator, device=scores.device)
    dropped = pool.gather(-1, draw.topk(n_drop, dim=-1).indices)  # (R, floor(n·p))
    return keep.scatter_(-1, dropped, False)
