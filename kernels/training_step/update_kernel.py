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
def update_kernel(
    large_ptr, small_ptr, d_logits_ptr, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, used_ptr,
    cursor_ptr, order_ptr, bag_offsets_ptr, labels_ptr, n_positions, n_large, n_small, n_logits, idle_first, n_idle,
    n_splits, n_row_programs, row_block, weight_1, weight_2, epsilon,
    BC: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr, BLOCKS: tl.constexpr,
    LEAST: tl.constexpr, WORK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Parameters in their flat order: matrices from split sums, the small ones from programs' sums, then head biases.

    A single branch's own head has no part in the loss, and is left as it is: `n_idle` numbers from `idle_first` on,
    and the first half of the biases.
    """
    wait_for_previous(CHAINED)
    pid = tl.program_id(0)
    n_small_programs = tl.cdiv(n_small, BS)
    used = tl.load(used_ptr)
    if pid < n_small_programs:  # the longest first
        small = pid * BS + tl.arange(0, BS)
        with_rows = tl.minimum(n_row_programs, tl.cdiv(used, row_block))
        gradient = sum_small_partials(small_ptr, small, n_small, with_rows, BS, BLOCKS)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, n_large + small, small < n_small,
            gradient, weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
    elif pid < tl.num_programs(0) - 1:
        large = (pid - n_small_programs) * BC + tl.arange(0, BC)
        fits = (large < n_large) & ((large < idle_first) | (large >= idle_first + n_idle))
        total = sum_large_partials(large_ptr, large, n_large, active_splits(used, n_splits, LEAST), BP)
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, large, fits, total,
            weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
    else:
        bias = tl.arange(0, BB)
        bias_fits = (bias < n_logits) & ((n_idle == 0) | (bias >= n_logits // 2))
        adamw(
            master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, n_large + n_small + bias, bias_fits,
            tl.load(d_logits_ptr + bias, mask=bias_fits, other=0.0), weight_1, weight_2, epsilon, WORK,
        )  # fmt: skip
        next_bag(cursor_ptr, order_ptr, bag_offsets_ptr, labels_ptr, n_positions)
