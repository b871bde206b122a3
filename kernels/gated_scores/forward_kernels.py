"""Triton kernels of the forward pass: the reduction of the instances, and the gate with its scores."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.models import block_ends, count_blocks, find_model
from acmil.kernels.products import sigmoid, store_tile, tanh, wait_for_previous
from acmil.kernels.signs import pack_signs, sign_words
from acmil.kernels.slots import used_rows


@triton.jit
def reduce_kernel(
    x, w, hidden, signs_ptr, x_first_ptr, offsets_ptr, n_rows, n_bags, n_models, stride, model_rows,
    bags_a_model,
    D: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, SEVERAL: tl.constexpr,
    SIGNS: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """H = relu(X W1ᵀ) in tiles of (BN, BL); neighbouring programs share their rows of X, which L2 then holds.

    X, W1 and H are descriptors for bulk copies, which fill with zeros what lies outside a matrix. With WINDOW the rows
    begin at row `x_first_ptr[0]` of a larger X. Rows of H behind the last one used, up to a whole tile, hold other
    rows' features. The matrices W1 of several models stand one below the other; `bags_a_model` bags in a row are of one
    model. With SIGNS it is written which sums are positive, 4 words for every 64 columns. Where the bag is may be of
    the launch directly before, so that nothing is read before the wait.
    """
    wait_for_previous(CHAINED)
    n_columns: tl.constexpr = (L + BL - 1) // BL
    n_words: tl.constexpr = (L + 63) // 64 * 4
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    ends = block_ends(offsets_ptr, n_rows, n_bags, n_models, stride, SEVERAL, BN, PACKED)
    x_first = tl.zeros((), tl.int32)
    if WINDOW and not SEVERAL:
        x_first = tl.load(x_first_ptr).to(tl.int32)
    n_tiles = count_blocks(ends, SEVERAL) * n_columns
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        model, block = find_model(tile // n_columns, ends, SEVERAL)
        if WINDOW and SEVERAL:
            x_first = tl.load(x_first_ptr + model * stride).to(tl.int32)
        first = block * BN
        column = (tile % n_columns) * BL
        acc = tl.zeros((BN, BL), tl.float32)
        for d in range(0, D, BD):
            w_block = w.load([model // bags_a_model * L + column, d])
            acc = tl.dot(x.load([x_first + first, d]), w_block.T, acc, input_precision=PRECISION)
        if SIGNS:
            if SEVERAL:
                used = tl.load(offsets_ptr + model * stride + n_bags).to(tl.int32)
            at, fits = sign_words(model * model_rows + first, column, BN, BL, n_words)
            fits = fits & (tl.arange(0, BN) < used - first)[:, None]
            tl.store(signs_ptr + at, pack_signs(acc, BN, BL), mask=fits)
        reduced = tl.maximum(acc, 0.0).to(hidden.dtype)
        store_tile(hidden, reduced, model * model_rows + first, column, BN, BL)


@triton.jit
def gate_kernel(
    hidden, v, v_bias_ptr, u, u_bias_ptr, w_ptr, b_ptr, heads, scores_ptr, gate_ptr, projections_ptr, offsets_ptr,
    n_rows, n_bags, n_models, stride, model_rows, bags_a_model, weight_rows, parameters, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
    BA: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, SEVERAL: tl.constexpr, SAVE_GATE: tl.constexpr,
    HEADS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """S = w (tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU))ᵀ + b for blocks of BN rows.

    H, V, U and the heads are descriptors for bulk copies. With SAVE_GATE both arguments of the gate are written,
    (N, 2A), for the backward pass; otherwise they never leave the registers. With HEADS the rows are projected on Q
    rows of weights too, H Wᵀ, written as (Q, N). The last rows come first: they are those that L2 still holds.

    V, U and heads of several models begin `weight_rows` rows apart, biases and w `parameters` numbers; what lies behind
    V or U is multiplied too, and left out. `bags_a_model` bags in a row are of one model.
    """
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    ends = block_ends(offsets_ptr, n_rows, n_bags, n_models, stride, SEVERAL, BN, PACKED)
    wait_for_previous(CHAINED)
    row = tl.arange(0, BN)
    gate = tl.arange(0, BA)
    branch = tl.arange(0, BK)
    projection = tl.arange(0, BQ)
    gate_fits = gate < A
    branch_fits = branch < K
    w_fits = branch_fits[None, :] & gate_fits[:, None]
    n_blocks = count_blocks(ends, SEVERAL)
    for number in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        model, block = find_model(n_blocks - 1 - number, ends, SEVERAL)
        if SEVERAL:
            used = tl.load(offsets_ptr + model * stride + n_bags).to(tl.int32)
        at_parameters = model // bags_a_model * parameters
        v_bias = tl.load(v_bias_ptr + at_parameters + gate, mask=gate_fits, other=0.0).to(tl.float32)
        u_bias = tl.load(u_bias_ptr + at_parameters + gate, mask=gate_fits, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at_parameters + branch, mask=branch_fits, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at_parameters + branch[None, :] * A + gate[:, None], mask=w_fits, other=0.0)
        first = block * BN
        row_fits = row < used - first
        matrix_row = model * model_rows + first
        of_v = model // bags_a_model * weight_rows
        v_acc = tl.zeros((BN, BA), tl.float32)
        u_acc = tl.zeros((BN, BA), tl.float32)
        q_acc = tl.zeros((BN, BQ), tl.float32)
        for l in range(0, L, BL):  # noqa: E741
            hidden_block = hidden.load([matrix_row, l])
            v_acc = tl.dot(hidden_block, v.load([of_v, l]).T, v_acc, input_precision=PRECISION)
            u_acc = tl.dot(hidden_block, u.load([of_v, l]).T, u_acc, input_precision=PRECISION)
            if HEADS:
                q_acc = tl.dot(hidden_block, heads.load([of_v, l]).T, q_acc, input_precision=PRECISION)
        if HEADS:
            at = (model * Q + projection).to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
            tl.store(projections_ptr + at, q_acc, mask=row_fits[:, None] & (projection < Q)[None, :])
        v_acc += v_bias[None, :]
        u_acc += u_bias[None, :]
        if SAVE_GATE:
            saved_ptr = gate_ptr + tl.cast(matrix_row, tl.int64) * (2 * A) + row[:, None] * (2 * A) + gate[None, :]
            fits = row_fits[:, None] & gate_fits[None, :]
            tl.store(saved_ptr, v_acc.to(gate_ptr.dtype.element_ty), mask=fits)
            tl.store(saved_ptr + A, u_acc.to(gate_ptr.dtype.element_ty), mask=fits)
        product = tanh(v_acc, FAST) * sigmoid(u_acc, FAST)
        half = product.to(hidden.dtype)
        scores = tl.dot(half, w.to(hidden.dtype), input_precision=PRECISION) + b[None, :]  # (BN, BK)
        at = (model * K + branch).to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
        tl.store(scores_ptr + at, scores, mask=row_fits[:, None] & branch_fits[None, :])
