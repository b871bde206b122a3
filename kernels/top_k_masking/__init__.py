"""Stochastic top-k instance masking (STKIM): some of the most attended instances are left out while training."""

import torch
from torch import Tensor

from acmil.kernels.checks import check_shape, count_bags
from acmil.kernels.launch import MAX_TOP_K, takes_fused_path
from acmil.kernels.top_k_masking import reference
from acmil.kernels.top_k_masking.counts import n_masked

__all__ = ["n_masked", "stochastic_top_k_mask"]


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
    At least one instance of a bag always stays. On a GPU one kernel does it all where `top_k` <= 256; the offsets are
    then not read, and the draw is another one than the reference's, of the same distribution.

    Args:
        scores: (R, ΣN), one row a branch (or a branch and head).
        top_k: Size of the pool that is drawn from, `n` in the paper.
        ratio: Share of the pool to mask, `p` in the paper, in [0, 1].
        generator: Source of randomness, on the device of `scores`; None draws from torch's global one.
        offsets: (B+1,) int64, or None for one bag.

    Returns:
        keep, (R, ΣN) bool: False for what is masked.

    Raises:
        ValueError: If an option is out of range, or the offsets do not cut the instances into bags.

    Reference:
        Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image
        Classification", ECCV 2024.
    """
    if top_k < 0 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"masking needs top_k >= 0 and ratio in [0, 1], got top_k={top_k}, ratio={ratio}.")
    check_shape("scores", scores, (None, None))
    count_bags(offsets, scores.shape[1])
    if 0 < top_k <= MAX_TOP_K and takes_fused_path(scores):
        from acmil.kernels.top_k_masking import fused  # triton comes with torch only where there can be a GPU

        return fused.stochastic_top_k_mask(scores, top_k=top_k, ratio=ratio, generator=generator, offsets=offsets)
    return reference.stochastic_top_k_mask(scores, top_k=top_k, ratio=ratio, generator=generator, offsets=offsets)
