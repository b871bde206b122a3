"""Gated attention pooling: the scores and the pool, one after the other."""

from torch import Tensor

from acmil.kernels.branch_pool import PooledAttention, masked_attention_pool
from acmil.kernels.gated_scores import gated_attention_scores


def gated_attention_pool(
    features: Tensor,
    reduction_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
) -> PooledAttention:
    """Pool bags of raw features by gated attention: `gated_attention_scores`, then `masked_attention_pool`.

    Args:
        features: `X`, (ΣN, D).
        reduction_weight: `W1`, (L, D).
        v_weight: `V`, (A, L).
        v_bias: `bV`, (A,).
        u_weight: `U`, (A, L).
        u_bias: `bU`, (A,).
        score_weight: `w`, (K, A).
        score_bias: `b`, (K,).
        offsets: (B+1,) int64, or None for one bag.
        keep: (K, ΣN) bool, True for what takes part, or None for all.

    Returns:
        Bag features (B, K, L), the attention (K, ΣN) and the branches' Gram matrices (B, K, K).

    Raises:
        ValueError: If shapes or dtypes disagree, or the offsets do not cut ΣN rows into bags of at least one.
    """
    hidden, scores = gated_attention_scores(
        features, reduction_weight, v_weight, v_bias, u_weight, u_bias, score_weight, score_bias
    )
    return masked_attention_pool(hidden, scores, offsets, keep)
