"""The Triton kernel in the middle of a training step: softmax over the bag, logits, losses, and their gradients."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import wait_for_previous
from acmil.kernels.slots import slot_size


@triton.jit
def places_of_sums(K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BS: tl.constexpr):
    """What each of the K X sums of a bag is made of: its branch, the other branch, the projection, and which it has.

    Row k has X = 1 + 2 C + K numbers: `Σ e_k`, then `Σ e_k q_kc` of the branch's own projections, `Σ e_k q_c` of the
    bag's, and `Σ e_k e_j`, where `e_k = e^(S_k − m_k)` and m is the bag's maximum.
    """
    s = tl.arange(0, BS)
    branch = s // X
    place = s % X
    fits = branch < K
    other = place - 1 - 2 * C
    is_pair = fits & (other >= 0)
    is_projection = fits & (place >= 1) & (other < 0)
    projection = tl.where(place < 1 + C, branch * C, K * C - C) + place - 1
    return branch, fits, other, is_pair, projection, is_projection


@triton.jit
def sum_rows(
    scores_ptr, projections_ptr, maxima_ptr, sums_ptr, first, end, score_stride,
    K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The sums over some rows, (K, X), written one after another.

    Each is a sum of `e_k f` with f = 1, a projection q or e_j; all are worked out side by side, element by element: as
    products they would be too small for tensor cores.
    """
    branch, fits, other, is_pair, projection, is_projection = places_of_sums(K, C, X, BS)
    row = tl.arange(0, BN)
    maximum = tl.load(maxima_ptr + branch, mask=fits, other=0.0)[None, :]
    other_maximum = tl.load(maxima_ptr + other, mask=is_pair, other=0.0)[None, :]
    branch_at = branch.to(tl.int64)[None, :] * score_stride + row[:, None]
    other_at = other.to(tl.int64)[None, :] * score_stride + row[:, None]
    projection_at = projection.to(tl.int64)[None, :] * score_stride + row[:, None]
    sums = tl.zeros((BN, BS), tl.float32)
    for n in range(first, end, BN):
        row_fits = (row < end - n)[:, None]
        factor = tl.load(projections_ptr + n + projection_at, mask=row_fits & is_projection[None, :], other=1.0)
        score = tl.load(scores_ptr + n + branch_at, mask=row_fits & fits[None, :], other=float("-inf"))
        other_score = tl.load(scores_ptr + n + other_at, mask=row_fits & is_pair[None, :], other=float("-inf"))
        factor = tl.where(is_pair[None, :], tl.exp(other_score - other_maximum), factor)
        sums += tl.exp(score - maximum) * factor
    tl.store(sums_ptr + tl.arange(0, BS), tl.sum(sums, axis=0), mask=fits)


