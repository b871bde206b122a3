"""Triton kernels of the backward pass: one over the rows, one for the weights, one that sums in fixed order."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.slots import hold_within, used_rows


@triton.jit
def pool_gradient(
    hidden_block_ptr, hidden_at, scores_ptr, stats_ptr, d_pooled_ptr, d_pairs_ptr, correction_ptr,
    rows, row_fits, score_stride,
    L: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS = P ⊙ (dP − Σ_n P dP) of a block of rows of one bag, (BN, BK).

    `dP = H dzᵀ + P dG` with `dG` symmetrised; the sum over the bag needs no pass over the rows and is given.
    """
    branch = tl.arange(0, BK)
    depth = tl.arange(0, BL)
    branch_fits = branch < K
    d_attention = tl.zeros((BN, BK), tl.float32)
    z_at = hold_within(branch, K, BK)[None, :] * L + depth[:, None]
    for l in range(0, L, BL):  # noqa: E741
        if L % BL == 0:
            hidden = tl.load(hidden_block_ptr + l + hidden_at)
            d_z = tl.load(d_pooled_ptr + l + z_at)
        else:
            hidden = tl.load(hidden_block_ptr + l + hidden_at, mask=l + depth[None, :] < L, other=0.0)
            d_z = tl.load(d_pooled_ptr + l + z_at, mask=l + depth[:, None] < L, other=0.0)
        d_attention = tl.dot(hidden, d_z.to(hidden.dtype), d_attention, input_precision=PRECISION)
    fits = row_fits[:, None] & branch_fits[None, :]
    at = branch.to(tl.int64)[None, :] * score_stride + rows[:, None]
    scores = tl.load(scores_ptr + at, mask=fits, other=float("-inf"))
    maximum = tl.load(stats_ptr + branch * 2, mask=branch_fits, other=0.0)
    inverse = tl.load(stats_ptr + branch * 2 + 1, mask=branch_fits, other=0.0)
    attention = tl.exp(scores - maximum[None, :]) * inverse[None, :]
    if PAIRS:
        pair_fits = branch_fits[:, None] & branch_fits[None, :]
        d_pairs = tl.load(d_pairs_ptr + branch[:, None] * K + branch[None, :], mask=pair_fits, other=0.0)
        d_attention = tl.dot(attention, d_pairs, d_attention, input_precision="ieee")
    correction = tl.load(correction_ptr + branch, mask=branch_fits, other=0.0)
    return attention, attention * (d_attention - correction[None, :])


