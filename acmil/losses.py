"""Loss terms of attention-challenging multiple instance learning, each by name."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acmil.kernels import bag_lengths
from acmil.models.output import MILOutput


@dataclass(frozen=True)
class Losses:
    """Scalar loss terms of one batch.

    Attributes:
        bag: Cross entropy of the bag logits, averaged over bags.
        branch: Cross entropy of the branch logits, averaged over branches and bags; 0 with a single branch.
        diversity: Mean cosine similarity between branches' attention; 0 with a single branch.
    """

    bag: Tensor
    branch: Tensor
    diversity: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised: the sum of the terms, all with weight 1."""
        return self.bag + self.branch + self.diversity


def acmil_losses(out: MILOutput, labels: Tensor) -> Losses:
    """Bag, branch and diversity losses of a model's output.

    `L = CE(ȳ, label) + mean_k CE(y_k, label) + mean_{i<j} cos(P_i, P_j)`; the last two are 0 when K = 1.

    Args:
        out: The model's output, with branch logits and attention.
        labels: (B,) int64 class indices.

    Returns:
        The terms, scalars.

    Raises:
        ValueError: If `labels` is not int64 of shape (B,).

    Reference:
        Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image
        Classification", ECCV 2024.
    """
    n_bags = out.logits.shape[0]
    if labels.dtype != torch.int64 or tuple(labels.shape) != (n_bags,):
        raise ValueError(f"labels must be int64 of shape ({n_bags},), got {labels.dtype} {tuple(labels.shape)}.")
    bag = F.cross_entropy(out.logits, labels)
    if out.branch_logits is None or out.branch_logits.shape[1] == 1:
        zero = torch.zeros_like(bag)
        return Losses(bag, zero, zero)
    n_branches = out.branch_logits.shape[1]
    branch = F.cross_entropy(out.branch_logits.flatten(0, 1), labels.repeat_interleave(n_branches))  # (B·K, C)
    if out.gram is not None:
        return Losses(bag, branch, gram_similarity(out.gram))
    attention = out.attention if out.head_attention is None else out.head_attention.transpose(0, 1)
    if attention is None:
        return Losses(bag, branch, torch.zeros_like(bag))
    return Losses(bag, branch, attention_similarity(attention, out.offsets))


def attention_similarity(attention: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Mean cosine similarity of the branches' attention over all pairs of branches, then over heads and bags.

    Args:
        attention: (K, ΣN), or (heads, K, ΣN), K >= 2, probabilities.
        offsets: (B+1,) int64, or None for one bag.

    Returns:
        A scalar in [0, 1]: 1 when all branches look at the same instances, 0 when no two share any.
    """
    n_instances = attention.shape[-1]
    one_bag = offsets is None or offsets.shape[0] == 2
    bags = (attention,) if one_bag else attention.split(bag_lengths(offsets, n_instances), dim=-1)
    return torch.stack([gram_similarity(bag @ bag.transpose(-1, -2)) for bag in bags]).mean()


def gram_similarity(gram: Tensor) -> Tensor:
    """Mean over pairs i < j of `cos(P_i, P_j) = G_ij / sqrt(G_ii G_jj)`, then over all leading dimensions.

    Args:
        gram: `G = P Pᵀ`, (…, K, K), K >= 2.
    """
    n_branches = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).rsqrt()  # (…, K); a row sums to 1, so its square is at least 1/N
    cosines = gram * scale[..., None] * scale[..., None, :]
    # All pairs, both ways round, with the K ones of the diagonal.
    return (cosines.sum(dim=(-1, -2)).mean() - n_branches) / (n_branches * (n_branches - 1))
