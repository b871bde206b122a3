"""Triton kernels of the branch pool: partial softmax averages of slots of rows, their sum, and the way back."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import dot_of_pairs, dot_with_float32, wait_for_previous
from acmil.kernels.slots import find_slot, hold_within, slot_size, slots_of_bag, used_rows


@triton.jit
def pool_kernel(
    hidden_ptr, scores_ptr, keep_ptr, parts_ptr, stats_ptr, grams_ptr, offsets_ptr,
    n_rows, n_bags, n_slots, score_stride,
    L: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
    PACKED: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Σ_n e^(S − m) H, Σ_n e^(S − m) and Σ_n e^(S_k − m_k) e^(S_j − m_j) of one slot, with m its own maximum.

    A program has BL columns of H; the sums without H are written by the first of a slot's programs.
    """
    wait_for_previous(CHAINED)
    n_chunks: tl.constexpr = (L + BL - 1) // BL
    slot = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    size = slot_size(used, n_slots, BN)
    _, first, end = find_slot(slot, size, offsets_ptr, n_rows, n_bags, PACKED, SEARCH)
    if first < end:
        branch = tl.arange(0, BK)
        column = chunk * BL + tl.arange(0, BL)
        row = tl.arange(0, BN)
        branch_fits = branch < K
        score_at = hold_within(branch, K, BK).to(tl.int64)[None, :] * score_stride + row[:, None]
        hidden_column = hold_within(column, L, BL)[None, :]
        maximum = tl.full((BK,), float("-inf"), tl.float32)
        total = tl.zeros((BK,), tl.float32)
        acc = tl.zeros((BL, BK), tl.float32)  # the columns of H are the long side of the product
        gram = tl.zeros((BK, BK), tl.float32)
        for n in range(first, end, BN):
            fits = (row < end - n)[:, None] & branch_fits[None, :]
            scores = tl.load(scores_ptr + n + score_at, mask=fits, other=float("-inf"))
            if KEEP:
                kept = tl.load(keep_ptr + n + score_at, mask=fits, other=0)
                scores = tl.where(kept != 0, scores, float("-inf"))
            held = tl.minimum(row, end - n - 1)[:, None] * L
            hidden = tl.load(hidden_ptr + tl.cast(n, tl.int64) * L + held + hidden_column)  # (BN, BL)
            higher = tl.maximum(maximum, tl.max(scores, axis=0))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing kept so far: e^(-inf − 0) is 0, not NaN
            scale = tl.exp(maximum - finite)
            share = tl.exp(scores - finite[None, :])  # (BN, BK)
            total = total * scale + tl.sum(share, axis=0)
            acc = tl.dot(tl.trans(hidden), share.to(hidden.dtype), acc * scale[None, :], input_precision=PRECISION)
            gram = gram * (scale[:, None] * scale[None, :])
            gram = dot_of_pairs(tl.trans(share), share, gram, PRECISION)
            maximum = higher
        part_at = (slot.to(tl.int64) * K + branch[None, :]) * L + column[:, None]
        tl.store(parts_ptr + part_at, acc, mask=branch_fits[None, :] & (column < L)[:, None])
        if chunk == 0:
            stats_at = (slot * K + branch) * 2
            tl.store(stats_ptr + stats_at, maximum, mask=branch_fits)
            tl.store(stats_ptr + stats_at + 1, total, mask=branch_fits)
            pair_at = (slot * K + branch[:, None]) * K + branch[None, :]
            tl.store(grams_ptr + pair_at, gram, mask=branch_fits[:, None] & branch_fits[None, :])


