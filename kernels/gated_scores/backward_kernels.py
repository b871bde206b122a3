"""Triton kernels of the backward pass: two over the rows, one for the weights, one that sums in fixed order."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.models import block_ends, count_blocks, find_model
from acmil.kernels.products import dot_of_pairs, held_beside, sigmoid, store_tile, tanh, wait_for_previous
from acmil.kernels.signs import sign_words, unpack_signs
from acmil.kernels.slots import hold_within, used_rows


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
    attention, projections, d_attended, d_pairs_ptr, correction_ptr,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient `dS = P ⊙ (dP − Σ_n P dP)` of a block of rows of one bag, (BK, BN).

    `dP = M (H Wᵀ)ᵀ + dG P`, with M (K, Q) the gradients of the pooled projections and `dG` symmetrised; the sum over
    the bag needs no pass over the rows and is given.
    """
    branch = tl.arange(0, BK)
    d_attention = dot_of_pairs(d_attended, projections, tl.zeros((BK, BN), tl.float32), PRECISION)
    if PAIRS:
        pair_fits = (branch < K)[:, None] & (branch < K)[None, :]
        d_pairs = tl.load(d_pairs_ptr + branch[:, None] * K + branch[None, :], mask=pair_fits, other=0.0)
        d_attention = dot_of_pairs(d_pairs, attention, d_attention, PRECISION)
    correction = tl.load(correction_ptr + branch, mask=branch < K, other=0.0)
    return attention * (d_attention - correction[:, None])


