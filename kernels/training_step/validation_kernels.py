"""The Triton kernels that end the forward pass of validation: logits of a bag, and how its attention is spread."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import wait_for_previous
from acmil.kernels.slots import slot_size
from acmil.kernels.top_k_masking.kernels import LAST_ROW, find_top, key_scores, save_top, score_keys, top_of_slots
from acmil.kernels.training_step.update_kernel import next_bag


@triton.jit
def bag_logits_kernel(
    scores_ptr, projections_ptr, sums_ptr, maxima_ptr, inverses_ptr, arrived_ptr, head_bias_ptr, cursor_ptr,
    current_ptr, logits_ptr, n_slots, bags_a_model, parameters, positions, score_stride,
    K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Logits of bags from the scores and the projections of their rows on the bag's head, `mean_k Σ_n P_k (H Wᵀ)`.

    A slot of rows leaves its maxima and sums, `Σ e_k` and `Σ e_k q_c` for each branch; the program that comes last puts
    them together. The maxima and inverse sums of the whole bag are written too, (K,) each, and what the launch behind
    this one must know of the bag: its number of rows, and its line in what is written.
    """
    wait_for_previous(CHAINED)
    X: tl.constexpr = 1 + C
    slot = tl.program_id(0) % n_slots
    bag = tl.program_id(0) // n_slots
    scores_ptr += tl.cast(bag * K, tl.int64) * score_stride
    projections_ptr += tl.cast(bag * (K + 1) * C, tl.int64) * score_stride
    cursor_ptr += bag * 6
    sums_ptr += bag * (2 * MOST + 1) * BS
    maxima_ptr += bag * K
    used = tl.load(cursor_ptr + 3).to(tl.int32)
    if slot == 0:
        tl.store(current_ptr + 2 * bag, used)
        tl.store(current_ptr + 2 * bag + 1, bag * (positions + 1) + tl.load(cursor_ptr).to(tl.int32))
    size = slot_size(used, n_slots, BN)
    first = slot * size
    s = tl.arange(0, BS)
    branch = s // X
    fits = branch < K
    is_projection = fits & (s % X > 0)
    row = tl.arange(0, BN)[:, None]
    score_at = branch[None, :] * score_stride + row
    projection_at = (K * C - 1 + s % X)[None, :] * score_stride + row
    if first < used:
        end = tl.minimum(first + size, used)
        highest = tl.full((BN, BS), float("-inf"), tl.float32)
        for n in range(first, end, BN):
            score_fits = (row < end - n) & fits[None, :]
            highest = tl.maximum(highest, tl.load(scores_ptr + n + score_at, mask=score_fits, other=float("-inf")))
        maximum = tl.where(fits, tl.max(highest, axis=0), 0.0)
        sums = tl.zeros((BN, BS), tl.float32)
        for n in range(first, end, BN):
            row_fits = row < end - n
            score = tl.load(scores_ptr + n + score_at, mask=row_fits & fits[None, :], other=float("-inf"))
            factor = tl.load(projections_ptr + n + projection_at, mask=row_fits & is_projection[None, :], other=1.0)
            sums += tl.exp(score - maximum[None, :]) * factor
        tl.store(sums_ptr + 2 * slot * BS + s, maximum)
        tl.store(sums_ptr + (2 * slot + 1) * BS + s, tl.sum(sums, axis=0))
        tl.debug_barrier()  # every thread's writes come before the count below
        count = tl.cdiv(used, size)
        if tl.atomic_add(arrived_ptr + bag, 1, sem="acq_rel", scope="gpu") == count - 1:
            highest = tl.full((BN, BS), float("-inf"), tl.float32)
            for n in range(0, count, BN):
                at = 2 * (n + row) * BS + s[None, :]
                highest = tl.maximum(highest, tl.load(sums_ptr + at, mask=row < count - n, other=float("-inf")))
            maximum = tl.max(highest, axis=0)
            sums = tl.zeros((BN, BS), tl.float32)
            for n in range(0, count, BN):
                at = 2 * (n + row) * BS + s[None, :]
                of_slot = tl.load(sums_ptr + at, mask=row < count - n, other=float("-inf"))
                part = tl.load(sums_ptr + at + BS, mask=row < count - n, other=0.0)
                sums += part * tl.exp(of_slot - maximum[None, :])
            total_ptr = sums_ptr + 2 * MOST * BS
            tl.store(total_ptr + s, tl.sum(sums, axis=0))
            tl.store(maxima_ptr + branch, maximum, mask=fits & (s % X == 0))
            tl.debug_barrier()  # they are read again in another order
            k = tl.arange(0, BK)
            c = tl.arange(0, BC)
            inverse = 1.0 / tl.load(total_ptr + k * X, mask=k < K, other=1.0)
            tl.store(inverses_ptr + bag * K + k, inverse, mask=k < K)
            both_fit = (k < K)[:, None] & (c < C)[None, :]
            of_branches = tl.load(total_ptr + k[:, None] * X + 1 + c[None, :], mask=both_fit, other=0.0)
            logits = tl.sum(of_branches * inverse[:, None], axis=0) / K
            bias_ptr = head_bias_ptr + bag // bags_a_model * parameters + K * C
            logits += tl.load(bias_ptr + c, mask=c < C, other=0.0)
            line = bag * (positions + 1) + tl.load(cursor_ptr).to(tl.int32)
            tl.store(logits_ptr + line * C + c, logits, mask=c < C)
            tl.store(arrived_ptr + bag, 0)


