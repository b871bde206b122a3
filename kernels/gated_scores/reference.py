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
    # V and U as one product: H is read once, forward and backward.
    of_v, of_u = F.linear(hidden, torch.cat([v_weight, u_weight]), torch.cat([v_bias, u_bias])).chunk(2, dim=-1)
    gate = torch.tanh(of_v) * torch.sigmoid(of_u)  # (ΣN, A)
    dtype = torch.promote_types(features.dtype, torch.float32)
    # Rows contiguous for the softmax: (K, ΣN).
    scores = torch.addmm(score_bias.to(dtype)[:, None], score_weight.to(dtype), gate.to(dtype).T)
    return hidden, scores
