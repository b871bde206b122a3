"""Instance reduction and gated-attention scores."""

from torch import Tensor

from acmil.kernels.checks import check_shape
from acmil.kernels.gated_scores import cpu, reference
from acmil.kernels.gated_scores.cpu import pad_rows
from acmil.kernels.launch import MAX_GATE, takes_fused_path

__all__ = ["gated_attention_scores", "pad_rows"]


def gated_attention_scores(
    features: Tensor,
    reduction_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    n_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the instances and score each for every branch.

    `H = relu(X W1ᵀ)`, `G = tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU)`, `S = w Gᵀ + b`. An instance's row needs no other
    instance, so bags play no part here. On a GPU of compute capability 9 or 10 the fused kernels run where D, L and A
    are multiples of 16, A <= 256, K <= 16 and the type is float32, bfloat16 or float16; a CPU has products and
    gradients of its own; everything else takes the reference.

    Args:
        features: Instance features `X`, (ΣN, D), floating point. Weights of another type are rounded to theirs.
        reduction_weight: `W1`, (L, D); there is no bias.
        v_weight: `V`, (A, L).
        v_bias: `bV`, (A,).
        u_weight: `U`, (A, L).
        u_bias: `bU`, (A,).
        score_weight: `w`, (K, A): one row a branch.
        score_bias: `b`, (K,).
        n_rows: ΣN, where rows that belong to no bag follow in the features (`pad_rows`). None: there are none.

    Returns:
        `H`, (ΣN, L), in the features' type, and the scores `S`, (K, ΣN), before any softmax, float32 or finer.

    Raises:
        ValueError: If the shapes disagree, or on a GPU the devices.

    Reference:
        Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018; Zhang et al., ECCV 2024.
    """
    (n_hidden, n_gate), n_branches = (reduction_weight.shape[0], v_weight.shape[0]), score_weight.shape[0]
    check_shape("features", features, (None, reduction_weight.shape[-1]))
    check_shape("reduction_weight", reduction_weight, (v_weight.shape[-1], None))
    check_shape("v_bias", v_bias, (n_gate,))
    check_shape("u_weight", u_weight, tuple(v_weight.shape))
    check_shape("u_bias", u_bias, (n_gate,))
    check_shape("score_weight", score_weight, (None, n_gate))
    check_shape("score_bias", score_bias, (n_branches,))
    weights: tuple[Tensor, ...] = (
        reduction_weight, v_weight, v_bias, u_weight, u_bias, score_weight, score_bias,
    )  # fmt: skip
    sizes = (features.shape[1], n_hidden, n_gate)
    fits = n_gate <= MAX_GATE and features.shape[0] > 0
    if features.device.type != "cpu":
        features = features[:n_rows]
        weights = tuple(weight.to(features.dtype) for weight in weights)
    if fits and takes_fused_path(features, multiples_of_16=sizes, n_branches=n_branches):
        from acmil.kernels.gated_scores import fused  # triton comes with torch only where there can be a GPU

        return fused.gated_attention_scores(features, *weights)
    if features.device.type == "cpu":
        return cpu.gated_attention_scores(features, len(features) if n_rows is None else n_rows, *weights)
    return reference.gated_attention_scores(features, *weights)
