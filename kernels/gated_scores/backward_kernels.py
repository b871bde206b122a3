"""Triton kernels of the backward pass: two over the rows, one for the weights, one that sums in fixed order."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import dot_of_pairs, sigmoid, tanh, wait_for_previous
from acmil.kernels.slots import used_rows


@triton.jit
def load_attention(
    scores_ptr, stats_ptr, rows, row_fits, score_stride, K: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """P = e^(S − m) / Σ e^(S − m) of some rows of one bag, (BN, BK), exactly 0 where nothing is attended to."""
    branch = tl.arange(0, BK)
    branch_fits = branch < K
    at = branch.to(tl.int64)[None, :] * score_stride + rows[:, None]
    scores = tl.load(scores_ptr + at, mask=row_fits[:, None] & branch_fits[None, :], other=float("-inf"))
    maximum = tl.load(stats_ptr + branch * 2, mask=branch_fits, other=0.0)
    inverse = tl.load(stats_ptr + branch * 2 + 1, mask=branch_fits, other=0.0)
    return tl.exp(scores - maximum[None, :]) * inverse[None, :]


@triton.jit
def pool_gradient(
    hidden, d_pooled, first, attention, d_pairs_ptr, correction_ptr,
    L: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient `dS = P ⊙ (dP − Σ_n P dP)` of a block of rows of one bag, (BN, BK).

    `dP = H dzᵀ + P dG` with `dG` symmetrised; the sum over the bag needs no pass over the rows and is given.
    """
    branch = tl.arange(0, BK)
    d_terms = tl.zeros((BN, TERMS * BK), tl.float32)
    for l in range(0, L, BL):  # noqa: E741
        d_terms = tl.dot(hidden.load([first, l]), d_pooled.load([0, l]).T, d_terms, input_precision=PRECISION)
    d_attention = tl.sum(tl.reshape(d_terms, (BN, TERMS, BK)), axis=1)
    if PAIRS:
        pair_fits = (branch < K)[:, None] & (branch < K)[None, :]
        d_pairs = tl.load(d_pairs_ptr + branch[:, None] * K + branch[None, :], mask=pair_fits, other=0.0)
        d_attention = dot_of_pairs(attention, d_pairs, d_attention, PRECISION)
    correction = tl.load(correction_ptr + branch, mask=branch < K, other=0.0)
    return attention * (d_attention - correction[None, :])


