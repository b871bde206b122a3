"""Gated attention pooling of packed bags: instance reduction, gate, branch scores, masked softmax and weighted mean."""

from acmil.kernels.gated_attention_pool.reference import (
    PooledAttention,
    bag_lengths,
    gated_attention_pool,
    gated_attention_scores,
    masked_attention_pool,
)

__all__ = [
    "PooledAttention",
    "bag_lengths",
    "gated_attention_pool",
    "gated_attention_scores",
    "masked_attention_pool",
]
