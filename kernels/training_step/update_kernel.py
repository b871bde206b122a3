"""The Triton kernel that ends a training step: partial gradients are summed, AdamW applied, the next bag looked up."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.gated_scores.backward_kernels import active_splits, sum_large_partials, sum_small_partials
from acmil.kernels.products import wait_for_previous


@triton.jit
def adamw(
    master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, at, fits, gradient,
    weight_1, weight_2, epsilon, WORK: tl.constexpr,
):  # fmt: skip
    """One AdamW step of some parameters, and their working copy; the weights of the moments are 1 − β."""
    parameter = tl.load(master_ptr + at, mask=fits, other=0.0)
    first = tl.load(first_moment_ptr + at, mask=fits, other=0.0)
    second = tl.load(second_moment_ptr + at, mask=fits, other=0.0)
    first += weight_1 * (gradient - first)
    second += weight_2 * (gradient * gradient - second)
    denominator = tl.sqrt(second) / tl.load(update_ptr + 2) + epsilon
    parameter = parameter * tl.load(update_ptr) - tl.load(update_ptr + 1) * first / denominator
    tl.store(master_ptr + at, parameter, mask=fits)
    tl.store(first_moment_ptr + at, first, mask=fits)
    tl.store(second_moment_ptr + at, second, mask=fits)
    if WORK:
        tl.store(work_ptr + at, parameter.to(work_ptr.dtype.element_ty), mask=fits)


@triton.jit
def next_bag(cursor_ptr, order_ptr, bag_offsets_ptr, labels_ptr, n_positions):
    """Move the cursor to the next bag in the order; behind the last it stays on that bag."""
    position = tl.minimum(tl.load(cursor_ptr) + 1, n_positions)
    bag = tl.load(order_ptr + tl.minimum(position, n_positions - 1))
    start = tl.load(bag_offsets_ptr + bag)
    tl.store(cursor_ptr, position)
    tl.store(cursor_ptr + 1, start)
    tl.store(cursor_ptr + 3, tl.load(bag_offsets_ptr + bag + 1) - start)
    tl.store(cursor_ptr + 4, tl.load(labels_ptr + bag))
    tl.store(cursor_ptr + 5, tl.load(cursor_ptr + 5) + 1)


@triton.jit
def head_gradient(
    d_logits_ptr, pooled_ptr, number, fits, size, splits,
    L: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradients of some numbers of the heads' weights, (BH,): of the logit, times z_k, or times the mean z for the bag."""
    line = number // L
    column = number % L
    of_bag = line >= K * C
    z = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        wanted = fits & (of_bag | (line // C == k))
        z += sum_large_partials(pooled_ptr + k * L, column, wanted, size, splits, BP)
    z = tl.where(of_bag, z / K, z)
    return z * tl.load(d_logits_ptr + line, mask=fits, other=0.0)


@triton.jit
def update_kernel(
    large_ptr, small_ptr, d_logits_ptr, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, used_ptr,
    cursor_ptr, order_ptr, bag_offsets_ptr, labels_ptr, n_positions, n_large, n_small, n_splits, n_row_programs,
    row_block, row_groups, weight_1, weight_2, epsilon,
    L: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr,
    BB: tl.constexpr, BP: tl.constexpr, BLOCKS: tl.constexpr, LEAST: tl.constexpr, WORK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Parameters in their flat order: matrices and heads from split sums, the small ones from programs' sums.

    A single branch's own head has no part in the loss, and is left as it is. In the backward pass over rows
    `row_groups` programs took `row_block` rows at once.
    """
    wait_for_previous(CHAINED)
    pid = tl.program_id(0)
    n_heads: tl.constexpr = (K + 1) * C * L
    n_biases: tl.constexpr = (K + 1) * C
    idle: tl.constexpr = C if K == 1 else 0
    n_small_programs = tl.cdiv(n_small, BS)
    n_head_programs: tl.constexpr = (n_heads + BH - 1) // BH
    used = tl.load(used_ptr)
    splits = active_splits(used, n_splits, LEAST)
    size = n_large + K * L
    if pid < n_small_programs:  # the longest first
        small = pid * BS + tl.arange(0, BS)
        with_rows = tl.minimum(n_row_programs, tl.cdiv(used, row_block) * row_groups)
        gradient = sum_small_partials(small_ptr, small, n_small, with_rows, BS, BLOCKS)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, n_large + n_heads + small,
            small < n_small, gradient, weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
    elif pid < n_small_programs + n_head_programs:
        number = (pid - n_small_programs) * BH + tl.arange(0, BH)
        fits = (number >= idle * L) & (number < n_heads)
        gradient = head_gradient(d_logits_ptr, large_ptr + n_large, number, fits, size, splits, L, K, C, BH, BP)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, n_large + number, fits, gradient,
            weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
    elif pid < tl.num_programs(0) - 1:
        large = (pid - n_small_programs - n_head_programs) * BC + tl.arange(0, BC)
        total = sum_large_partials(large_ptr, large, large < n_large, size, splits, BP)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, large, large < n_large, total,
            weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
    else:
        bias = tl.arange(0, BB)
        fits = (bias >= idle) & (bias < n_biases)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, n_large + n_heads + n_small + bias,
            fits, tl.load(d_logits_ptr + bias, mask=fits, other=0.0), weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
        next_bag(cursor_ptr, order_ptr, bag_offsets_ptr, labels_ptr, n_positions)
