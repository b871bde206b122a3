"""The Triton kernel in the middle of a training step: softmax over the bag, logits, losses, and their gradients."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import dot_of_pairs, wait_for_previous
from acmil.kernels.slots import slot_size


@triton.jit
def sum_slot(
    scores_ptr, projections_ptr, maxima_ptr, sums_ptr, first, end, score_stride,
    K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one slot, with m its own maximum: K rows of X = 1 + 2 C + K numbers.

    `Σ e_k`, then `Σ e_k q_kc` of the branch's own projections, `Σ e_k q_c` of the bag's, and `Σ e_k e_j`, where
    `e_k = e^(S_k − m_k)`.
    """
    branch = tl.arange(0, BK)
    projection = tl.arange(0, BQ)
    row = tl.arange(0, BN)
    branch_fits = branch < K
    projection_fits = projection < (K + 1) * C
    score_at = branch.to(tl.int64)[None, :] * score_stride + row[:, None]
    projection_at = projection.to(tl.int64)[None, :] * score_stride + row[:, None]
    maximum = tl.full((BK,), float("-inf"), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    pooled = tl.zeros((BK, BQ), tl.float32)
    gram = tl.zeros((BK, BK), tl.float32)
    for n in range(first, end, BN):
        row_fits = (row < end - n)[:, None]
        scores = tl.load(scores_ptr + n + score_at, mask=row_fits & branch_fits[None, :], other=float("-inf"))
        projected_fits = row_fits & projection_fits[None, :]
        projected = tl.load(projections_ptr + n + projection_at, mask=projected_fits, other=0.0)
        higher = tl.maximum(maximum, tl.max(scores, axis=0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # all masked so far: e^(-inf − 0) is 0, not NaN
        scale = tl.exp(maximum - finite)
        share = tl.exp(scores - finite[None, :])  # (BN, BK)
        total = total * scale + tl.sum(share, axis=0)
        pooled = dot_of_pairs(tl.trans(share), projected, pooled * scale[:, None], PRECISION)
        gram = dot_of_pairs(tl.trans(share), share, gram * (scale[:, None] * scale[None, :]), PRECISION)
        maximum = higher
    tl.store(maxima_ptr + branch, maximum, mask=branch_fits)
    tl.store(sums_ptr + branch * X, total, mask=branch_fits)
    pair_fits = branch_fits[:, None] & branch_fits[None, :]
    tl.store(sums_ptr + branch[:, None] * X + 1 + 2 * C + branch[None, :], gram, mask=pair_fits)
    of_bag = projection >= K * C
    place = tl.where(of_bag, 1 + C + projection - K * C, 1 + projection % C)
    own = of_bag[None, :] | ((projection // C)[None, :] == branch[:, None])
    at = branch[:, None] * X + place[None, :]
    tl.store(sums_ptr + at, pooled, mask=own & branch_fits[:, None] & projection_fits[None, :])


@triton.jit
def sum_slots(
    maxima_ptr, sums_ptr, count,
    K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, BS: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The sums of a bag (BK, BX) from its slots', their maxima (BK,), and by column j of the pairs Σ e_j and Σ e_j².

    With M the greatest m, a slot's sums are scaled by `e^(m − M)`, those of pairs by both branches' factors, and added
    in fixed order. There are at most BS slots; BW of them are held at once.
    """
    branch = tl.arange(0, BK)
    x = tl.arange(0, BX)
    j = x - 1 - 2 * C
    is_pair = (j >= 0) & (j < K)
    slot = tl.arange(0, BS)
    slot_fits = (slot < count)[:, None]
    fits = slot_fits & (branch < K)[None, :]
    maximum = tl.max(tl.load(maxima_ptr + slot[:, None] * K + branch[None, :], mask=fits, other=float("-inf")), axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    fits = slot_fits & is_pair[None, :]
    of_pair = tl.max(tl.load(maxima_ptr + slot[:, None] * K + j[None, :], mask=fits, other=float("-inf")), axis=0)
    of_pair = tl.where(of_pair == float("-inf"), 0.0, of_pair)
    sums = tl.zeros((BK, BX), tl.float32)
    total = tl.zeros((BX,), tl.float32)
    square = tl.zeros((BX,), tl.float32)
    for s in range(0, count, BW):
        some = s + tl.arange(0, BW)
        some_fit = some < count
        fits = some_fit[:, None] & (branch < K)[None, :]
        own = tl.load(maxima_ptr + some[:, None] * K + branch[None, :], mask=fits, other=float("-inf"))
        factor = tl.exp(own - maximum[None, :])  # (BW, BK)
        fits = some_fit[:, None] & is_pair[None, :]
        other = tl.load(maxima_ptr + some[:, None] * K + j[None, :], mask=fits, other=float("-inf"))
        other_factor = tl.where(is_pair[None, :], tl.exp(other - of_pair[None, :]), 1.0)  # (BW, BX)
        value_at = (some[:, None, None] * K + branch[None, :, None]) * X + x[None, None, :]
        value_fits = some_fit[:, None, None] & (branch < K)[None, :, None] & (x < X)[None, None, :]
        value = tl.load(sums_ptr + value_at, mask=value_fits, other=0.0)
        sums += tl.sum(value * factor[:, :, None] * other_factor[:, None, :], axis=0)
        line_ptr = sums_ptr + (some[:, None] * K + j[None, :]) * X
        total += tl.sum(tl.load(line_ptr, mask=fits, other=0.0) * other_factor, axis=0)
        pair = tl.load(line_ptr + x[None, :], mask=fits, other=0.0)
        square += tl.sum(pair * other_factor * other_factor, axis=0)
    return sums, maximum, total, square


@triton.jit
def cross_entropy(logits, of_label):
    """Cross entropy of rows of logits (R, X), -inf where there is no class, and its gradient."""
    maximum = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - maximum[:, None])
    total = tl.sum(exponentials, axis=1)
    loss = maximum + tl.log(total) - tl.sum(tl.where(of_label, logits, 0.0), axis=1)
    return loss, exponentials / total[:, None] - tl.where(of_label, 1.0, 0.0)


@triton.jit
def diversity(sums, total, column_total, column_square, d_pairs_ptr, K: tl.constexpr, C: tl.constexpr,
              BK: tl.constexpr, BX: tl.constexpr):  # fmt: skip
    """Mean cosine similarity of the branches' attention; its symmetrised gradient in P Pᵀ is written, (K, K).

    With G = P Pᵀ, `dL/dG_kj + dL/dG_jk = 2 c / sqrt(G_kk G_jj)` and `2 dL/dG_kk = −2 c Σ_j cos_kj / G_kk`, where
    `c = 1 / (K (K − 1))`; `G_kj = Σ e_k e_j / (Σ e_k Σ e_j)`.
    """
    branch = tl.arange(0, BK)
    j = tl.arange(0, BX) - 1 - 2 * C
    is_pair = (j >= 0) & (j < K)
    fits = (branch < K)[:, None] & is_pair[None, :]
    own = branch[:, None] == j[None, :]
    square = tl.sum(tl.where(fits & own, sums, 0.0), axis=1)  # Σ e_k²
    square = tl.where(branch < K, square, 1.0)
    column_square = tl.where(is_pair, column_square, 1.0)
    inverse = 1.0 / (tl.sqrt(square)[:, None] * tl.sqrt(column_square)[None, :])
    cosine = tl.where(fits & (branch[:, None] != j[None, :]), sums * inverse, 0.0)
    scale: tl.constexpr = 1.0 / (K * (K - 1))
    across = tl.sum(cosine, axis=1)
    of_own = -(across / square * total * total)[:, None]
    of_others = inverse * total[:, None] * column_total[None, :]
    tl.store(d_pairs_ptr + branch[:, None] * K + j[None, :], 2.0 * scale * tl.where(own, of_own, of_others), mask=fits)
    return tl.sum(across, axis=0) * scale


@triton.jit
def losses_of_bag(
    maxima_ptr, sums_ptr, count, head_bias_ptr, label, d_logits_ptr, stats_ptr, d_pairs_ptr, correction_ptr, losses_ptr,
    K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, BS: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The three losses of a bag, and what the backward pass over its rows needs.

    That is: maximum and inverse sum of each branch, (K, 2); the gradients of the logits, (K, C) and (C,) one after the
    other, which are also those of the heads' biases; the gradient in the Gram matrix, (K, K); and `Σ_n P dP`, (K,).
    """
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    x = tl.arange(0, BX)
    own = (x >= 1) & (x < 1 + C)
    of_bag = (x >= 1 + C) & (x < 1 + 2 * C)
    sums, maximum, column_total, column_square = sum_slots(maxima_ptr, sums_ptr, count, K, C, X, BK, BX, BS, BW)
    total = tl.sum(tl.where((x == 0)[None, :], sums, 0.0), axis=1)
    total = tl.where(branch_fits, total, 1.0)
    inverse = 1.0 / total
    tl.store(stats_ptr + branch * 2, maximum, mask=branch_fits)
    tl.store(stats_ptr + branch * 2 + 1, inverse, mask=branch_fits)
    pooled = sums * inverse[:, None]  # W z in the places of projections
    of_branches = branch_fits[:, None] & of_bag[None, :]
    bag_logits = tl.sum(tl.where(of_branches, pooled, 0.0), axis=0) / K
    bag_logits += tl.load(head_bias_ptr + K * C + x - 1 - C, mask=of_bag, other=0.0)
    bag_logits = tl.where(of_bag, bag_logits, float("-inf"))
    bag_losses, d_bag_logits = cross_entropy(bag_logits[None, :], (x - 1 - C == label)[None, :] & of_bag[None, :])
    bag_loss = tl.sum(bag_losses, axis=0)
    d_bag = tl.sum(d_bag_logits, axis=0)  # (BX,)
    tl.store(d_logits_ptr + K * C + x - 1 - C, d_bag, mask=of_bag)
    correction = tl.sum(tl.where(of_branches, pooled * d_bag[None, :], 0.0), axis=1) / K
    branch_loss = 0.0
    diversity_loss = 0.0
    own_fits = branch_fits[:, None] & own[None, :]
    at = branch[:, None] * C + x[None, :] - 1
    d_logits = tl.zeros((BK, BX), tl.float32)
    if K > 1:
        bias = tl.load(head_bias_ptr + at, mask=own_fits, other=0.0)
        logits = tl.where(own[None, :], pooled + bias, float("-inf"))
        losses, d_logits = cross_entropy(logits, (x - 1 == label)[None, :] & own[None, :])
        branch_loss = tl.sum(tl.where(branch_fits, losses, 0.0), axis=0) / K
        d_logits = tl.where(own_fits, d_logits / K, 0.0)
        # The diversity loss has no part in Σ_n P dP: a cosine does not change with the length of P_k.
        correction += tl.sum(d_logits * tl.where(own_fits, pooled, 0.0), axis=1)
        diversity_loss = diversity(sums, total, column_total, column_square, d_pairs_ptr, K, C, BK, BX)
    tl.store(d_logits_ptr + at, d_logits, mask=own_fits)
    tl.store(correction_ptr + branch, correction, mask=branch_fits)
    tl.store(losses_ptr, bag_loss + branch_loss + diversity_loss)
    tl.store(losses_ptr + 1, bag_loss)
    tl.store(losses_ptr + 2, branch_loss)
    tl.store(losses_ptr + 3, diversity_loss)


@triton.jit
def prepare_update(rates_ptr, powers_ptr, update_ptr, position, weight_decay):
    """AdamW's factors of this step, and the powers of its betas one further, in float64."""
    power_1 = tl.load(powers_ptr) * tl.load(powers_ptr + 2)
    power_2 = tl.load(powers_ptr + 1) * tl.load(powers_ptr + 3)
    tl.store(powers_ptr, power_1)
    tl.store(powers_ptr + 1, power_2)
    rate = tl.load(rates_ptr + position)
    tl.store(update_ptr, (1.0 - rate * weight_decay).to(tl.float32))
    tl.store(update_ptr + 1, (rate / (1.0 - power_1)).to(tl.float32))
    tl.store(update_ptr + 2, tl.sqrt(1.0 - power_2).to(tl.float32))


@triton.jit
def losses_kernel(
    scores_ptr, projections_ptr, maxima_ptr, sums_ptr, arrived_ptr, head_bias_ptr, d_logits_ptr, stats_ptr,
    d_pairs_ptr, correction_ptr, cursor_ptr, losses_ptr, rates_ptr, powers_ptr, update_ptr, used_ptr,
    n_slots, score_stride, weight_decay,
    K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BKS: tl.constexpr, BQ: tl.constexpr,
    BX: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the scores and projections of a slot of rows; the program that comes last does the rest of the middle.

    The logits are sums over the rows, `W z = Σ_n P (H Wᵀ)`, so that the rows of H are not needed here.
    `cursor` holds position, first row, 0, length, label and step number of the bag.
    """
    wait_for_previous(CHAINED)
    X: tl.constexpr = 1 + 2 * C + K
    slot = tl.program_id(0)
    used = tl.load(cursor_ptr + 3).to(tl.int32)
    size = slot_size(used, n_slots, BN)
    first = slot * size
    if first < used:
        sum_slot(
            scores_ptr, projections_ptr, maxima_ptr + slot * K, sums_ptr + slot * K * X, first,
            tl.minimum(first + size, used), score_stride, K, C, X, BN, BK, BQ, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # every thread's writes come before the count below
        count = tl.cdiv(used, size)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == count - 1:
            position = tl.load(cursor_ptr)
            losses_of_bag(
                maxima_ptr, sums_ptr, count, head_bias_ptr, tl.load(cursor_ptr + 4).to(tl.int32), d_logits_ptr,
                stats_ptr, d_pairs_ptr, correction_ptr, losses_ptr + position * 4, K, C, X, BKS, BX, BS, BW,
            )  # fmt: skip
            prepare_update(rates_ptr, powers_ptr, update_ptr, position, weight_decay)
            tl.store(used_ptr, used)
            tl.store(arrived_ptr, 0)
