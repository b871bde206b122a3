"""Masked softmax pooling of packed bags by several branches of attention."""

from typing import NamedTuple

import torch
from torch import Tensor

from acmil.kernels.branch_pool import reference
from acmil.kernels.checks import check_shape, count_bags
from acmil.kernels.launch import takes_fused_path

__all__ = ["PooledAttention", "masked_attention_pool"]


class PooledAttention(NamedTuple):
    """Bag features, the attention that made them, and how much the branches' attention overlaps."""

    pooled: Tensor  # (B, K, L)
    attention: Tensor  # (K, ΣN), each bag's row sums to 1
    gram: Tensor  # (B, K, K), P_k · P_j of each bag


def masked_attention_pool(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None = None, keep: Tensor | None = None
) -> PooledAttention:
    """Average each bag's instances by the softmax of their scores, once a branch.

    `P = softmax(S)` over the bag's kept instances, `z = P H`, `G = P Pᵀ`. An instance that is not kept has attention
    exactly 0 and passes no gradient. A row that keeps no instance of a bag gets zeros, never NaN; sampling a mask that
    leaves something to attend to is the caller's part. On a GPU the fused kernels run where L is a multiple of 16,
    K <= 16 and the type is float32, bfloat16 or float16; they leave the offsets on the device, and trust them.

    Args:
        hidden: `H`, (ΣN, L), floating point.
        scores: `S`, (K, ΣN).
        offsets: (B+1,) int64: bag b is the rows `offsets[b]` to `offsets[b + 1]`. None: all rows are one bag.
        keep: (K, ΣN) bool, True for what takes part. None: all.

    Returns:
        Bag features `z`, (B, K, L), in the type of `hidden`; attention `P`, (K, ΣN), and Gram matrices `G`, (B, K, K),
        float32 or finer. The cosine similarity of two branches' attention is `G_kj / sqrt(G_kk G_jj)`.

    Raises:
        ValueError: If shapes or dtypes disagree, or (where they are read) the offsets do not cut ΣN rows into bags of
            at least one.
    """
    n_instances = hidden.shape[0]
    check_shape("hidden", hidden, (None, None))
    check_shape("scores", scores, (None, n_instances))
    if keep is not None:
        check_shape("keep", keep, tuple(scores.shape))
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must be a bool tensor, got {keep.dtype}. Compare it with 0 first.")
    count_bags(offsets, n_instances)
    if takes_fused_path(hidden, multiples_of_16=(hidden.shape[1],), n_branches=scores.shape[0]):
        from acmil.kernels.branch_pool import fused  # triton comes with torch only where there can be a GPU

        pooled, attention, gram = fused.masked_attention_pool(hidden, scores, offsets, keep)
    else:
        pooled, attention, gram = reference.masked_attention_pool(hidden, scores, offsets, keep)
    return PooledAttention(pooled.to(hidden.dtype), attention, gram)
