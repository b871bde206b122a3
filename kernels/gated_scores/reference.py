"""Gated-attention scores in plain PyTorch: the specification of the operator, and its path on any device."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def gated_attention_scores(
    features: Tensor,
    reduction_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """H (ΣN, L) and S (K, ΣN) by their formulas; S is float32 for half types."""
    hidden = F.relu(F.linear(features, reduction_weight))  # (ΣN, L)
    gate = torch.tanh(F.linear(hidden, v_weight, v_bias)) * torch.sigmoid(F.linear(hidden, u_weight, u_bias))  # (ΣN, A)
    dtype = torch.promote_types(features.dtype, torch.float32)
    # Rows contiguous for the softmax: (K, ΣN).
    scores = torch.addmm(score_bias.to(dtype)[:, None], score_weight.to(dtype), gate.to(dtype).T)
    return hidden, scores
