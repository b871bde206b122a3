"""The Triton kernel in the middle of a training step: pooled features, heads, losses and their gradients."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.branch_pool.kernels import combine_branch
from acmil.kernels.products import wait_for_previous
from acmil.kernels.slots import slot_size, slots_of_bag


@triton.jit
def cross_entropy(logits, label, classes, C: tl.constexpr):
    """Cross entropy of rows of logits (R, BC), and its gradient."""
    fits = classes < C
    logits = tl.where(fits[None, :], logits, float("-inf"))
    maximum = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - maximum[:, None])
    total = tl.sum(exponentials, axis=1)
    of_label = (classes == label)[None, :]
    loss = maximum + tl.log(total) - tl.sum(tl.where(of_label, logits, 0.0), axis=1)
    return loss, exponentials / total[:, None] - tl.where(of_label, 1.0, 0.0)


@triton.jit
def diversity(gram_ptr, d_pairs_ptr, K: tl.constexpr, BK: tl.constexpr):
    """Mean cosine similarity of the branches from their Gram matrix; its symmetrised gradient is written.

    `dL/dG_kj + dL/dG_jk = 2 c / sqrt(G_kk G_jj)` and `2 dL/dG_kk = −2 c Σ_j cos_kj / G_kk`, with `c = 1 / (K (K − 1))`.
    """
    branch = tl.arange(0, BK)
    fits = (branch < K)[:, None] & (branch < K)[None, :]
    own = branch[:, None] == branch[None, :]
    pair_at = branch[:, None] * K + branch[None, :]
    gram = tl.load(gram_ptr + pair_at, mask=fits, other=0.0)
    square = tl.load(gram_ptr + branch * (K + 1), mask=branch < K, other=1.0)  # G_kk
    norm = tl.sqrt(square)
    inverse = 1.0 / (norm[:, None] * norm[None, :])
    cosine = tl.where(fits & (branch[:, None] != branch[None, :]), gram * inverse, 0.0)
    scale: tl.constexpr = 1.0 / (K * (K - 1))
    across = tl.sum(cosine, axis=1)
    d_pairs = 2.0 * scale * tl.where(own, -(across / square)[:, None], inverse)
    tl.store(d_pairs_ptr + pair_at, d_pairs, mask=fits)
    return tl.sum(across, axis=0) * scale


@triton.jit
def heads_and_losses(
    pooled_ptr, gram_ptr, parameters_ptr, d_parameters_ptr, d_pooled_ptr, d_pairs_ptr, correction_ptr, losses_ptr,
    label, L: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Logits of bag and branches, the three losses, and the gradients of the heads and of z.

    The heads' parameters and gradients lie one after another: Wc (K, C, L), bc (K, C), Ws (C, L), bs (C,). The gradient
    of z is written as (TERMS · BK, L): in two terms where the type is half, so that it loses nothing.
    """
    branch = tl.arange(0, BK)
    column = tl.arange(0, BL)
    classes = tl.arange(0, BC)
    branch_fits = branch < K
    fits = branch_fits[:, None] & (column < L)[None, :]
    z = tl.load(pooled_ptr + branch[:, None] * L + column[None, :], mask=fits, other=0.0)  # (BK, BL)
    mean = tl.sum(z, axis=0) / K
    bag_ptr = parameters_ptr + K * C * (L + 1)
    logit_at = branch[:, None] * C + classes[None, :]
    logit_fits = branch_fits[:, None] & (classes < C)[None, :]
    logits = tl.load(parameters_ptr + K * C * L + logit_at, mask=logit_fits, other=0.0)  # (BK, BC)
    bag_logits = tl.load(bag_ptr + C * L + classes, mask=classes < C, other=0.0)[None, :]  # (1, BC)
    for c in tl.static_range(C):
        weight = tl.load(parameters_ptr + (branch[:, None] * C + c) * L + column[None, :], mask=fits, other=0.0)
        bag_weight = tl.load(bag_ptr + c * L + column, mask=column < L, other=0.0)
        logits += tl.where(classes[None, :] == c, tl.sum(z * weight, axis=1)[:, None], 0.0)
        bag_logits += tl.where(classes[None, :] == c, tl.sum(mean * bag_weight, axis=0), 0.0)
    bag_loss, d_bag_logits = cross_entropy(bag_logits, label, classes, C)
    bag_loss = tl.sum(bag_loss, axis=0)
    branch_loss = 0.0
    diversity_loss = 0.0
    d_logits = tl.zeros((BK, BC), tl.float32)
    if K > 1:
        losses, d_logits = cross_entropy(logits, label, classes, C)
        branch_loss = tl.sum(tl.where(branch_fits, losses, 0.0), axis=0) / K
        d_logits = tl.where(branch_fits[:, None], d_logits, 0.0) / K
        diversity_loss = diversity(gram_ptr, d_pairs_ptr, K, BK)
    d_z = tl.zeros((BK, BL), tl.float32)
    d_bag_ptr = d_parameters_ptr + K * C * (L + 1)
    for c in tl.static_range(C):
        d_logit = tl.sum(tl.where(classes[None, :] == c, d_logits, 0.0), axis=1)  # (BK,)
        d_bag_logit = tl.sum(tl.where(classes[None, :] == c, d_bag_logits, 0.0))
        at = (branch[:, None] * C + c) * L + column[None, :]
        d_z += d_logit[:, None] * tl.load(parameters_ptr + at, mask=fits, other=0.0)
        d_z += d_bag_logit / K * tl.load(bag_ptr + c * L + column, mask=column < L, other=0.0)[None, :]
        tl.store(d_parameters_ptr + at, d_logit[:, None] * z, mask=fits)
        tl.store(d_bag_ptr + c * L + column, d_bag_logit * mean, mask=column < L)
    tl.store(d_parameters_ptr + K * C * L + logit_at, d_logits, mask=logit_fits)
    tl.store(d_bag_ptr + C * L + classes, tl.sum(d_bag_logits, axis=0), mask=classes < C)
    d_z = tl.where(fits, d_z, 0.0)  # branches that there are not are zeros
    d_z_at = branch[:, None] * L + column[None, :]
    high = d_z.to(d_pooled_ptr.dtype.element_ty)
    tl.store(d_pooled_ptr + d_z_at, high, mask=(column < L)[None, :])
    if TERMS == 2:
        rest = (d_z - high.to(tl.float32)).to(d_pooled_ptr.dtype.element_ty)
        tl.store(d_pooled_ptr + BK * L + d_z_at, rest, mask=(column < L)[None, :])
    # The diversity loss has no part in Σ_n P dP: a cosine does not change with the length of P_k.
    tl.store(correction_ptr + branch, tl.sum(d_z * z, axis=1), mask=branch_fits)
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
def heads_kernel(
    parts_ptr, slot_stats_ptr, grams_ptr, pooled_ptr, stats_ptr, gram_ptr, arrived_ptr,
    parameters_ptr, d_parameters_ptr, d_pooled_ptr, d_pairs_ptr, correction_ptr,
    cursor_ptr, losses_ptr, rates_ptr, powers_ptr, update_ptr, used_ptr, n_slots, weight_decay,
    L: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    BS: tl.constexpr, WHOLE_L: tl.constexpr, BC: tl.constexpr, TERMS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the partial pools, BL columns of a branch a program; the program that comes last does the rest of the middle.

    `cursor` holds position, first row, 0, length, label and step number of the bag.
    """
    wait_for_previous(CHAINED)
    n_chunks: tl.constexpr = (L + BL - 1) // BL
    k = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    offsets_ptr = cursor_ptr + 2
    used = tl.load(cursor_ptr + 3).to(tl.int32)
    first_slot, count = slots_of_bag(0, slot_size(used, n_slots, BN), offsets_ptr, 0, True)
    column = chunk * BL + tl.arange(0, BL)
    z, gram, maximum, inverse = combine_branch(
        parts_ptr, slot_stats_ptr, grams_ptr, first_slot, count, k, column, L, K, BK, BL, BS
    )
    tl.store(pooled_ptr + k * L + column, z, mask=column < L)
    if chunk == 0:
        branch = tl.arange(0, BK)
        tl.store(stats_ptr + k * 2, maximum)
        tl.store(stats_ptr + k * 2 + 1, inverse)
        tl.store(gram_ptr + k * K + branch, gram, mask=branch < K)
    tl.debug_barrier()  # every thread's writes come before the count below
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        position = tl.load(cursor_ptr)
        heads_and_losses(
            pooled_ptr, gram_ptr, parameters_ptr, d_parameters_ptr, d_pooled_ptr, d_pairs_ptr, correction_ptr,
            losses_ptr + position * 4, tl.load(cursor_ptr + 4).to(tl.int32), L, K, C, BK, WHOLE_L, BC, TERMS,
        )  # fmt: skip
        prepare_update(rates_ptr, powers_ptr, update_ptr, position, weight_decay)
        tl.store(used_ptr, used)
        tl.store(arrived_ptr, 0)