@triton.jit
def gate_gradient(
    gate_block_ptr, d_gate_block_ptr, w_ptr, small_block_ptr, d_scores, row, row_fits,
    A: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the gate's arguments of a block of rows, and the block's share of dbV, dbU, dw and db."""
    dtype = d_gate_block_ptr.dtype.element_ty
    branch = tl.arange(0, BK)
    low = d_scores.to(dtype)
    for a in range(0, A, BA):
        gate = a + tl.arange(0, BA)
        gate_fits = gate < A
        at = row[:, None] * (2 * A) + gate[None, :]
        fits = row_fits[:, None] & gate_fits[None, :]
        tanh = 2.0 * tl.sigmoid(2.0 * tl.load(gate_block_ptr + at, mask=fits, other=0.0).to(tl.float32)) - 1.0
        sigmoid = tl.sigmoid(tl.load(gate_block_ptr + A + at, mask=fits, other=0.0).to(tl.float32))
        w_at = branch[:, None] * A + gate[None, :]
        w_fits = (branch < K)[:, None] & gate_fits[None, :]
        w = tl.load(w_ptr + w_at, mask=w_fits, other=0.0)
        d_gate = tl.dot(low, w, input_precision=PRECISION)  # (BN, BA)
        d_v = d_gate * sigmoid * (1.0 - tanh * tanh)
        d_u = d_gate * tanh * sigmoid * (1.0 - sigmoid)
        tl.store(d_gate_block_ptr + at, d_v.to(dtype), mask=fits)
        tl.store(d_gate_block_ptr + A + at, d_u.to(dtype), mask=fits)
        tl.store(small_block_ptr + gate, tl.sum(d_v, axis=0), mask=gate_fits)
        tl.store(small_block_ptr + A + gate, tl.sum(d_u, axis=0), mask=gate_fits)
        d_w = tl.dot(tl.trans(low), (tanh * sigmoid).to(dtype), input_precision=PRECISION)  # (BK, BA)
        tl.store(small_block_ptr + 2 * A + w_at, d_w, mask=w_fits)
    tl.store(small_block_ptr + 2 * A + K * A + branch, tl.sum(d_scores, axis=0), mask=branch < K)


@triton.jit
def rows_backward_kernel(
    hidden_ptr, gate_ptr, v_ptr, u_ptr, w_ptr, d_hidden_ptr, d_scores_ptr,
    scores_ptr, stats_ptr, d_pooled_ptr, d_pairs_ptr, correction_ptr,
    d_reduced_ptr, d_gate_ptr, small_ptr, offsets_ptr, n_rows, n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, D_HIDDEN: tl.constexpr, D_SCORES: tl.constexpr, POOL: tl.constexpr, PAIRS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d(X W1ᵀ) and the gradients of the gate's arguments, for blocks of BN rows.

    What reaches the scores and H comes as `d_scores` and `d_hidden`, or (POOL, one bag) is worked out here from the
    gradient of the pooled features. The gate's gradients go through memory into the product that needs them as operand:
    kept in registers they would spill. `d_gate` may be `gate` itself.
    """
    dtype = hidden_ptr.dtype.element_ty
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    depth = tl.arange(0, BD)
    branch = tl.arange(0, BK)
    for block in range(tl.program_id(0), tl.cdiv(used, BN), tl.num_programs(0)):
        first = block * BN
        row_fits = row < used - first
        held = tl.minimum(row, used - first - 1)
        hidden_block_ptr = hidden_ptr + tl.cast(first, tl.int64) * L
        d_scores = tl.zeros((BN, BK), tl.float32)
        attention = tl.zeros((BN, BK), tl.float32)
        if POOL:
            attention, d_scores = pool_gradient(
                hidden_block_ptr, held[:, None] * L + depth[None, :], scores_ptr, stats_ptr, d_pooled_ptr, d_pairs_ptr,
                correction_ptr, first + row, row_fits, score_stride, L, K, BN, BD, BK, PAIRS, PRECISION,
            )  # fmt: skip
        if D_SCORES:
            at = branch.to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
            fits = row_fits[:, None] & (branch < K)[None, :]
            d_scores += tl.load(d_scores_ptr + at, mask=fits, other=0.0).to(tl.float32)
        d_gate_block_ptr = d_gate_ptr + tl.cast(first, tl.int64) * (2 * A)
        gate_gradient(
            gate_ptr + tl.cast(first, tl.int64) * (2 * A), d_gate_block_ptr, w_ptr,
            small_ptr + tl.cast(block, tl.int64) * (2 * A + K * A + K), d_scores, row, row_fits,
            A, K, BN, BD, BK, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # what the threads of this program wrote is read again by others of them
        for l in range(0, L, BL):  # noqa: E741
            column = l + tl.arange(0, BL)
            held_column = hold_within(column, L, BL)[None, :]
            acc = tl.zeros((BN, BL), tl.float32)
            for a in range(0, A, BD):
                d_gate_at = d_gate_block_ptr + a + held[:, None] * (2 * A) + depth[None, :]
                weight_at = (a + depth)[:, None] * L + held_column
                if A % BD == 0:
                    d_v = tl.load(d_gate_at)
                    d_u = tl.load(d_gate_at + A)
                    v = tl.load(v_ptr + weight_at)
                    u = tl.load(u_ptr + weight_at)
                else:
                    d_v = tl.load(d_gate_at, mask=(a + depth)[None, :] < A, other=0.0)
                    d_u = tl.load(d_gate_at + A, mask=(a + depth)[None, :] < A, other=0.0)
                    v = tl.load(v_ptr + weight_at, mask=(a + depth)[:, None] < A, other=0.0)
                    u = tl.load(u_ptr + weight_at, mask=(a + depth)[:, None] < A, other=0.0)
                acc = tl.dot(d_v, v, acc, input_precision=PRECISION)
                acc = tl.dot(d_u, u, acc, input_precision=PRECISION)
            if POOL:
                d_z = tl.load(d_pooled_ptr + hold_within(branch, K, BK)[:, None] * L + held_column)
                acc = tl.dot(attention.to(dtype), d_z.to(dtype), acc, input_precision=PRECISION)
            out_at = row[:, None] * L + column[None, :]
            out_fits = row_fits[:, None] & (column < L)[None, :]
            if D_HIDDEN:
                d_hidden_block_ptr = d_hidden_ptr + tl.cast(first, tl.int64) * L
                acc += tl.load(d_hidden_block_ptr + out_at, mask=out_fits, other=0.0).to(tl.float32)
            hidden = tl.load(hidden_block_ptr + out_at, mask=out_fits, other=0.0)
            d_reduced_block_ptr = d_reduced_ptr + tl.cast(first, tl.int64) * L
            tl.store(d_reduced_block_ptr + out_at, tl.where(hidden > 0, acc, 0.0).to(dtype), mask=out_fits)


@triton.jit
def active_splits(used, n_splits, LEAST: tl.constexpr):
    """Into how many shares the rows are cut for the weight gradient: few for a short bag, `n_splits` at most."""
    return tl.minimum(n_splits, tl.cdiv(used, LEAST))


@triton.jit
def rows_product(
    left_ptr, right_ptr, tile, first, end,
    M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BM, BC) tile of leftᵀ right over the rows of left from first to end, with its places and their mask."""
    n_columns: tl.constexpr = (C + BC - 1) // BC
    left_column = (tile // n_columns) * BM + tl.arange(0, BM)
    right_column = (tile % n_columns) * BC + tl.arange(0, BC)
    row = tl.arange(0, BN)
    left_at = row[:, None] * M + hold_within(left_column, M, BM)[None, :]
    right_held = hold_within(right_column, C, BC)[None, :]
    acc = tl.zeros((BM, BC), tl.float32)
    for n in range(first, end, BN):
        left = tl.load(left_ptr + tl.cast(n, tl.int64) * M + left_at, mask=(row < end - n)[:, None], other=0.0)
        right = tl.load(right_ptr + tl.cast(n, tl.int64) * C + tl.minimum(row, end - n - 1)[:, None] * C + right_held)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    at = left_column[:, None] * C + right_column[None, :]
    return acc, at, (left_column < M)[:, None] & (right_column < C)[None, :]


@triton.jit
def weight_gradient_kernel(
    d_reduced_ptr, x_ptr, d_gate_ptr, hidden_ptr, large_ptr, x_first_ptr, offsets_ptr, n_rows, n_bags, n_splits,
    D: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    LEAST: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW1 = d(X W1ᵀ)ᵀ X and [dV; dU] = [dV' dU']ᵀ H in one launch, a tile and a share of the rows a program."""
    n_reduction_tiles: tl.constexpr = ((L + BM - 1) // BM) * ((D + BC - 1) // BC)
    n_gate_tiles: tl.constexpr = ((G + BM - 1) // BM) * ((L + BC - 1) // BC)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    splits = active_splits(used, n_splits, LEAST)
    tile = tl.program_id(0) % (n_reduction_tiles + n_gate_tiles)
    split = tl.program_id(0) // (n_reduction_tiles + n_gate_tiles)
    if split < splits:
        share = tl.cdiv(tl.cdiv(used, splits), BN) * BN
        first = split * share
        end = tl.minimum(first + share, used)
        out_ptr = large_ptr + split.to(tl.int64) * (L * D + G * L)
        if tile < n_reduction_tiles:
            if WINDOW:
                x_ptr += tl.load(x_first_ptr) * D
            acc, at, fits = rows_product(d_reduced_ptr, x_ptr, tile, first, end, L, D, BM, BC, BN, PRECISION)
            tl.store(out_ptr + at, acc, mask=fits)
        else:
            acc, at, fits = rows_product(
                d_gate_ptr, hidden_ptr, tile - n_reduction_tiles, first, end, G, L, BM, BC, BN, PRECISION
            )
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
    """Sum of the partial gradients of biases and w over the blocks of rows, (BC,)."""
    acc = tl.zeros((BP, BC), tl.float32)
    for start in range(0, n_blocks, BP):
        block = start + tl.arange(0, BP)
        fits = (block < n_blocks)[:, None] & (columns < n_small)[None, :]
        at = block.to(tl.int64)[:, None] * n_small + columns[None, :]
        acc += tl.load(small_ptr + at, mask=fits, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def sum_partials_kernel(
    large_ptr, small_ptr, out_ptr, n_rows, n_large, n_small, n_splits, n_row_blocks, n_large_blocks,
    BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients in a fixed order: the same bits at every run."""
    pid = tl.program_id(0)
    if pid < n_large_blocks:
        columns = pid * BC + tl.arange(0, BC)
        splits = active_splits(tl.zeros((), tl.int32) + n_rows, n_splits, LEAST)
        total = sum_large_partials(large_ptr, columns, n_large, splits, BC, BP)
        tl.store(out_ptr + columns, total, mask=columns < n_large)
    else:
        small_columns = (pid - n_large_blocks) * BS + tl.arange(0, BS)
        small_total = sum_small_partials(small_ptr, small_columns, n_small, n_row_blocks, BS, 256)
        tl.store(out_ptr + n_large + small_columns, small_total, mask=small_columns < n_small)
