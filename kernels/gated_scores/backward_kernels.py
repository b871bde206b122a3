"""Triton kernels of the backward pass: one over the rows, one for the weights, one that sums in fixed order."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import dot_of_pairs, sigmoid, tanh, wait_for_previous
from acmil.kernels.slots import hold_within, used_rows


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
def load_head_gradients(d_logits_ptr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr):
    """The gradient of the loss in `P_k · (H Wᵀ)_q`, (BK, BQ), from those of the logits: (K, C) and the bag's (C,).

    A branch's logits are its own pooled projections; the bag's are the mean over branches.
    """
    branch = tl.arange(0, BK)[:, None]
    projection = tl.arange(0, BQ)[None, :]
    own = (projection < K * C) & (projection // C == branch)
    of_bag = (projection >= K * C) & (projection < (K + 1) * C) & (branch < K)
    gradient = tl.load(d_logits_ptr + projection + tl.zeros_like(branch), mask=own | of_bag, other=0.0)
    return tl.where(own, gradient, gradient / K)


@triton.jit
def pool_gradient(
    attention, projections_ptr, d_attended, rows, row_fits, d_pairs_ptr, correction_ptr, score_stride,
    K: tl.constexpr, Q: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient `dS = P ⊙ (dP − Σ_n P dP)` of a block of rows of one bag, (BN, BK).

    `dP = (H Wᵀ) Mᵀ + P dG`, with M (K, Q) the gradients of the pooled projections and `dG` symmetrised; the sum over
    the bag needs no pass over the rows and is given.
    """
    branch = tl.arange(0, BK)
    projection = tl.arange(0, BQ)
    at = projection.to(tl.int64)[None, :] * score_stride + rows[:, None]
    projections = tl.load(projections_ptr + at, mask=row_fits[:, None] & (projection < Q)[None, :], other=0.0)
    d_attention = tl.zeros((rows.shape[0], BK), tl.float32)
    d_attention = dot_of_pairs(projections, tl.trans(d_attended), d_attention, PRECISION)
    if PAIRS:
        pair_fits = (branch < K)[:, None] & (branch < K)[None, :]
        d_pairs = tl.load(d_pairs_ptr + branch[:, None] * K + branch[None, :], mask=pair_fits, other=0.0)
        d_attention = dot_of_pairs(attention, d_pairs, d_attention, PRECISION)
    correction = tl.load(correction_ptr + branch, mask=branch < K, other=0.0)
    return attention * (d_attention - correction[None, :])


