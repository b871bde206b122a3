"""The branch pool in plain PyTorch: the specification of the operator, and its path on any device."""

import torch
from torch import Tensor

from acmil.kernels.checks import bag_lengths


def masked_attention_pool(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool: z (B, K, L), P (K, ΣN) and G (B, K, K), bag by bag; all in float32 for half types.

    The product P H alone is bf16 where H is, as z is in the end. In fp16 the attention of long bags would vanish.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scores = scores.to(dtype)
    if hidden.dtype != torch.bfloat16:
        hidden = hidden.to(dtype)
    lengths = bag_lengths(offsets, hidden.shape[0])
    keeps = [None] * len(lengths) if keep is None else keep.split(lengths, dim=-1)
    rows = [_attention(s, k) for s, k in zip(scores.split(lengths, dim=-1), keeps, strict=True)]  # B of (K, N)
    hiddens = hidden.split(lengths)
    pooled = torch.stack([row.to(hidden.dtype) @ bag for row, bag in zip(rows, hiddens, strict=True)])  # (B, K, L)
    gram = torch.stack([row @ row.T for row in rows])  # (B, K, K)
    return pooled, rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1), gram


def _attention(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax of one bag's scores (K, N) over what is kept; zeros where a row keeps nothing."""
    if keep is None:
        return torch.softmax(scores, dim=-1)
    any_kept = keep.any(dim=-1, keepdim=True)  # (K, 1)
    # A row of nothing but -inf is NaN, forward and backward: such a row is left whole here and zeroed after.
    attention = torch.softmax(scores.masked_fill(~keep & any_kept, float("-inf")), dim=-1)
    return attention.masked_fill(~any_kept, 0.0)