@triton.jit
def gate_backward_kernel(
    arguments, w_ptr, d_scores_ptr, scores_ptr, maxima_ptr, inverses_ptr, projections_ptr, d_logits_ptr, d_pairs_ptr,
    correction_ptr, d_gate_ptr, small_ptr, offsets_ptr, n_rows, n_bags, stride, model_rows, bags_a_model, parameters,
    score_stride, n_programs,
    A: tl.constexpr, K: tl.constexpr, C: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr,
    BK: tl.constexpr, BQ: tl.constexpr, POOL: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The gradients of the gate's arguments, (N, 2A), and each program's share of dbV, dbU, dw and db.

    What reaches the scores comes as `d_scores`, or (POOL, one bag) is worked out here from the gradients of the logits:
    then those of the projections follow those of the gate, G = 2A + BQ numbers a row. Every model has `n_programs`.
    `bags_a_model` bags in a row may be of one model, with programs for each. Everything stands with gates along the
    lines and rows along the columns: what the threads hold of a product is then what the sums' products take, without
    an exchange. `arguments` is a descriptor.
    """
    dtype = d_gate_ptr.dtype.element_ty
    model = tl.program_id(0) // n_programs
    program = tl.program_id(0) % n_programs
    if PACKED:
        offsets_ptr += model * stride
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    matrix_first = model * model_rows
    w_ptr += model // bags_a_model * parameters
    if POOL:
        scores_ptr += tl.cast(model * K, tl.int64) * score_stride
        projections_ptr += tl.cast(model * (K + 1) * C, tl.int64) * score_stride
        maxima_ptr += model * K
        inverses_ptr += model * K
        d_logits_ptr += model * (K + 1) * C
        correction_ptr += model * K
        if PAIRS:
            d_pairs_ptr += model * K * K
    row = tl.arange(0, BN)
    branch = tl.arange(0, BK)
    gate = tl.arange(0, BA)
    projection = tl.arange(0, BQ)
    branch_fits = branch < K
    gate_fits = gate < A
    w_fits = branch_fits[None, :] & gate_fits[:, None]
    w_at = branch[None, :] * A + gate[:, None]
    if not POOL:  # an operator's w may be of the launch before
        wait_for_previous(CHAINED)
    w = tl.load(w_ptr + w_at, mask=w_fits, other=0.0, cache_modifier=".cg").to(dtype)
    if POOL:
        wait_for_previous(CHAINED)
        d_attended = load_head_gradients(d_logits_ptr, K, C, BK, BQ)
        maximum = tl.load(maxima_ptr + branch, mask=branch_fits, other=0.0)
        inverse = tl.load(inverses_ptr + branch, mask=branch_fits, other=0.0)
    v_total = tl.zeros((BA, BK), tl.float32)
    u_total = tl.zeros((BA, BK), tl.float32)
    w_total = tl.zeros((BA, BK), tl.float32)
    b_total = tl.zeros((BK, BN), tl.float32)
    for block in range(program, tl.cdiv(used, BN), n_programs):
        first = block * BN
        matrix_row = matrix_first + first
        row_fits = row < used - first
        fits = gate_fits[:, None] & row_fits[None, :]
        scores_fit = branch_fits[:, None] & row_fits[None, :]
        of_v = arguments.load([matrix_row, 0]).T
        of_u = arguments.load([matrix_row, A]).T
        d_gate_block_ptr = d_gate_ptr + tl.cast(matrix_row, tl.int64) * G
        scores_at = branch[:, None] * score_stride + row[None, :]
        if POOL:
            scores = tl.load(scores_ptr + first + scores_at, mask=scores_fit, other=float("-inf"))
            attention = tl.exp(scores - maximum[:, None]) * inverse[:, None]  # exactly 0 where masked
            d_projected = dot_of_pairs(tl.trans(d_attended), attention, tl.zeros((BQ, BN), tl.float32), PRECISION)
            d_projected_at = row[None, :] * G + 2 * A + projection[:, None]
            tl.store(d_gate_block_ptr + d_projected_at, d_projected.to(dtype), mask=row_fits[None, :])
            projected_at = projection[:, None] * score_stride + row[None, :]
            projected_fit = row_fits[None, :] & (projection < (K + 1) * C)[:, None]
            projections = tl.load(projections_ptr + first + projected_at, mask=projected_fit, other=0.0)
            d_scores = pool_gradient(
                attention, projections, d_attended, d_pairs_ptr, correction_ptr, K, BN, BK, PAIRS, PRECISION
            )
            d_scores = tl.where(row_fits[None, :], d_scores, 0.0)
        else:
            d_scores = tl.load(d_scores_ptr + first + scores_at, mask=scores_fit, other=0.0).to(tl.float32)
        low = d_scores.to(dtype)
        d_gate = tl.dot(w, low, input_precision=PRECISION)  # (BA, BN)
        of_v = tl.where(row_fits[None, :], held_beside(of_v.to(tl.float32), d_gate, FAST), 0.0)
        of_u = tl.where(row_fits[None, :], held_beside(of_u.to(tl.float32), d_gate, FAST), 0.0)
        of_v = tanh(of_v, FAST)
        of_u = sigmoid(of_u, FAST)
        product = of_v * of_u
        by_v = of_u - product * of_v  # dV'/dG, dU'/dG
        by_u = product - product * of_u
        at = row[None, :] * G + gate[:, None]
        tl.store(d_gate_block_ptr + at, (d_gate * by_v).to(dtype), mask=fits)
        tl.store(d_gate_block_ptr + A + at, (d_gate * by_u).to(dtype), mask=fits)
        b_total += d_scores
        w_total = tl.dot(product.to(dtype), low.T, w_total, input_precision=PRECISION)
        v_total = tl.dot(by_v.to(dtype), low.T, v_total, input_precision=PRECISION)
        u_total = tl.dot(by_u.to(dtype), low.T, u_total, input_precision=PRECISION)
    small_ptr += tl.program_id(0) * (2 * A + K * A + K)
    of_branches = w.to(tl.float32)  # dbV = Σ_n dV' = Σ_k w_k Σ_n dS_k dV'/dG
    tl.store(small_ptr + gate, tl.sum(v_total * of_branches, axis=1), mask=gate_fits)
    tl.store(small_ptr + A + gate, tl.sum(u_total * of_branches, axis=1), mask=gate_fits)
    w_total_at = branch[None, :] * A + gate[:, None]
    tl.store(small_ptr + 2 * A + w_total_at, w_total, mask=(branch < K)[None, :] & gate_fits[:, None])
    tl.store(small_ptr + 2 * A + K * A + branch, tl.sum(b_total, axis=1), mask=branch < K)


@triton.jit
def reduction_backward_kernel(
    signs_ptr, d_gate, gate_weight, d_reduced, d_hidden_ptr, offsets_ptr, n_rows, n_bags, n_models, stride,
    model_rows, bags_a_model, weight_rows,
    L: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, SEVERAL: tl.constexpr,
    D_HIDDEN: tl.constexpr, PACKED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """d(X W1ᵀ) = (dH + [dV' dU'] [V; U]) ⊙ [H > 0] in tiles of (BN, BL).

    Gradients of projections may follow those of the gate, and the heads V and U: then they are in the product. Of
    H its signs are enough. All but these and dH are descriptors for bulk copies. Rows behind the last one used, up to a
    whole tile, are overwritten.
    The last rows come first: they are those that L2 still holds. V, U and heads of several models begin `weight_rows`
    rows apart, with zeros behind them up to a whole block; `bags_a_model` bags in a row may be of one. With FLAT, for
    programs of several tiles, the loops over tiles and over the gate's columns are one: a tile's first loads run beside
    the end of the one before it.
    """
    n_columns: tl.constexpr = (L + BL - 1) // BL
    n_words: tl.constexpr = (L + 63) // 64 * 4
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    ends = block_ends(offsets_ptr, n_rows, n_bags, n_models, stride, SEVERAL, BN, PACKED)
    row = tl.arange(0, BN)
    n_blocks = count_blocks(ends, SEVERAL)
    wait_for_previous(CHAINED)
    for tile in tl.range(tl.program_id(0), n_blocks * n_columns, tl.num_programs(0), flatten=FLAT):
        model, block = find_model(n_blocks - 1 - tile // n_columns, ends, SEVERAL)
        if SEVERAL:
            used = tl.load(offsets_ptr + model * stride + n_bags).to(tl.int32)
        first = block * BN
        matrix_row = model * model_rows + first
        weight_row = model // bags_a_model * weight_rows
        first_column = (tile % n_columns) * BL
        words_at, fits = sign_words(matrix_row, first_column, BN, BL, n_words)
        words = tl.load(signs_ptr + words_at, mask=fits & (row < used - first)[:, None], other=0)
        acc = tl.zeros((BN, BL), tl.float32)
        for a in range(0, G, BD):
            weight_block = gate_weight.load([weight_row + a, first_column])
            acc = tl.dot(d_gate.load([matrix_row, a]), weight_block, acc, input_precision=PRECISION)
        if D_HIDDEN:
            column = hold_within(first_column + tl.arange(0, BL), L, BL)
            at = tl.cast(matrix_row, tl.int64) * L + tl.minimum(row, used - first - 1)[:, None] * L + column[None, :]
            acc += tl.load(d_hidden_ptr + at).to(tl.float32)
        acc = tl.where(unpack_signs(words, BN, BL), acc, 0.0)
        store_tile(d_reduced, acc.to(d_reduced.dtype), matrix_row, first_column, BN, BL)


@triton.jit
def active_splits(used, n_short, n_long, long_rows, LEAST: tl.constexpr):
    """Into how many shares the rows are cut for the weight gradient: by their number alone, whatever else is launched.

    `n_long` from `long_rows` on, below that `n_short`, or fewer for a short bag.
    """
    return tl.where(used >= long_rows, n_long, tl.minimum(n_short, tl.cdiv(used, LEAST)))


@triton.jit
def rows_product(
    left, right, left_ptr, right_ptr, left_first, right_first, tile, first, end,
    M: tl.constexpr, C: tl.constexpr, LEFT_STRIDE: tl.constexpr, RIGHT_STRIDE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BM, BC) tile of leftᵀ right, M by C, over the bag's rows from first to end, and its rows and columns.

    The bag begins at `left_first` in left and at `right_first` in right. Whole blocks of rows come by bulk copies; what
    is left of them by masked loads, as the next rows are not the bag's.
    """
    n_columns: tl.constexpr = (C + BC - 1) // BC
    left_column = (tile // n_columns) * BM
    right_column = (tile % n_columns) * BC
    acc = tl.zeros((BM, BC), tl.float32)
    whole_end = first + (end - first) // BN * BN
    for n in range(first, whole_end, BN):
        left_block = left.load([left_first + n, left_column])
        right_block = right.load([right_first + n, right_column])
        acc = tl.dot(left_block.T, right_block, acc, input_precision=PRECISION)
    left_columns = left_column + tl.arange(0, BM)
    right_columns = right_column + tl.arange(0, BC)
    if whole_end < end:
        rows = whole_end + tl.arange(0, BN)
        left_at = (left_first + rows).to(tl.int64)[:, None] * LEFT_STRIDE + left_columns[None, :]
        right_at = (right_first + rows).to(tl.int64)[:, None] * RIGHT_STRIDE + right_columns[None, :]
        row_fits = (rows < end)[:, None]
        left_rest = tl.load(left_ptr + left_at, mask=row_fits & (left_columns < M)[None, :], other=0.0)
        right_rest = tl.load(right_ptr + right_at, mask=row_fits & (right_columns < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(left_rest), right_rest, acc, input_precision=PRECISION)
    return acc, left_columns[:, None], right_columns[None, :]


@triton.jit
def weight_gradient_kernel(
    d_reduced, x, d_gate, hidden, d_projected, d_reduced_ptr, x_ptr, d_gate_ptr, hidden_ptr,
    large_ptr, x_first_ptr, offsets_ptr, n_rows, n_bags, stride, model_rows, n_splits, n_short, n_long, long_rows,
    D: tl.constexpr, L: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """dW1 = d(X W1ᵀ)ᵀ X and [dV; dU] = [dV' dU']ᵀ H in one launch, a tile and a share of the rows a program.

    Where gradients of Q projections follow those of the gate, (N, G = 2A + BQ), those of the heads follow too, (Q, L).
    There are programs for `n_splits` shares of every model's rows.
    """
    n_columns: tl.constexpr = (L + BC - 1) // BC
    n_reduction_tiles: tl.constexpr = ((L + BM - 1) // BM) * ((D + BC - 1) // BC)
    n_gate_tiles: tl.constexpr = ((2 * A + BM - 1) // BM) * n_columns
    n_tiles: tl.constexpr = n_reduction_tiles + n_gate_tiles + (n_columns if Q > 0 else 0)
    size: tl.constexpr = L * (D + 2 * A + Q)
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles % n_splits
    model = tl.program_id(0) // (n_tiles * n_splits)
    if PACKED:
        offsets_ptr += model * stride
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    x_first = tl.zeros((), tl.int32)
    if WINDOW:
        x_first = tl.load(x_first_ptr + model * stride, cache_modifier=".cg").to(tl.int32)
    splits = active_splits(used, n_short, n_long, long_rows, LEAST)
    wait_for_previous(CHAINED)
    if split < splits:
        share = tl.cdiv(tl.cdiv(used, splits), BN) * BN
        first = split * share
        end = tl.maximum(tl.minimum(first + share, used), first)
        out_ptr = large_ptr + (model * n_splits + split).to(tl.int64) * size
        row_first = model * model_rows
        if tile < n_reduction_tiles:
            acc, row, column = rows_product(
                d_reduced, x, d_reduced_ptr, x_ptr, row_first, x_first, tile, first, end,
                L, D, L, D, BM, BC, BN, PRECISION,
            )  # fmt: skip
            tl.store(out_ptr + row * D + column, acc, mask=(row < L) & (column < D))
        elif tile < n_reduction_tiles + n_gate_tiles:
            acc, row, column = rows_product(
                d_gate, hidden, d_gate_ptr, hidden_ptr, row_first, row_first, tile - n_reduction_tiles, first, end,
                2 * A, L, G, L, BM, BC, BN, PRECISION,
            )  # fmt: skip
            tl.store(out_ptr + L * D + row * L + column, acc, mask=(row < 2 * A) & (column < L))
        elif Q > 0:  # the columns of H are the long side: a warp group's product has 64 rows at least
            heads, column_of_head, line = rows_product(
                hidden, d_projected, hidden_ptr, d_gate_ptr + 2 * A, row_first, row_first,
                tile - n_reduction_tiles - n_gate_tiles, first, end, L, BQ, L, G, BC, BQ, BN, PRECISION,
            )  # fmt: skip
            heads_at = L * (D + 2 * A) + line * L + column_of_head
            tl.store(out_ptr + heads_at, heads, mask=(line < Q) & (column_of_head < L))


@triton.jit
def sum_large_partials(large_ptr, columns, n_large, splits, BP: tl.constexpr):
    """Sum of the partial gradients of the matrices over the splits; all loads are in flight at once."""
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
    large_ptr, small_ptr, out_ptr, n_large, n_small, n_splits, n_row_programs, n_large_blocks,
    BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients in a fixed order: the same bits at every run."""
    wait_for_previous(CHAINED)
    pid = tl.program_id(0)
    if pid < n_large_blocks:
        columns = pid * BC + tl.arange(0, BC)
        total = sum_large_partials(large_ptr, columns, n_large, n_splits, BP)
        tl.store(out_ptr + columns, total, mask=columns < n_large)
    else:
        small_columns = (pid - n_large_blocks) * BS + tl.arange(0, BS)
        small_total = sum_small_partials(small_ptr, small_columns, n_small, n_row_programs, BS, 256)
        tl.store(out_ptr + n_large + small_columns, small_total, mask=small_columns < n_small)