@triton.jit
def rows_backward_kernel(
    hidden_ptr, gate_ptr, w_ptr, v, u, d_reduced, d_scores_ptr, d_hidden_ptr,
    scores_ptr, stats_ptr, projections_ptr, heads, d_logits_ptr, d_pairs_ptr, correction_ptr, shares_ptr,
    d_gate_ptr, small_ptr, offsets_ptr, n_rows, n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
    BA: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, GROUPS: tl.constexpr, D_SCORES: tl.constexpr,
    D_HIDDEN: tl.constexpr, POOL: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """All gradients of a block of rows: of S, of the gate's arguments, (N, 2A), and of X W1ᵀ, (N, L).

    `d(X W1ᵀ) = (dH + [dV' dU'] [V; U]) ⊙ [H > 0]`. What reaches S and H comes as `d_scores` and `d_hidden`, or (POOL,
    one bag) is worked out here from the gradients of the logits; the attention is written then too, (N, BK), for the
    gradients of the heads. Each program leaves its share of dbV, dbU, dw and db. V, U, d(X W1ᵀ) and the heads are
    descriptors for bulk copies. Rows of d(X W1ᵀ) behind the last one used, up to a whole block, are overwritten.
    `GROUPS` programs share the columns of a block of rows, where there are few blocks. `d_gate` may be `gate` itself
    only if there is one.
    """
    wait_for_previous(CHAINED)
    dtype = d_gate_ptr.dtype.element_ty
    n_chunks: tl.constexpr = (L + BL - 1) // BL
    group_columns: tl.constexpr = ((n_chunks + GROUPS - 1) // GROUPS) * BL
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    branch = tl.arange(0, BK)
    gate = tl.arange(0, BA)
    depth = tl.arange(0, BL)
    gate_fits = gate < A
    w_fits = (branch < K)[:, None] & gate_fits[None, :]
    w = tl.load(w_ptr + branch[:, None] * A + gate[None, :], mask=w_fits, other=0.0)
    if POOL:
        d_attended = load_head_gradients(d_logits_ptr, K, C, BK, BQ)
    v_total = tl.zeros((BA,), tl.float32)
    u_total = tl.zeros((BA,), tl.float32)
    w_total = tl.zeros((BA, BK), tl.float32)
    b_total = tl.zeros((BK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(used, BN) * GROUPS, tl.num_programs(0)):
        first = (tile // GROUPS) * BN
        first_column = (tile % GROUPS) * group_columns
        is_first = first_column == 0
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
                attention, projections_ptr, d_attended, first + row, row_fits, d_pairs_ptr, correction_ptr,
                score_stride, K, (K + 1) * C, BK, BQ, PAIRS, PRECISION,
            )  # fmt: skip
            d_scores = tl.where(row_fits[:, None], d_scores, 0.0)
            d_projected = dot_of_pairs(attention, d_attended, tl.zeros((BN, BQ), tl.float32), PRECISION).to(dtype)
            shares_at = tl.cast(first, tl.int64) * BK + row[:, None] * BK + branch[None, :]
            tl.store(shares_ptr + shares_at, attention.to(dtype), mask=row_fits[:, None] & is_first)
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
        low_v = d_v.to(dtype)
        low_u = d_u.to(dtype)
        d_gate_block_ptr = d_gate_ptr + tl.cast(first, tl.int64) * (2 * A)
        tl.store(d_gate_block_ptr + at, low_v, mask=fits & is_first)
        tl.store(d_gate_block_ptr + A + at, low_u, mask=fits & is_first)
        counts = is_first.to(tl.float32)
        v_total += tl.sum(d_v, axis=0) * counts
        u_total += tl.sum(d_u, axis=0) * counts
        b_total += tl.sum(d_scores, axis=0) * counts
        low = (d_scores * counts).to(dtype)
        w_total = tl.dot(tl.trans((of_v * of_u).to(dtype)), low, w_total, input_precision=PRECISION)
        hidden_at = tl.cast(first, tl.int64) * L + tl.minimum(row, used - first - 1)[:, None] * L
        for l in range(first_column, tl.minimum(first_column + group_columns, L), BL):  # noqa: E741
            column = l + depth
            # Not by bulk copies: these loads are under way while the products are worked out.
            hidden = tl.load(hidden_ptr + hidden_at + hold_within(column, L, BL)[None, :])
            acc = tl.dot(low_v, v.load([0, l]), input_precision=PRECISION)
            acc = tl.dot(low_u, u.load([0, l]), acc, input_precision=PRECISION)
            if POOL:
                acc = tl.dot(d_projected, heads.load([0, l]), acc, input_precision=PRECISION)
            if D_HIDDEN:
                d_hidden_at = hidden_at + hold_within(column, L, BL)[None, :]
                acc += tl.load(d_hidden_ptr + d_hidden_at).to(tl.float32)
            d_reduced.store([first, l], tl.where(hidden > 0, acc, 0.0).to(dtype))
    small_ptr += tl.program_id(0) * (2 * A + K * A + K)
    tl.store(small_ptr + gate, v_total, mask=gate_fits)
    tl.store(small_ptr + A + gate, u_total, mask=gate_fits)
    w_total_at = branch[None, :] * A + gate[:, None]
    tl.store(small_ptr + 2 * A + w_total_at, w_total, mask=(branch < K)[None, :] & gate_fits[:, None])
    tl.store(small_ptr + 2 * A + K * A + branch, b_total, mask=branch < K)


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
    d_reduced, x, d_gate, hidden, shares, d_reduced_ptr, x_ptr, d_gate_ptr, hidden_ptr, shares_ptr,
    large_ptr, x_first_ptr, offsets_ptr, n_rows, n_bags, n_splits,
    D: tl.constexpr, L: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, LEAST: tl.constexpr, SHARES: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """dW1 = d(X W1ᵀ)ᵀ X and [dV; dU] = [dV' dU']ᵀ H in one launch, a tile and a share of the rows a program.

    With SHARES, the attention (N, BK) by its branches, the pooled rows z = P H too, (K, L).
    """
    wait_for_previous(CHAINED)
    n_columns: tl.constexpr = (L + BC - 1) // BC
    n_reduction_tiles: tl.constexpr = ((L + BM - 1) // BM) * ((D + BC - 1) // BC)
    n_gate_tiles: tl.constexpr = ((G + BM - 1) // BM) * n_columns
    n_tiles: tl.constexpr = n_reduction_tiles + n_gate_tiles + (n_columns if SHARES else 0)
    size: tl.constexpr = L * D + G * L + (K * L if SHARES else 0)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    splits = active_splits(used, n_splits, LEAST)
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles
    if split < splits:
        share = tl.cdiv(tl.cdiv(used, splits), BN) * BN
        first = split * share
        end = tl.maximum(tl.minimum(first + share, used), first)
        out_ptr = large_ptr + split.to(tl.int64) * size
        zero = tl.zeros((), tl.int32)
        if tile < n_reduction_tiles:
            x_first = zero
            if WINDOW:
                x_first = tl.load(x_first_ptr).to(tl.int32)
            acc, at, fits = rows_product(
                d_reduced, x, d_reduced_ptr, x_ptr, x_first, tile, first, end, L, D, BM, BC, BN, PRECISION
            )
            tl.store(out_ptr + at, acc, mask=fits)
        elif tile < n_reduction_tiles + n_gate_tiles:
            acc, at, fits = rows_product(
                d_gate, hidden, d_gate_ptr, hidden_ptr, zero, tile - n_reduction_tiles, first, end,
                G, L, BM, BC, BN, PRECISION,
            )  # fmt: skip
            tl.store(out_ptr + L * D + at, acc, mask=fits)
        else:
            if SHARES:  # the columns of H are the long side: a warp group's product has 64 rows at least
                pooled, at, fits = rows_product(
                    hidden, shares, hidden_ptr, shares_ptr, zero, tile - n_reduction_tiles - n_gate_tiles, first, end,
                    L, BK, BC, BK, BN, PRECISION,
                )  # fmt: skip
                branch = at % BK
                tl.store(out_ptr + L * D + G * L + branch * L + at // BK, pooled, mask=fits & (branch < K))


@triton.jit
def sum_large_partials(large_ptr, columns, column_fits, size, splits, BP: tl.constexpr):
    """Sum of some columns of the partial sums (splits, size) over the splits; all loads are in flight at once."""
    split = tl.arange(0, BP)
    fits = (split < splits)[:, None] & column_fits[None, :]
    at = split.to(tl.int64)[:, None] * size + columns[None, :]
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
        total = sum_large_partials(large_ptr, columns, columns < n_large, n_large, splits, BP)
        tl.store(out_ptr + columns, total, mask=columns < n_large)
    else:
        small_columns = (pid - n_large_blocks) * BS + tl.arange(0, BS)
        small_total = sum_small_partials(small_ptr, small_columns, n_small, n_row_programs, BS, 256)
        tl.store(out_ptr + n_large + small_columns, small_total, mask=small_columns < n_small)