@triton.jit
def sum_slots(sums_ptr, total_ptr, count, n_sums, BS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Write the sums of a bag from those of its slots, (count, n_sums), added in fixed order."""
    place = tl.arange(0, BS)
    total = tl.zeros((BS,), tl.float32)
    for s in range(0, count, AT_ONCE):
        slot = s + tl.arange(0, AT_ONCE)
        fits = (slot < count)[:, None] & (place < n_sums)[None, :]
        total += tl.sum(tl.load(sums_ptr + slot[:, None] * n_sums + place[None, :], mask=fits, other=0.0), axis=0)
    tl.store(total_ptr + place, total, mask=place < n_sums)


@triton.jit
def cross_entropy(logits, of_label):
    """Cross entropy of rows of logits (R, X), -inf where there is no class, and its gradient."""
    maximum = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - maximum[:, None])
    total = tl.sum(exponentials, axis=1)
    loss = maximum + tl.log(total) - tl.sum(tl.where(of_label, logits, 0.0), axis=1)
    return loss, exponentials / total[:, None] - tl.where(of_label, 1.0, 0.0)


@triton.jit
def diversity(sums, total, column_total, column_square, weight, d_pairs_ptr, K: tl.constexpr, C: tl.constexpr,
              BK: tl.constexpr, BX: tl.constexpr):  # fmt: skip
    """Mean cosine similarity of the branches' attention; its symmetrised gradient in P Pᵀ is written, (K, K).

    The gradient is that of `weight` times the mean.

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
    inverse = 1.0 / (tl.sqrt(square)[:, None] * tl.sqrt(column_square)[None, :])
    cosine = tl.where(fits & (branch[:, None] != j[None, :]), sums * inverse, 0.0)
    scale: tl.constexpr = 1.0 / (K * (K - 1))
    across = tl.sum(cosine, axis=1)
    of_own = -(across / square * total * total)[:, None]
    of_others = inverse * total[:, None] * column_total[None, :]
    d_pairs = 2.0 * scale * tl.where(own, of_own, of_others) * weight
    tl.store(d_pairs_ptr + branch[:, None] * K + j[None, :], d_pairs, mask=fits)
    return tl.sum(across, axis=0) * scale


@triton.jit
def losses_of_bag(
    sums_ptr, head_bias_ptr, label, weight, d_logits_ptr, inverse_ptr, d_pairs_ptr, correction_ptr, losses_ptr,
    K: tl.constexpr, C: tl.constexpr, X: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """The three losses of a bag, from its sums (K, X), and what the backward pass over its rows needs.

    That is: the inverse of each branch's sum, (K,); the gradients of the logits, (K, C) and (C,) one after the
    other, which are also those of the heads' biases; the gradient in the Gram matrix, (K, K); and `Σ_n P dP`, (K,).
    The gradients are those of `weight` times the losses; what is written of the losses is as it is.
    """
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    x = tl.arange(0, BX)
    own = (x >= 1) & (x < 1 + C)
    of_bag = (x >= 1 + C) & (x < 1 + 2 * C)
    sums_fit = branch_fits[:, None] & (x < X)[None, :]
    sums = tl.load(sums_ptr + branch[:, None] * X + x[None, :], mask=sums_fit, other=0.0)
    j = x - 1 - 2 * C
    is_pair = (j >= 0) & (j < K)
    column_total = tl.load(sums_ptr + j * X, mask=is_pair, other=1.0)
    column_square = tl.load(sums_ptr + j * X + x, mask=is_pair, other=1.0)
    total = tl.load(sums_ptr + branch * X, mask=branch_fits, other=1.0)
    inverse = 1.0 / total
    tl.store(inverse_ptr + branch, inverse, mask=branch_fits)
    pooled = sums * inverse[:, None]  # W z in the places of projections
    of_branches = branch_fits[:, None] & of_bag[None, :]
    bag_logits = tl.sum(tl.where(of_branches, pooled, 0.0), axis=0) / K
    bag_logits += tl.load(head_bias_ptr + K * C + x - 1 - C, mask=of_bag, other=0.0)
    bag_logits = tl.where(of_bag, bag_logits, float("-inf"))
    bag_losses, d_bag_logits = cross_entropy(bag_logits[None, :], (x - 1 - C == label)[None, :] & of_bag[None, :])
    bag_loss = tl.sum(bag_losses, axis=0)
    d_bag = tl.sum(d_bag_logits, axis=0) * weight  # (BX,)
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
        d_logits = tl.where(own_fits, d_logits / K * weight, 0.0)
        # The diversity loss has no part in Σ_n P dP: a cosine does not change with the length of P_k.
        correction += tl.sum(d_logits * tl.where(own_fits, pooled, 0.0), axis=1)
        diversity_loss = diversity(sums, total, column_total, column_square, weight, d_pairs_ptr, K, C, BK, BX)
    tl.store(d_logits_ptr + at, d_logits, mask=own_fits)
    tl.store(correction_ptr + branch, correction, mask=branch_fits)
    tl.store(losses_ptr, bag_loss + branch_loss + diversity_loss)
    tl.store(losses_ptr + 1, bag_loss)
    tl.store(losses_ptr + 2, branch_loss)
    tl.store(losses_ptr + 3, diversity_loss)


@triton.jit
def weight_of_bag(cursor_ptr, BAGS: tl.constexpr):
    """What a bag's losses count for in the mean over the bags of its model that have rows."""
    n_bags = (tl.load(cursor_ptr + 3, cache_modifier=".cg") > 0).to(tl.float32)
    for bag in tl.static_range(1, BAGS):
        n_bags += (tl.load(cursor_ptr + bag * 6 + 3, cache_modifier=".cg") > 0).to(tl.float32)
    return 1.0 if BAGS == 1 else 1.0 / n_bags


@triton.jit
def factors_of_update(rate_ptr, powers_ptr, weight_decay):
    """The powers of AdamW's betas one step further, and its factors of this step, in float64."""
    power_1 = tl.load(powers_ptr, cache_modifier=".cg") * tl.load(powers_ptr + 2, cache_modifier=".cg")
    power_2 = tl.load(powers_ptr + 1, cache_modifier=".cg") * tl.load(powers_ptr + 3, cache_modifier=".cg")
    rate = tl.load(rate_ptr, cache_modifier=".cg")
    return power_1, power_2, 1.0 - rate * weight_decay, rate / (1.0 - power_1), tl.sqrt(1.0 - power_2)


@triton.jit
def losses_kernel(
    scores_ptr, projections_ptr, maxima_ptr, inverses_ptr, sums_ptr, arrived_ptr, head_bias_ptr, d_logits_ptr,
    d_pairs_ptr, correction_ptr, cursor_ptr, losses_ptr, rates_ptr, powers_ptr, update_ptr, used_ptr,
    n_slots, parameters, positions, score_stride, weight_decay,
    BAGS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    BS: tl.constexpr, AT_ONCE: tl.constexpr, MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the scores and projections of a slot of rows; the program that comes last does the rest of the middle.

    The factors of AdamW, which depend on no row, are the first slot's.

    The logits are sums over the rows, `W z = Σ_n P (H Wᵀ)`, so that the rows of H are not needed here. The maxima of
    the scores are given, (K,), and what their exponentials sum up to is written, inverted. Behind the sums of the slots
    there is room for the bag's. `cursor` holds position, first row, 0, length, label and step number.

    BAGS bags in a row are of one model, whose loss is the mean over those that have rows; the first is among them
    if any is. Every bag has `n_slots` programs, and `positions` rows of losses, every model as many of rates; a bag
    without rows has nothing to do.
    """
    X: tl.constexpr = 1 + 2 * C + K
    slot = tl.program_id(0) % n_slots
    place = tl.program_id(0) // n_slots  # of a bag, among those of all models
    model = place // BAGS
    scores_ptr += tl.cast(place * K, tl.int64) * score_stride
    projections_ptr += tl.cast(place * (K + 1) * C, tl.int64) * score_stride
    maxima_ptr += place * K
    sums_ptr += place * (MOST + 1) * K * X
    of_bag_ptr = cursor_ptr + place * 6
    used = tl.load(of_bag_ptr + 3, cache_modifier=".cg").to(tl.int32)
    label = tl.load(of_bag_ptr + 4, cache_modifier=".cg").to(tl.int32)
    position = tl.load(of_bag_ptr, cache_modifier=".cg")
    line = place * positions + position
    weight = weight_of_bag(cursor_ptr + model * BAGS * 6, BAGS)
    size = slot_size(used, n_slots, BN)
    first = slot * size
    none = tl.zeros((), tl.float64)
    power_1, power_2, decay, rate, root = none, none, none, none, none
    has_factors = (slot == 0) & (place % BAGS == 0) & (used > 0)
    if has_factors:
        rate_ptr = rates_ptr + (model * positions + position)
        power_1, power_2, decay, rate, root = factors_of_update(rate_ptr, powers_ptr + model * 4, weight_decay)
    wait_for_previous(CHAINED)
    if has_factors:
        tl.store(powers_ptr + model * 4, power_1)
        tl.store(powers_ptr + model * 4 + 1, power_2)
        tl.store(update_ptr + model * 3, decay.to(tl.float32))
        tl.store(update_ptr + model * 3 + 1, rate.to(tl.float32))
        tl.store(update_ptr + model * 3 + 2, root.to(tl.float32))
    if (slot == 0) & (used == 0):
        tl.store(used_ptr + place, used)
    if first < used:
        end = tl.minimum(first + size, used)
        sum_rows(
            scores_ptr, projections_ptr, maxima_ptr, sums_ptr + slot * K * X, first, end, score_stride, K, C, X, BN, BS
        )  # fmt: skip
        tl.debug_barrier()  # every thread's writes come before the count below
        count = tl.cdiv(used, size)
        if tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu") == count - 1:
            total_ptr = sums_ptr + MOST * K * X
            sum_slots(sums_ptr, total_ptr, count, K * X, BS, AT_ONCE)
            tl.debug_barrier()  # they are read again in another order
            losses_of_bag(
                total_ptr, head_bias_ptr + model * parameters, label, weight,
                d_logits_ptr + place * (K + 1) * C, inverses_ptr + place * K, d_pairs_ptr + place * K * K,
                correction_ptr + place * K, losses_ptr + line * 4, K, C, X, BK, BX,
            )  # fmt: skip
            tl.store(used_ptr + place, used)
            tl.store(arrived_ptr + place, 0)
