"""Gated-attention scores by fused kernels: two launches forward, four backward, registered with torch.library."""

from typing import Any

import torch
from torch import Tensor

from acmil.kernels.gated_scores.backward_kernels import sum_partials_kernel
from acmil.kernels.gated_scores.launches import (
    Rows,
    Weights,
    choose_shares,
    choose_tiles,
    gate_backward_programs,
    launch_gate,
    launch_gate_backward,
    launch_reduce,
    launch_reduction_backward,
    launch_weight_gradient,
    new_signs,
)
from acmil.kernels.launch import ceil_div, chained, check_operands, power_of_2_at_least

_WEIGHT_NAMES = ("reduction_weight", "v_weight", "v_bias", "u_weight", "u_bias", "score_weight", "score_bias")


def gated_attention_scores(features: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's function by the fused kernels."""
    check_operands(features, **dict(zip(_WEIGHT_NAMES, weights, strict=True)))
    save_gate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *weights))
    hidden, scores, _, _ = gated_scores_op(features, *weights, save_gate)
    return hidden, scores


@torch.library.custom_op("acmil::gated_scores", mutates_args=())
def gated_scores_op(
    features: Tensor,
    w1: Tensor,
    v: Tensor,
    v_bias: Tensor,
    u: Tensor,
    u_bias: Tensor,
    w: Tensor,
    b: Tensor,
    save_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H (ΣN, L), S (K, ΣN) float32, and the arguments of the gate (ΣN, 2A) and the signs of H.

    The last two are empty where no backward is to come.
    """
    features = features.contiguous()
    weights = Weights(*(tensor.contiguous() for tensor in (w1, v, v_bias, u, u_bias, w, b)))
    hidden, scores, gate, signs = _empty_outputs(features, w1, w, save_gate)
    rows = Rows(features.shape[0])
    tiles = choose_tiles(rows.n_rows, w1.shape[0], w.shape[1], features.dtype, features.device)
    launch_reduce(features, weights.reduction, hidden, signs if save_gate else None, rows, tiles.reduce)
    launch_gate(hidden, weights, scores, gate if save_gate else None, rows, tiles.gate)
    return hidden, scores, gate, signs


@gated_scores_op.register_fake
def _(
    features: Tensor, w1: Tensor, v: Tensor, v_bias: Tensor, u: Tensor, u_bias: Tensor, w: Tensor, b: Tensor,
    save_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(features, w1, w, save_gate)


def _empty_outputs(features: Tensor, w1: Tensor, w: Tensor, save_gate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows, (n_branches, n_gate) = features.shape[0], w.shape
    return (
        features.new_empty(n_rows, w1.shape[0]),
        features.new_empty(n_branches, n_rows, dtype=torch.float32),
        features.new_empty(n_rows if save_gate else 0, 2 * n_gate),
        new_signs(n_rows if save_gate else 0, w1.shape[0], features.device),
    )


@torch.library.custom_op("acmil::gated_scores_backward", mutates_args=())
def gated_scores_backward_op(
    d_hidden: Tensor | None,
    d_scores: Tensor | None,
    features: Tensor,
    hidden: Tensor,
    gate: Tensor,
    signs: Tensor,
    w1: Tensor,
    v: Tensor,
    v_bias: Tensor,
    u: Tensor,
    u_bias: Tensor,
    w: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `[W1, V, U, bV, bU, w, b]` one after another, float32, and d(X W1ᵀ)."""
    features = features.contiguous()
    weights = Weights(*(tensor.contiguous() for tensor in (w1, v, v_bias, u, u_bias, w, b)))
    rows, (n_hidden, n_features), (n_branches, n_gate) = Rows(features.shape[0]), w1.shape, w.shape
    device = features.device
    tiles = choose_tiles(rows.n_rows, n_hidden, n_gate, features.dtype, device)
    d_reduced, d_gate = torch.empty_like(hidden), torch.empty_like(gate)
    if d_scores is None:
        d_scores = torch.zeros((n_branches, rows.n_rows), dtype=torch.float32, device=device)
    n_programs = gate_backward_programs(rows.n_rows, tiles.gate_backward, device)
    n_small = 2 * n_gate + n_branches * (n_gate + 1)
    small = torch.empty((n_programs, n_small), dtype=torch.float32, device=device)
    launch_gate_backward(gate, weights, d_gate, small, rows, tiles.gate_backward, d_scores=d_scores.contiguous())
    launch_reduction_backward(
        signs, d_gate, torch.cat((weights.v, weights.u)), d_reduced, rows, tiles.reduction_backward,
        d_hidden=None if d_hidden is None else d_hidden.contiguous(),
    )  # fmt: skip
    shares = choose_shares(n_features, n_hidden, n_gate, features.dtype, device)
    splits = shares.of(rows.n_rows)
    n_large = n_hidden * n_features + 2 * n_gate * n_hidden
    large = torch.empty((shares.most(rows.n_rows), n_large), dtype=torch.float32, device=device)
    launch_weight_gradient(features, hidden, d_reduced, d_gate, n_gate, large, rows, tiles.weight_gradient, shares)
    gradients = torch.empty((n_large + n_small,), dtype=torch.float32, device=device)
    block, small_block = 512, 16
    n_large_blocks = ceil_div(n_large, block)
    sum_partials_kernel[(n_large_blocks + ceil_div(n_small, small_block),)](
        large, small, gradients, n_large, n_small, splits, n_programs, n_large_blocks,
        BC=block, BS=small_block, BP=power_of_2_at_least(splits, least=1), num_warps=4, **chained(device),
    )  # fmt: skip
    return gradients, d_reduced


@gated_scores_backward_op.register_fake
def _(
    d_hidden: Tensor | None, d_scores: Tensor | None, features: Tensor, hidden: Tensor, gate: Tensor, signs: Tensor,
    w1: Tensor, v: Tensor, v_bias: Tensor, u: Tensor, u_bias: Tensor, w: Tensor, b: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_weights = sum(tensor.numel() for tensor in (w1, v, v_bias, u, u_bias, w, b))
    return features.new_empty(n_weights, dtype=torch.float32), torch.empty_like(hidden)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, w1, v, v_bias, u, u_bias, w, b, _ = inputs
    hidden, _, gate, signs = output
    ctx.mark_non_differentiable(gate, signs)
    ctx.save_for_backward(features, hidden, gate, signs, w1, v, v_bias, u, u_bias, w, b)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_hidden: Tensor | None, d_scores: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    features, hidden, gate, signs, w1, v, v_bias, u, u_bias, w, b = ctx.saved_tensors
    flat, d_reduced = gated_scores_backward_op(
        d_hidden, d_scores, features, hidden, gate, signs, w1, v, v_bias, u, u_bias, w, b
    )
    d_features = d_reduced @ w1 if ctx.needs_input_grad[0] else None
    weights = (w1, v, u, v_bias, u_bias, w, b)  # both matrices of the gate stand together: one product makes them
    parts = flat.split([weight.numel() for weight in weights])
    d_w1, d_v, d_u, d_v_bias, d_u_bias, d_w, d_b = (
        part.view(weight.shape).to(weight.dtype) for part, weight in zip(parts, weights, strict=True)
    )
    return d_features, d_w1, d_v, d_v_bias, d_u, d_u_bias, d_w, d_b, None


gated_scores_op.register_autograd(_backward, setup_context=_setup)