@triton.jit
def gate_backward_kernel(
    hidden, gate_ptr, w_ptr, d_scores_ptr, scores_ptr, stats_ptr, d_pooled, d_pairs_ptr, correction_ptr,
    d_gate_ptr, small_ptr, offsets_ptr, n_rows, n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, TERMS: tl.constexpr, D_SCORES: tl.constexpr, POOL: tl.constexpr, PAIRS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The gradients of the gate's arguments, (N, 2A), and each program's share of dbV, dbU, dw and db.

    What reaches the scores comes as `d_scores`, or (POOL, one bag) is worked out here from the gradient of the pooled
    features: `hidden` and `d_pooled` are descriptors for bulk copies then. `d_gate` may be `gate` itself.
    """
    wait_for_previous(CHAINED)
    dtype = d_gate_ptr.dtype.element_ty
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    branch = tl.arange(0, BK)
    gate = tl.arange(0, BA)
    gate_fits = gate < A
    w_fits = (branch < K)[:, None] & gate_fits[None, :]
    w = tl.load(w_ptr + branch[:, None] * A + gate[None, :], mask=w_fits, other=0.0)
    v_total = tl.zeros((BA,), tl.float32)
    u_total = tl.zeros((BA,), tl.float32)
    w_total = tl.zeros((BA, BK), tl.float32)
    b_total = tl.zeros((BK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(used, BN), tl.num_programs(0)):
        first = block * BN
        row_fits = row < used - first
        at = row[:, None] * (2 * A) + gate[None, :]
        fits = row_fits[:, None] & gate_fits[None, :]
        gate_block_ptr = gate_ptr + tl.cast(first, tl.int64) * (2 * A)
        of_v = tl.load(gate_block_ptr + at, mask=fits, other=0.0)
        of_u = tl.load(gate_block_ptr + A + at, mask=fits, other=0.0)
        d_scores = tl.zeros((BN, BK), tl.float32)
        if POOL:
            attention = load_attention(scores_ptr, stats_ptr, first + row, row_fits, score_stride, K, BK)
            d_scores = pool_gradient(
                hidden, d_pooled, first, attention, d_pairs_ptr, correction_ptr, L, K, BN, BD, BK, TERMS, PAIRS,
                PRECISION,
            )  # fmt: skip
            d_scores = tl.where(row_fits[:, None], d_scores, 0.0)
        if D_SCORES:
            scores_at = branch.to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
            scores_fit = row_fits[:, None] & (branch < K)[None, :]
            d_scores += tl.load(d_scores_ptr + scores_at, mask=scores_fit, other=0.0).to(tl.float32)
        of_v = tanh(of_v.to(tl.float32), FAST)
        of_u = sigmoid(of_u.to(tl.float32), FAST)
        low = d_scores.to(dtype)
        d_gate = tl.dot(low, w, input_precision=PRECISION)  # (BN, BA)
        d_v = d_gate * of_u * (1.0 - of_v * of_v)
        d_u = d_gate * of_v * of_u * (1.0 - of_u)
        d_gate_block_ptr = d_gate_ptr + tl.cast(first, tl.int64) * (2 * A)
        tl.store(d_gate_block_ptr + at, d_v.to(dtype), mask=fits)
        tl.store(d_gate_block_ptr + A + at, d_u.to(dtype), mask=fits)
        v_total += tl.sum(d_v, axis=0)
        u_total += tl.sum(d_u, axis=0)
        b_total += tl.sum(d_scores, axis=0)
        w_total = tl.dot(tl.trans((of_v * of_u).to(dtype)), low, w_total, input_precision=PRECISION)
    small_ptr += tl.program_id(0) * (2 * A + K * A + K)
    tl.store(small_ptr + gate, v_total, mask=gate_fits)
    tl.store(small_ptr + A + gate, u_total, mask=gate_fits)
    w_total_at = branch[None, :] * A + gate[:, None]
    tl.store(small_ptr + 2 * A + w_total_at, w_total, mask=(branch < K)[None, :] & gate_fits[:, None])
    tl.store(small_ptr + 2 * A + K * A + branch, b_total, mask=branch < K)


@triton.jit
def reduction_backward_kernel(
    hidden, d_gate, gate_weight, d_reduced, d_hidden_ptr, scores_ptr, stats_ptr, d_pooled, offsets_ptr, n_rows,
    n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, D_HIDDEN: tl.constexpr, POOL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """d(X W1ᵀ) = (dH + [dV' dU'] [V; U]) ⊙ [H > 0] in tiles of (BN, BL), with Pᵀ dz for dH where POOL.

    The first four, and `d_pooled`, are descriptors for bulk copies. Rows behind the last one used, up to a
    whole tile, are overwritten. The last rows come first: they are those that L2 still holds.
    """
    wait_for_previous(CHAINED)
    n_columns: tl.constexpr = (L + BL - 1) // BL
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    n_blocks = tl.cdiv(used, BN)
    for tile in range(tl.program_id(0), n_blocks * n_columns, tl.num_programs(0)):
        first = (n_blocks - 1 - tile // n_columns) * BN
        first_column = (tile % n_columns) * BL
        column = first_column + tl.arange(0, BL)
        row_fits = row < used - first
        acc = tl.zeros((BN, BL), tl.float32)
        for a in range(0, 2 * A, BD):
            acc = tl.dot(d_gate.load([first, a]), gate_weight.load([a, first_column]), acc, input_precision=PRECISION)
        hidden_block = hidden.load([first, first_column])
        if POOL:
            attention = load_attention(scores_ptr, stats_ptr, first + row, row_fits, score_stride, K, BK)
            d_z = d_pooled.load([0, first_column])
            acc = tl.dot(attention.to(d_z.dtype), d_z, acc, input_precision=PRECISION)
        if D_HIDDEN:
            at = tl.cast(first, tl.int64) * L + row[:, None] * L + column[None, :]
            fits = row_fits[:, None] & (column < L)[None, :]
            acc += tl.load(d_hidden_ptr + at, mask=fits, other=0.0).to(tl.float32)
        d_reduced.store([first, first_column], tl.where(hidden_block > 0, acc, 0.0).to(d_reduced.dtype))


@triton.jit
def active_splits(used, n_splits, LEAST: tl.constexpr):
    """Into how many shares the rows are cut for the weight gradient: few for a short bag, `n_splits` at most."""
    return tl.minimum(n_splits, tl.cdiv(used, LEAST))


@triton.jit
def rows_product(
    left, right, left_ptr, right_ptr, right_first, tile, first, end,
    M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BM, BC) tile of leftᵀ right over the rows of left from first to end, with its places and their mask.

    Whole blocks of rows come by bulk copies; what is left of them by masked loads, as the next rows are not the bag's.
    """
    n_columns: tl.constexpr = (C + BC - 1) // BC
    left_column = (tile // n_columns) * BM
    right_column = (tile % n_columns) * BC
    acc = tl.zeros((BM, BC), tl.float32)
    whole_end = first + (end - first) // BN * BN
    for n in range(first, whole_end, BN):
        left_block = left.load([n, left_column])
        right_block = right.load([right_first + n, right_column])
        acc = tl.dot(left_block.T, right_block, acc, input_precision=PRECISION)
    left_columns = left_column + tl.arange(0, BM)
    right_columns = right_column + tl.arange(0, BC)
    if whole_end < end:
        rows = whole_end + tl.arange(0, BN)
        left_at = rows.to(tl.int64)[:, None] * M + left_columns[None, :]
        right_at = (right_first + rows).to(tl.int64)[:, None] * C + right_columns[None, :]
        row_fits = (rows < end)[:, None]
        left_rest = tl.load(left_ptr + left_at, mask=row_fits & (left_columns < M)[None, :], other=0.0)
        right_rest = tl.load(right_ptr + right_at, mask=row_fits & (right_columns < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(left_rest), right_rest, acc, input_precision=PRECISION)
    at = left_columns[:, None] * C + right_columns[None, :]
    return acc, at, (left_columns < M)[:, None] & (right_columns < C)[None, :]


@triton.jit
def weight_gradient_kernel(
    d_reduced, x, d_gate, hidden, d_reduced_ptr, x_ptr, d_gate_ptr, hidden_ptr,
    large_ptr, x_first_ptr, offsets_ptr, n_rows, n_bags, n_splits,
    D: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    LEAST: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """dW1 = d(X W1ᵀ)ᵀ X and [dV; dU] = [dV' dU']ᵀ H in one launch, a tile and a share of the rows a program."""
    wait_for_previous(CHAINED)
    n_reduction_tiles: tl.constexpr = ((L + BM - 1) // BM) * ((D + BC - 1) // BC)
    n_gate_tiles: tl.constexpr = ((G + BM - 1) // BM) * ((L + BC - 1) // BC)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    splits = active_splits(used, n_splits, LEAST)
    tile = tl.program_id(0) % (n_reduction_tiles + n_gate_tiles)
    split = tl.program_id(0) // (n_reduction_tiles + n_gate_tiles)
    if split < splits:
        share = tl.cdiv(tl.cdiv(used, splits), BN) * BN
        first = split * share
        end = tl.maximum(tl.minimum(first + share, used), first)
        out_ptr = large_ptr + split.to(tl.int64) * (L * D + G * L)
        zero = tl.zeros((), tl.int32)
        if tile < n_reduction_tiles:
            x_first = zero
            if WINDOW:
                x_first = tl.load(x_first_ptr).to(tl.int32)
            acc, at, fits = rows_product(
                d_reduced, x, d_reduced_ptr, x_ptr, x_first, tile, first, end, L, D, BM, BC, BN, PRECISION
            )
            tl.store(out_ptr + at, acc, mask=fits)
        else:
            acc, at, fits = rows_product(
                d_gate, hidden, d_gate_ptr, hidden_ptr, zero, tile - n_reduction_tiles, first, end,
                G, L, BM, BC, BN, PRECISION,
            )  # fmt: skip
            tl.store(out_ptr + L * D + at, acc, mask=fits)


@triton.jit
def sum_large_partials(large_ptr, columns, n_large, splits, BC: tl.constexpr, BP: tl.constexpr):
    """Sum of the partial gradients of the matrices over the splits, (BC,); all loads are in flight at once."""
    split = tl.arange(0, BP)
    fits = (split < splits)[:, None] & (columns < n_large)[None, :]
    at = split.to(tl.int64)[:, None] * n_large + columns[None, :]
    return tl.sum(tl.load(large_ptr + at, mask=fits, other=0.0), axis=0)


@triton.jit
def sum_small_partials(small_ptr, columns, n_small, n_blocks, BC: tl.constexpr, BP: tl.constexpr):
    """Sum of the partial gradients of biases and w over the programs that had rows, (BC,)."""
    acc = tl.zeros((BP, BC), tl.float32)
    for start in range(0, n_blocks, BP):
        block = start + tl.arange(0, BP)
        fits = (block < n_blocks)[:, None] & (columns < n_small)[None, :]
        at = block.to(tl.int64)[:, None] * n_small + columns[None, :]
        acc += tl.load(small_ptr + at, mask=fits, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def sum_partials_kernel(
    large_ptr, small_ptr, out_ptr, n_rows, n_large, n_small, n_splits, n_row_programs, n_large_blocks,
    BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, LEAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients in a fixed order: the same bits at every run."""
    wait_for_previous(CHAINED)
    pid = tl.program_id(0)
    if pid < n_large_blocks:
        columns = pid * BC + tl.arange(0, BC)
        splits = active_splits(tl.zeros((), tl.int32) + n_rows, n_splits, LEAST)
        total = sum_large_partials(large_ptr, columns, n_large, splits, BC, BP)
        tl.store(out_ptr + columns, total, mask=columns < n_large)
    else:
        small_columns = (pid - n_large_blocks) * BS + tl.arange(0, BS)
        small_total = sum_small_partials(small_ptr, small_columns, n_small, n_row_programs, BS, 256)
        tl.store(out_ptr + n_large + small_columns, small_total, mask=small_columns < n_small)
