"""Triton kernels of the forward pass: the reduction of the instances, and the gate with its scores."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import sigmoid, tanh, wait_for_previous
from acmil.kernels.slots import used_rows


@triton.jit
def reduce_kernel(
    x, w, hidden, x_first_ptr, offsets_ptr, n_rows, n_bags,
    D: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """H = relu(X W1ᵀ) in tiles of (BN, BL); neighbouring programs share their rows of X, which L2 then holds.

    X, W1 and H are descriptors for bulk copies, which fill with zeros what lies outside a matrix. With WINDOW the rows
    begin at row `x_first_ptr[0]` of a larger X. Rows of H behind the last one used, up to a whole tile, hold other
    rows' features.
    """
    wait_for_previous(CHAINED)
    n_columns: tl.constexpr = (L + BL - 1) // BL
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    x_first = tl.zeros((), tl.int32)
    if WINDOW:
        x_first = tl.load(x_first_ptr).to(tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(used, BN) * n_columns, tl.num_programs(0), flatten=True):
        first = (tile // n_columns) * BN
        column = (tile % n_columns) * BL
        acc = tl.zeros((BN, BL), tl.float32)
        for d in range(0, D, BD):
            acc = tl.dot(x.load([x_first + first, d]), w.load([column, d]).T, acc, input_precision=PRECISION)
        hidden.store([first, column], tl.maximum(acc, 0.0).to(hidden.dtype))


@triton.jit
def gate_kernel(
    hidden, v, v_bias_ptr, u, u_bias_ptr, w_ptr, b_ptr, heads, scores_ptr, gate_ptr, projections_ptr, offsets_ptr,
    n_rows, n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
    BA: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, SAVE_GATE: tl.constexpr, HEADS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """S = w (tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU))ᵀ + b for blocks of BN rows.

    H, V, U and the heads are descriptors for bulk copies. With SAVE_GATE both arguments of the gate are written,
    (N, 2A), for the backward pass; otherwise they never leave the registers. With HEADS the rows are projected on Q
    rows of weights too, H Wᵀ, written as (Q, N). The last rows come first: they are those that L2 still holds.
    """
    wait_for_previous(CHAINED)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    gate = tl.arange(0, BA)
    branch = tl.arange(0, BK)
    projection = tl.arange(0, BQ)
    gate_fits = gate < A
    branch_fits = branch < K
    v_bias = tl.load(v_bias_ptr + gate, mask=gate_fits, other=0.0).to(tl.float32)
    u_bias = tl.load(u_bias_ptr + gate, mask=gate_fits, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + branch, mask=branch_fits, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + branch[None, :] * A + gate[:, None], mask=branch_fits[None, :] & gate_fits[:, None], other=0.0)
    n_blocks = tl.cdiv(used, BN)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        first = (n_blocks - 1 - block) * BN
        row_fits = row < used - first
        v_acc = tl.zeros((BN, BA), tl.float32)
        u_acc = tl.zeros((BN, BA), tl.float32)
        q_acc = tl.zeros((BN, BQ), tl.float32)
        for l in range(0, L, BL):  # noqa: E741
            hidden_block = hidden.load([first, l])
            v_acc = tl.dot(hidden_block, v.load([0, l]).T, v_acc, input_precision=PRECISION)
            u_acc = tl.dot(hidden_block, u.load([0, l]).T, u_acc, input_precision=PRECISION)
            if HEADS:
                q_acc = tl.dot(hidden_block, heads.load([0, l]).T, q_acc, input_precision=PRECISION)
        if HEADS:
            at = projection.to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
            tl.store(projections_ptr + at, q_acc, mask=row_fits[:, None] & (projection < Q)[None, :])
        v_acc += v_bias[None, :]
        u_acc += u_bias[None, :]
        if SAVE_GATE:
            saved_ptr = gate_ptr + tl.cast(first, tl.int64) * (2 * A) + row[:, None] * (2 * A) + gate[None, :]
            fits = row_fits[:, None] & gate_fits[None, :]
            tl.store(saved_ptr, v_acc.to(gate_ptr.dtype.element_ty), mask=fits)
            tl.store(saved_ptr + A, u_acc.to(gate_ptr.dtype.element_ty), mask=fits)
        product = tanh(v_acc, FAST) * sigmoid(u_acc, FAST)
        scores = tl.dot(product.to(w.dtype), w, input_precision=PRECISION) + b[None, :]  # (BN, BK)
        at = branch.to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
        tl.store(scores_ptr + at, scores, mask=row_fits[:, None] & branch_fits[None, :])
