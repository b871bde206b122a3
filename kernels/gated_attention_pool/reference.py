"""Gated attention pooling in plain PyTorch: the specification of the operator, and its path on any device."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class PooledAttention(NamedTuple):
    """Bag features, and the attention that made them."""

    pooled: Tensor  # (B, K, L)
    attention: Tensor  # (K, ΣN), each bag's row sums to 1


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
    """Reduce the instances and score each for every branch.

    `H = relu(X W1ᵀ)`, `G = tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU)`, `S = w Gᵀ + b`. An instance's row needs no other
    instance, so bags play no part here.

    Args:
        features: Instance features `X`, (ΣN, D), floating point.
        reduction_weight: `W1`, (L, D); there is no bias.
        v_weight: `V`, (A, L).
        v_bias: `bV`, (A,).
        u_weight: `U`, (A, L).
        u_bias: `bU`, (A,).
        score_weight: `w`, (K, A): one row a branch.
        score_bias: `b`, (K,).

    Returns:
        `H`, (ΣN, L), and the scores `S`, (K, ΣN), before any softmax.

    Raises:
        ValueError: If the shapes disagree.

    Reference:
        Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018; Zhang et al., ECCV 2024.
    """
    _check_shape("features", features, (None, reduction_weight.shape[-1]))
    _check_shape("reduction_weight", reduction_weight, (v_weight.shape[-1], None))
    n_gate, n_branches = v_weight.shape[0], score_weight.shape[0]
    _check_shape("v_bias", v_bias, (n_gate,))
    _check_shape("u_weight", u_weight, tuple(v_weight.shape))
    _check_shape("u_bias", u_bias, (n_gate,))
    _check_shape("score_weight", score_weight, (None, n_gate))
    _check_shape("score_bias", score_bias, (n_branches,))
    hidden = F.relu(F.linear(features, reduction_weight))  # (ΣN, L)
    gate = torch.tanh(F.linear(hidden, v_weight, v_bias)) * torch.sigmoid(F.linear(hidden, u_weight, u_bias))  # (ΣN, A)
    scores = torch.addmm(score_bias[:, None], score_weight, gate.T)  # (K, ΣN), rows contiguous for the softmax
    return hidden, scores


def masked_attention_pool(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None = None, keep: Tensor | None = None
) -> PooledAttention:
    """Average each bag's instances by the softmax of their scores, once a branch.

    `P = softmax(S)` over the bag's kept instances, `z = P H`. An instance that is not kept has attention exactly 0 and
    passes no gradient. A row that keeps no instance of a bag gets zeros, never NaN; sampling a mask that leaves
    something to attend to is the caller's part.

    Args:
        hidden: `H`, (ΣN, L), floating point.
        scores: `S`, (K, ΣN).
        offsets: (B+1,) int64: bag b is the rows `offsets[b]` to `offsets[b + 1]`. None: all rows are one bag, which
            on a GPU also saves reading the offsets back.
        keep: (K, ΣN) bool, True for what takes part. None: all.

    Returns:
        Bag features `z`, (B, K, L), and the attention `P`, (K, ΣN).

    Raises:
        ValueError: If shapes or dtypes disagree, or the offsets do not cut ΣN rows into bags of at least one.
    """
    n_instances = hidden.shape[0]
    _check_shape("hidden", hidden, (None, None))
    _check_shape("scores", scores, (None, n_instances))
    if keep is not None:
        _check_shape("keep", keep, tuple(scores.shape))
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must be a bool tensor, got {keep.dtype}. Compare it with 0 first.")
    lengths = bag_lengths(offsets, n_instances)
    if len(lengths) == 1:
        attention = _attention(scores, keep)
        return PooledAttention((attention @ hidden)[None], attention)
    keeps = [None] * len(lengths) if keep is None else keep.split(lengths, dim=-1)
    rows = [_attention(s, k) for s, k in zip(scores.split(lengths, dim=-1), keeps, strict=True)]  # B of (K, N)
    pooled = torch.stack([row @ bag for row, bag in zip(rows, hidden.split(lengths), strict=True)])  # (B, K, L)
    return PooledAttention(pooled, torch.cat(rows, dim=-1))


def gated_attention_pool(
    features: Tensor,
    reduction_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
) -> PooledAttention:
    """Pool bags of raw features by gated attention: `gated_attention_scores`, then `masked_attention_pool`.

    Args:
        features: `X`, (ΣN, D).
        reduction_weight: `W1`, (L, D).
        v_weight: `V`, (A, L).
        v_bias: `bV`, (A,).
        u_weight: `U`, (A, L).
        u_bias: `bU`, (A,).
        score_weight: `w`, (K, A).
        score_bias: `b`, (K,).
        offsets: (B+1,) int64, or None for one bag.
        keep: (K, ΣN) bool, True for what takes part, or None for all.

    Returns:
        Bag features (B, K, L) and the attention (K, ΣN).

    Raises:
        ValueError: If shapes or dtypes disagree, or the offsets do not cut ΣN rows into bags of at least one.
    """
    hidden, scores = gated_attention_scores(
        features, reduction_weight, v_weight, v_bias, u_weight, u_bias, score_weight, score_bias
    )
    return masked_attention_pool(hidden, scores, offsets, keep)


def bag_lengths(offsets: Tensor | None, n_instances: int) -> list[int]:
    """Read how many instances each bag holds.

    Args:
        offsets: (B+1,) int64, from 0 to `n_instances`, rising. None: one bag.
        n_instances: ΣN.

    Returns:
        B lengths, each at least 1.

    Raises:
        ValueError: If the offsets do not cut `n_instances` rows into bags of at least one.
    """
    if n_instances < 1:
        raise ValueError("a batch must hold at least 1 instance, got 0. Drop empty bags from the cohort.")
    if offsets is None:
        return [n_instances]
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"offsets must be int64 of shape (B + 1,), B >= 1, got {offsets.dtype} {tuple(offsets.shape)}."
        )
    edges = offsets.tolist()
    if edges[0] != 0 or edges[-1] != n_instances:
        raise ValueError(f"offsets must run from 0 to {n_instances} (instances), got {edges[0]} to {edges[-1]}.")
    lengths = [end - start for start, end in pairwise(edges)]
    if min(lengths) < 1:
        bag = next(index for index, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"offsets must rise, so that every bag holds at least 1 instance, got {edges[bag]} to {edges[bag + 1]} "
            f"for bag {bag}. Drop empty bags from the cohort."
        )
    return lengths


def _attention(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax of one bag's scores (K, N) over what is kept; zeros where a row keeps nothing."""
    if keep is None:
        return torch.softmax(scores, dim=-1)
    any_kept = keep.any(dim=-1, keepdim=True)  # (K, 1)
    # A row of nothing but -inf is NaN, forward and backward: such a row is left whole here and zeroed after.
    attention = torch.softmax(scores.masked_fill(~keep & any_kept, float("-inf")), dim=-1)
    return attention.masked_fill(~any_kept, 0.0)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Refuse a tensor whose shape is not `expected`; None stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or want == size for want, size in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}.")
