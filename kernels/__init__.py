"""Fused operators of attention-based multiple instance learning, on any device.

Each operator has a folder of its own: a plain PyTorch statement of what it computes, the Triton kernels that compute
it on a GPU, and a README with the derivation. Callers call one function and never ask what device they are on.
Bags travel packed: the instances of all bags one after another, and `offsets` saying where each bag begins and ends.
"""

from acmil.kernels.branch_pool import PooledAttention, masked_attention_pool
from acmil.kernels.checks import bag_lengths
from acmil.kernels.gated_attention_pool import gated_attention_pool
from acmil.kernels.gated_scores import gated_attention_scores, pad_rows
from acmil.kernels.top_k_masking import n_masked, stochastic_top_k_mask

__all__ = [
    "PooledAttention",
    "bag_lengths",
    "gated_attention_pool",
    "gated_attention_scores",
    "masked_attention_pool",
    "n_masked",
    "pad_rows",
    "stochastic_top_k_mask",
]
