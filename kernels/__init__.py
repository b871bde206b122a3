"""Operators of attention-based multiple instance learning, on any device.

Each operator has a folder of its own: a plain PyTorch statement of what it computes, and a README with the derivation.
Bags travel packed: the instances of all bags one after another, and `offsets` saying where each bag begins and ends.
"""

from acmil.kernels.gated_attention_pool import (
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