@triton.jit
def combine_branch(
    parts_ptr, stats_ptr, grams_ptr, first_slot, count, k, column,
    L: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Columns of z_k (BL,), the row G_k (BK,), maximum of branch k and the inverse of its sum, from a bag's slots."""
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    maximum = tl.full((BK,), float("-inf"), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    gram = tl.zeros((BK,), tl.float32)
    z = tl.zeros((BL,), tl.float32)
    for s in range(0, count, BS):
        slot = first_slot + s + tl.arange(0, BS)
        slot_fits = slot < first_slot + count
        fits = slot_fits[:, None] & branch_fits[None, :]
        row = slot[:, None] * K + branch[None, :]
        slot_maximum = tl.load(stats_ptr + row * 2, mask=fits, other=float("-inf"))  # (BS, BK)
        slot_total = tl.load(stats_ptr + row * 2 + 1, mask=fits, other=0.0)
        slot_gram = tl.load(grams_ptr + (slot[:, None] * K + k) * K + branch[None, :], mask=fits, other=0.0)
        part_at = (slot.to(tl.int64)[:, None] * K + k) * L + column[None, :]
        part = tl.load(parts_ptr + part_at, mask=slot_fits[:, None] & (column < L)[None, :], other=0.0)
        higher = tl.maximum(maximum, tl.max(slot_maximum, axis=0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        scale = tl.exp(maximum - finite)
        own_scale = tl.sum(tl.where(branch == k, scale, 0.0), axis=0)
        weight = tl.exp(slot_maximum - finite[None, :])
        own = tl.sum(tl.where(branch[None, :] == k, weight, 0.0), axis=1)  # (BS,)
        total = total * scale + tl.sum(weight * slot_total, axis=0)
        gram = gram * scale * own_scale + tl.sum(own[:, None] * weight * slot_gram, axis=0)
        z = z * own_scale + tl.sum(own[:, None] * part, axis=0)
        maximum = higher
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)  # (BK,)
    own_inverse = tl.sum(tl.where(branch == k, inverse, 0.0), axis=0)
    own_maximum = tl.sum(tl.where(branch == k, maximum, 0.0), axis=0)
    return z * own_inverse, gram * own_inverse * inverse, own_maximum, own_inverse


@triton.jit
def combine_kernel(
    parts_ptr, slot_stats_ptr, grams_ptr, pooled_ptr, stats_ptr, gram_ptr, offsets_ptr, n_rows, n_bags, n_slots,
    L: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
    PACKED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum up z (B, K, L), maxima and inverse sums (B, K, 2) and G (B, K, K): a branch's BL columns a program."""
    wait_for_previous(CHAINED)
    n_chunks: tl.constexpr = (L + BL - 1) // BL
    bag = tl.program_id(0) // (K * n_chunks)
    k = tl.program_id(0) // n_chunks % K
    chunk = tl.program_id(0) % n_chunks
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    first_slot, count = slots_of_bag(bag, slot_size(used, n_slots, BN), offsets_ptr, n_rows, PACKED)
    column = chunk * BL + tl.arange(0, BL)
    z, gram, maximum, inverse = combine_branch(
        parts_ptr, slot_stats_ptr, grams_ptr, first_slot, count, k, column, L, K, BK, BL, BS
    )
    line = bag * K + k
    tl.store(pooled_ptr + line.to(tl.int64) * L + column, z, mask=column < L)
    if chunk == 0:
        branch = tl.arange(0, BK)
        tl.store(stats_ptr + line * 2, maximum)
        tl.store(stats_ptr + line * 2 + 1, inverse)
        tl.store(gram_ptr + line * K + branch, gram, mask=branch < K)


@triton.jit
def attention_kernel(
    scores_ptr, keep_ptr, stats_ptr, attention_ptr, offsets_ptr, n_rows, n_bags, n_slots,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, SEARCH: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """P = e^(S − m) / Σ e^(S − m) of one slot, exactly 0 where an instance is not kept."""
    wait_for_previous(CHAINED)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    size = slot_size(used, n_slots, BN)
    bag, first, end = find_slot(tl.program_id(0), size, offsets_ptr, n_rows, n_bags, PACKED, SEARCH)
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    if first < end:
        stats_at = (bag * K + branch) * 2
        maximum = tl.load(stats_ptr + stats_at, mask=branch_fits, other=0.0)
        inverse = tl.load(stats_ptr + stats_at + 1, mask=branch_fits, other=0.0)
        for n in range(first, end, BN):
            row = n + tl.arange(0, BN)
            fits = branch_fits[:, None] & (row < end)[None, :]
            at = branch.to(tl.int64)[:, None] * n_rows + row[None, :]
            scores = tl.load(scores_ptr + at, mask=fits, other=float("-inf"))
            if KEEP:
                kept = tl.load(keep_ptr + at, mask=fits, other=0)
                scores = tl.where(kept != 0, scores, float("-inf"))
            tl.store(attention_ptr + at, tl.exp(scores - maximum[:, None]) * inverse[:, None], mask=fits)


@triton.jit
def dots_kernel(
    attention_ptr, d_attention_ptr, dots_ptr, offsets_ptr, n_rows, n_bags, n_slots,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr, SEARCH: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Σ_n P dP over one slot, (slots, K), for the part of dP that comes from outside."""
    wait_for_previous(CHAINED)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    size = slot_size(used, n_slots, BN)
    _, first, end = find_slot(tl.program_id(0), size, offsets_ptr, n_rows, n_bags, PACKED, SEARCH)
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    if first < end:
        total = tl.zeros((BK,), tl.float32)
        for n in range(first, end, BN):
            row = n + tl.arange(0, BN)
            fits = branch_fits[:, None] & (row < end)[None, :]
            at = branch.to(tl.int64)[:, None] * n_rows + row[None, :]
            attention = tl.load(attention_ptr + at, mask=fits, other=0.0)
            total += tl.sum(attention * tl.load(d_attention_ptr + at, mask=fits, other=0.0), axis=1)
        tl.store(dots_ptr + tl.program_id(0) * K + branch, total, mask=branch_fits)


@triton.jit
def pool_backward_kernel(
    hidden_ptr, attention_ptr, pooled_ptr, gram_ptr, d_pooled_ptr, d_attention_ptr, d_gram_ptr, dots_ptr,
    d_hidden_ptr, d_scores_ptr, offsets_ptr, n_rows, n_bags, n_slots,
    L: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    D_POOLED: tl.constexpr, D_ATTENTION: tl.constexpr, D_GRAM: tl.constexpr, PACKED: tl.constexpr,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The gradients dH = Pᵀ dz and dS = P ⊙ (dP − Σ_n P dP) of one slot."""
    wait_for_previous(CHAINED)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    size = slot_size(used, n_slots, BN)
    bag, first, end = find_slot(tl.program_id(0), size, offsets_ptr, n_rows, n_bags, PACKED, SEARCH)
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    row = tl.arange(0, BN)
    depth = tl.arange(0, BL)
    for n in range(first, end, BN):
        row_fits = row < end - n
        held = tl.minimum(row, end - n - 1)[:, None] * L
        fits = row_fits[:, None] & branch_fits[None, :]
        at = branch.to(tl.int64)[None, :] * n_rows + (n + row)[:, None]
        attention = tl.load(attention_ptr + at, mask=fits, other=0.0)  # (BN, BK)
        d_attention = tl.zeros((BN, BK), tl.float32)
        correction = tl.zeros((BK,), tl.float32)
        if D_POOLED:
            for l in range(0, L, BL):  # noqa: E741
                column = l + depth
                z_at = (bag * K + branch[None, :]).to(tl.int64) * L + column[:, None]
                z_fits = branch_fits[None, :] & (column < L)[:, None]
                d_z = tl.load(d_pooled_ptr + z_at, mask=z_fits, other=0.0).to(tl.float32)
                z = tl.load(pooled_ptr + z_at, mask=z_fits, other=0.0)
                hidden = tl.load(hidden_ptr + tl.cast(n, tl.int64) * L + held + hold_within(column, L, BL)[None, :])
                d_attention = dot_with_float32(hidden, d_z, d_attention, PRECISION)
                correction += tl.sum(d_z * z, axis=0)
        if D_GRAM:
            pair_fits = branch_fits[:, None] & branch_fits[None, :]
            pair_at = bag * K * K + branch[:, None] * K + branch[None, :]
            swapped_at = bag * K * K + branch[None, :] * K + branch[:, None]
            d_pairs = tl.load(d_gram_ptr + pair_at, mask=pair_fits, other=0.0)
            d_pairs += tl.load(d_gram_ptr + swapped_at, mask=pair_fits, other=0.0)
            d_attention = dot_of_pairs(attention, d_pairs, d_attention, PRECISION)
            # Both are symmetric, so the sum over rows is that over columns.
            correction += tl.sum(d_pairs * tl.load(gram_ptr + pair_at, mask=pair_fits, other=0.0), axis=0)
        if D_ATTENTION:
            d_attention += tl.load(d_attention_ptr + at, mask=fits, other=0.0)
            first_slot, count = slots_of_bag(bag, size, offsets_ptr, n_rows, PACKED)
            for s in range(0, count, BS):
                slot = s + tl.arange(0, BS)
                dots_at = (first_slot + slot)[:, None] * K + branch[None, :]
                dots_fits = (slot < count)[:, None] & branch_fits[None, :]
                correction += tl.sum(tl.load(dots_ptr + dots_at, mask=dots_fits, other=0.0), axis=0)
        tl.store(d_scores_ptr + at, attention * (d_attention - correction[None, :]), mask=fits)
        for l in range(0, L, BL):  # noqa: E741
            column = l + depth
            d_hidden = tl.zeros((BN, BL), tl.float32)
            if D_POOLED:
                z_at = (bag * K + branch[:, None]).to(tl.int64) * L + column[None, :]
                z_fits = branch_fits[:, None] & (column < L)[None, :]
                d_z = tl.load(d_pooled_ptr + z_at, mask=z_fits, other=0.0).to(d_hidden_ptr.dtype.element_ty)
                d_hidden = tl.dot(attention.to(d_z.dtype), d_z, input_precision=PRECISION)
            hidden_at = tl.cast(n, tl.int64) * L + row[:, None] * L + column[None, :]
            hidden_fits = row_fits[:, None] & (column < L)[None, :]
            tl.store(d_hidden_ptr + hidden_at, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=hidden_fits)
