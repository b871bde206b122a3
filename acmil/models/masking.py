"""Stochastic top-k instance masking (STKIM): some of the most attended instances are left out while training."""

import math

import torch
from torch import Tensor

from acmil.kernels import bag_lengths


def stochastic_top_k_mask(
    scores: Tensor,
    *,
    top_k: int,
    ratio: float,
    generator: torch.Generator | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Choose at random which of the highest-scored instances to mask, each row and each bag on its own.

    Of a bag's `min(top_k, N)` highest scores, `floor(min(top_k, N) · ratio)` are chosen uniformly without replacement.
    At least one instance of a bag always stays.

    Args:
        scores: (R, ΣN), one row a branch (or a branch and head).
        top_k: Size of the pool that is drawn from, `n` in the paper.
        ratio: Share of the pool to mask, `p` in the paper, in [0, 1].
        generator: Source of randomness, on the device of `scores`; None draws from torch's global one.
        offsets: (B+1,) int64, or None for one bag.

    Returns:
        keep, (R, ΣN) bool: False for what is masked.

    Reference:
        Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image
        Classification", ECCV 2024.
    """
    if top_k < 0 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"masking needs top_k >= 0 and ratio in [0, 1], got top_k={top_k}, ratio={ratio}.")
    bags = scores.detach().split(bag_lengths(offsets, scores.shape[-1]), dim=-1)
    keeps = [_mask_one_bag(bag, top_k, ratio, generator) for bag in bags]
    return keeps[0] if len(keeps) == 1 else torch.cat(keeps, dim=-1)


def n_masked(n_instances: int, top_k: int, ratio: float) -> int:
    """How many instances of a bag are masked: `floor(min(top_k, N) · ratio)`, never all of them.

    Examples:
        >>> n_masked(500, 10, 0.6), n_masked(4, 10, 0.6), n_masked(1, 10, 1.0), n_masked(500, 100, 0.29)
        (6, 2, 0, 29)
    """
    pool = min(top_k, n_instances)
    # 100 · 0.29 is 28.999999999999996 in floating point: what is a whole number on paper must not lose one.
    return min(math.floor(pool * ratio + 1e-9), n_instances - 1)


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