@triton.jit
def spread_kernel(
    scores_ptr, maxima_ptr, inverses_ptr, picks_ptr, entropies_ptr, arrived_ptr, current_ptr, spread_ptr, cursor_ptr,
    bags_ptr, n_slots, positions, score_stride, n_top,
    K: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Spread of the mean attention of bags: its entropy, of log N, and what the `n_top` highest rows have together.

    A slot is one block of rows; the program that comes last puts them together. The cursor moves to the next bag.
    """
    wait_for_previous(CHAINED)
    slot = tl.program_id(0) % n_slots
    bag = tl.program_id(0) // n_slots
    scores_ptr += tl.cast(bag * K, tl.int64) * score_stride
    picks_ptr += bag * n_slots * (2 * BP)
    entropies_ptr += bag * n_slots
    used = tl.load(current_ptr + 2 * bag)
    size = slot_size(used, n_slots, BN)
    first = slot * size
    if slot == 0:  # the launch before this one has read it, and this one does not
        next_bag(cursor_ptr + bag * 6, bags_ptr + bag * positions * 3, positions, used)
    if first < used:
        rows = first + tl.arange(0, BN)
        fits = rows < used
        mean = tl.zeros((BN,), tl.float32)
        for k in range(K):
            score = tl.load(scores_ptr + k * score_stride + rows, mask=fits, other=float("-inf"))
            inverse = tl.load(inverses_ptr + bag * K + k)
            mean += tl.exp(score - tl.load(maxima_ptr + bag * K + k)) * inverse
        mean = mean / K
        top, top_rows = find_top(score_keys(mean, fits), tl.where(fits, rows, LAST_ROW), n_top, BP)
        save_top(picks_ptr, slot, top, top_rows, BP)
        positive = tl.where(mean > 0, mean, 1.0)  # of nothing 0 log 0 = 0
        tl.store(entropies_ptr + slot, tl.sum(-positive * tl.log(positive), axis=0))
        tl.debug_barrier()  # every thread's writes come before the count below
        count = tl.cdiv(used, size)
        if tl.atomic_add(arrived_ptr + bag, 1, sem="acq_rel", scope="gpu") == count - 1:
            top, top_rows = top_of_slots(picks_ptr, count, n_top, BN, BP)
            mass = tl.sum(tl.where(top_rows != LAST_ROW, key_scores(top), 0.0), axis=0)
            at = tl.arange(0, BN)
            entropy = tl.zeros((BN,), tl.float32)
            for n in range(0, count, BN):
                entropy += tl.load(entropies_ptr + n + at, mask=n + at < count, other=0.0)
            entropy = tl.sum(entropy, axis=0) / tl.log(tl.maximum(used, 2).to(tl.float32))
            line = tl.load(current_ptr + 2 * bag + 1)
            tl.store(spread_ptr + line * 2, tl.where(used > 1, entropy, 1.0))  # one row: as even as it can be
            tl.store(spread_ptr + line * 2 + 1, tl.where(used > n_top, mass, 1.0))
            tl.store(arrived_ptr + bag, 0)
