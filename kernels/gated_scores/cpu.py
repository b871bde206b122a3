"""Gated-attention scores on a CPU: activations applied by the products that precede them, gradients by hand.

The formulas are those of `gated_scores/reference.py`. There time goes into passes over memory beside the products, in
bf16 most of all into tanh (`docs/experiments.md`): oneDNN applies it, in float32, to what it still has in registers.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

# oneDNN, which computes products of bf16, compiles code for each shape it meets, milliseconds each, and keeps 1024.
BF16_ROWS_MULTIPLE = 256


def pad_rows(features: Tensor) -> Tensor:
    """Features (N, D) with zeros behind the last bag where the products would else be compiled for each N."""
    if features.device.type != "cpu" or features.dtype != torch.bfloat16:
        return features
    return F.pad(features, (0, 0, 0, -features.shape[0] % BF16_ROWS_MULTIPLE))


def gated_attention_scores(features: Tensor, n_rows: int, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """H (ΣN, L) and S (K, ΣN) as `acmil.kernels.gated_attention_scores` defines them.

    Args:
        features: (ΣN + padding, D).
        n_rows: ΣN; rows behind it are computed and left out.
        weights: As there, in any type: those of the products are rounded to the features'.
    """
    return _GatedScores.apply(features, n_rows, *weights)


@torch.compiler.assume_constant_result  # a compiler does not look into it
def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if x.dtype == torch.bfloat16 and _has_bf16():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    return getattr(torch, f"{activation}_")(F.linear(x, weight, bias))


class _GatedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, n_rows: int, *weights: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(features.dtype, torch.float32)
        w1, v, v_bias, u, u_bias = (weight.to(features.dtype) for weight in weights[:5])
        w, b = (weight.to(exact) for weight in weights[5:])
        hidden = _product(features, w1, None, "relu")
        tanh, sigmoid = _product(hidden, v, v_bias, "tanh"), _product(hidden, u, u_bias, "sigmoid")
        gate = (tanh[:n_rows] * sigmoid[:n_rows]).to(exact)  # (ΣN, A)
        scores = torch.addmm(b[:, None], w, gate.T)
        ctx.save_for_backward(features, hidden, tanh, sigmoid, gate, w1, torch.cat([v, u]), w)
        return hidden[:n_rows], scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        features, hidden, tanh, sigmoid, gate, w1, vu, w = ctx.saved_tensors
        n_rows, n_gate = gate.shape
        n_padding = len(features) - n_rows
        d_gate = F.pad(d_scores, (0, n_padding)).to(w1.dtype).T @ w.to(w1.dtype)  # (ΣN + padding, A)
        d_gates = torch.empty(len(features), 2 * n_gate, dtype=w1.dtype)
        torch.ops.aten.tanh_backward(d_gate * sigmoid, tanh, grad_input=d_gates[:, :n_gate])
        torch.ops.aten.sigmoid_backward(d_gate * tanh, sigmoid, grad_input=d_gates[:, n_gate:])
        d_reduced = d_gates @ vu
        d_reduced[:n_rows].add_(d_hidden)
        torch.ops.aten.threshold_backward(d_reduced, hidden, 0, grad_input=d_reduced)
        d_v, d_u = (d_gates.T @ hidden).chunk(2)
        d_v_bias, d_u_bias = d_gates.sum(dim=0).chunk(2)
        return (
            d_reduced @ w1 if ctx.needs_input_grad[0] else None,
            None,
            d_reduced.T @ features,
            d_v,
            d_v_bias,
            d_u,
            d_u_bias,
            d_scores @ gate,
            d_scores.sum(dim=1),
        )
