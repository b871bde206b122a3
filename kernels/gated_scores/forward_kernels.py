"""Triton kernels of the forward pass: the reduction of the instances, and the gate with its scores."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import sigmoid, tanh, wait_for_previous
from acmil.kernels.slots import hold_within, used_rows


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
    hidden_ptr, v_ptr, v_bias_ptr, u_ptr, u_bias_ptr, w_ptr, b_ptr, scores_ptr, gate_ptr, offsets_ptr,
    n_rows, n_bags, score_stride,
    L: tl.constexpr, A: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BA: tl.constexpr,
    BK: tl.constexpr, SAVE_GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """S = w (tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU))ᵀ + b for blocks of BN rows.

    With SAVE_GATE both arguments of the gate are written, (N, 2A), for the backward pass; otherwise they never leave
    the registers. The last rows come first: they are those that L2 still holds.
    """
    wait_for_previous(CHAINED)
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    row = tl.arange(0, BN)
    depth = tl.arange(0, BL)
    gate = tl.arange(0, BA)
    branch = tl.arange(0, BK)
    gate_fits = gate < A
    branch_fits = branch < K
    v_bias = tl.load(v_bias_ptr + gate, mask=gate_fits, other=0.0).to(tl.float32)
    u_bias = tl.load(u_bias_ptr + gate, mask=gate_fits, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + branch, mask=branch_fits, other=0.0).to(tl.float32)
    gate_at = hold_within(gate, A, BA)[None, :] * L + depth[:, None]
    n_blocks = tl.cdiv(used, BN)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        first = (n_blocks - 1 - block) * BN
        left = used - first
        hidden_at = tl.minimum(row, left - 1)[:, None] * L + depth[None, :]
        hidden_block_ptr = hidden_ptr + tl.cast(first, tl.int64) * L
        v_acc = tl.zeros((BN, BA), tl.float32)
        u_acc = tl.zeros((BN, BA), tl.float32)
        for l in range(0, L, BL):  # noqa: E741
            if L % BL == 0:
                hidden = tl.load(hidden_block_ptr + l + hidden_at)
                v = tl.load(v_ptr + l + gate_at)
                u = tl.load(u_ptr + l + gate_at)
            else:
                hidden = tl.load(hidden_block_ptr + l + hidden_at, mask=l + depth[None, :] < L, other=0.0)
                v = tl.load(v_ptr + l + gate_at, mask=l + depth[:, None] < L, other=0.0)
                u = tl.load(u_ptr + l + gate_at, mask=l + depth[:, None] < L, other=0.0)
            v_acc = tl.dot(hidden, v, v_acc, input_precision=PRECISION)
            u_acc = tl.dot(hidden, u, u_acc, input_precision=PRECISION)
        v_acc += v_bias[None, :]
        u_acc += u_bias[None, :]
        row_fits = row < left
        if SAVE_GATE:
            saved_ptr = gate_ptr + tl.cast(first, tl.int64) * (2 * A) + row[:, None] * (2 * A) + gate[None, :]
            fits = row_fits[:, None] & gate_fits[None, :]
            tl.store(saved_ptr, v_acc.to(gate_ptr.dtype.element_ty), mask=fits)
            tl.store(saved_ptr + A, u_acc.to(gate_ptr.dtype.element_ty), mask=fits)
        product = tanh(v_acc, FAST) * sigmoid(u_acc, FAST)
        w = tl.load(
            w_ptr + branch[None, :] * A + gate[:, None], mask=branch_fits[None, :] & gate_fits[:, None], other=0.0
        )
        scores = tl.dot(product.to(w.dtype), w, input_precision=PRECISION) + b[None, :]  # (BN, BK)
        at = branch.to(tl.int64)[None, :] * score_stride + (first + row)[:, None]
        tl.store(scores_ptr + at, scores, mask=row_fits[:, None] & branch_fits[None, :])
