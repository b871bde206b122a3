"""The branch pool in plain PyTorch: the specification of the operator, and its path on any device."""

import torch
from torch import Tensor

from acmil.kernels.checks import bag_lengths


def masked_attention_pool(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool: z (B, K, L), P (K, ΣN) and G (B, K, K), bag by bag; all in float32 for half types.

    In fp16 the attention of long bags would vanish.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden, scores = hidden.to(dtype), scores.to(dtype)
    lengths = bag_lengths(offsets, hidden.shape[0])
    if len(lengths) == 1:  # cutting would cost as many passes as computing
        attention = _attention(scores, keep)
        return (attention @ hidden)[None], attention, (attention @ attention.T)[None]
    keeps = [None] * len(lengths) if keep is None else keep.split(lengths, dim=-1)
    rows = [_attention(s, k) for s, k in zip(scores.split(lengths, dim=-1), keeps, strict=True)]  # B of (K, N)
    pooled = torch.stack([row @ bag for row, bag in zip(rows, hidden.split(lengths), strict=True)])  # (B, K, L)
    gram = torch.stack([row @ row.T for row in rows])  # (B, K, K)
    return pooled, torch.cat(rows, dim=-1), gram


def _attention(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax of one bag's scores (K, N) over what is kept; zeros where a row keeps nothing."""
    if keep is None:
        return torch.softmax(scores, dim=-1)
    any_kept = keep.any(dim=-1, keepdim=True)  # (K, 1)
    # A row of nothing but -inf is NaN, forward and backward: such a row is left whole here and zeroed after.
    attention = torch.softmax(scores.masked_fill(~keep & any_kept, float("-inf")), dim=-1)
    return attention.masked_fill(~any_kept, 0.0)
