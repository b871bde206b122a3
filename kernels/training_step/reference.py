"""A training step of ACMIL with gated attention in plain PyTorch, for any type: what the fused step must equal."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acmil.kernels.branch_pool.reference import masked_attention_pool
from acmil.kernels.gated_scores.reference import gated_attention_scores
from acmil.kernels.training_step.parameters import GatedParameters


class LossTerms(NamedTuple):
    """Scalars; total is their sum."""

    total: Tensor
    bag: Tensor
    branch: Tensor
    diversity: Tensor


def loss_terms(parameters: GatedParameters, features: Tensor, label: Tensor, keep: Tensor | None) -> LossTerms:
    """Losses of one bag.

    `CE(ȳ, label) + mean_k CE(y_k, label) + mean_{k<j} cos(P_k, P_j)`, the last two 0 for a single branch.

    Args:
        parameters: Of the model.
        features: X, (N, D).
        label: () int64.
        keep: (K, N) bool, True for what takes part. None: all.
    """
    p = parameters
    hidden, scores = gated_attention_scores(
        features, p.reduction_weight, p.v_weight, p.v_bias, p.u_weight, p.u_bias, p.score_weight, p.score_bias
    )
    pooled, _, gram = masked_attention_pool(hidden, scores, None, keep)
    z, gram = pooled[0], gram[0]  # (K, L), (K, K)
    bag = F.cross_entropy(p.bag_head_weight @ z.mean(dim=0) + p.bag_head_bias, label)
    n_branches = z.shape[0]
    if n_branches == 1:
        zero = torch.zeros_like(bag)
        return LossTerms(bag, bag, zero, zero)
    logits = torch.einsum("kcl,kl->kc", p.branch_head_weight, z) + p.branch_head_bias  # (K, C)
    branch = F.cross_entropy(logits, label.expand(n_branches))
    norm = gram.diagonal().sqrt()
    cosine = gram / (norm[:, None] * norm[None, :])
    diversity = (cosine.sum() - cosine.diagonal().sum()) / (n_branches * (n_branches - 1))
    return LossTerms(bag + branch + diversity, bag, branch, diversity)
