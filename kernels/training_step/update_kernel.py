"""The Triton kernel that ends a training step: partial gradients are summed, AdamW applied, the next bag looked up."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.gated_scores.backward_kernels import active_splits, sum_large_partials, sum_small_partials
from acmil.kernels.products import wait_for_previous


@triton.jit
def load_state(master_ptr, first_moment_ptr, second_moment_ptr, at, fits):
    """Some parameters and their moments: of the step before, and so there before this launch's wait."""
    parameter = tl.load(master_ptr + at, mask=fits, other=0.0, cache_modifier=".cg")
    first = tl.load(first_moment_ptr + at, mask=fits, other=0.0, cache_modifier=".cg")
    second = tl.load(second_moment_ptr + at, mask=fits, other=0.0, cache_modifier=".cg")
    return parameter, first, second


@triton.jit
def adamw(
    state, gradient, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, at,
    work_at, fits, weight_1, weight_2, epsilon, WORK: tl.constexpr,
):  # fmt: skip
    """One AdamW step of some parameters, of `load_state`, and their working copy; the weights of the moments are 1 − β.

    Products that are added to something say so: left to the compiler, which of them are rounded changed with the sizes
    that a launch was compiled for, and two launches gave a parameter different bits.
    """
    parameter, first, second = state
    first = tl.fma(gradient - first, weight_1, first)
    second = tl.fma(tl.fma(gradient, gradient, -second), weight_2, second)
    denominator = tl.sqrt(second) / tl.load(update_ptr + 2) + epsilon
    change = tl.load(update_ptr + 1) * first / denominator
    parameter = tl.fma(parameter, tl.load(update_ptr), -change)
    tl.store(master_ptr + at, parameter, mask=fits)
    tl.store(first_moment_ptr + at, first, mask=fits)
    tl.store(second_moment_ptr + at, second, mask=fits)
    if WORK:
        tl.store(work_ptr + work_at, parameter.to(work_ptr.dtype.element_ty), mask=fits)


@triton.jit
def next_bag(cursor_ptr, bags_ptr, positions, used):
    """Move the cursor to the next bag: its first row, length and label. Behind the last it stays on that bag.

    The number of steps counts those alone that had rows, `used` of the model's first bag.
    """
    position = tl.minimum(tl.load(cursor_ptr) + 1, positions)
    bag_ptr = bags_ptr + tl.minimum(position, positions - 1) * 3
    tl.store(cursor_ptr, position)
    tl.store(cursor_ptr + 1, tl.load(bag_ptr))
    tl.store(cursor_ptr + 3, tl.load(bag_ptr + 1))
    tl.store(cursor_ptr + 4, tl.load(bag_ptr + 2))
    tl.store(cursor_ptr + 5, tl.load(cursor_ptr + 5) + (used > 0).to(tl.int64))


@triton.jit
def sum_small_of_bags(
    small_ptr, used, used_ptr, columns, n_small, n_row_programs, row_block,
    BAGS: tl.constexpr, BS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sum of the partial gradients of biases and w over the programs of a model's bags, one bag after the other.

    `used` are the rows of the first bag, `used_ptr` where those of all of them are.
    """
    with_rows = tl.minimum(n_row_programs, tl.cdiv(used, row_block))
    total = sum_small_partials(small_ptr, columns, n_small, with_rows, BS, BLOCKS)
    for bag in range(1, BAGS):
        with_rows = tl.minimum(n_row_programs, tl.cdiv(tl.load(used_ptr + bag), row_block))
        of_bag_ptr = small_ptr + tl.cast(bag, tl.int64) * n_row_programs * n_small
        total += sum_small_partials(of_bag_ptr, columns, n_small, with_rows, BS, BLOCKS)
    return total


@triton.jit
def sum_large_of_bags(
    large_ptr, used, used_ptr, columns, n_large, n_splits, n_short, n_long, long_rows,
    BAGS: tl.constexpr, BP: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Sum of the partial gradients of the matrices over the shares of a model's bags, one bag after the other."""
    splits = active_splits(used, n_short, n_long, long_rows, LEAST)
    total = sum_large_partials(large_ptr, columns, n_large, splits, BP)
    for bag in tl.static_range(1, BAGS):  # unrolled, so that no load waits for a sum
        splits = active_splits(tl.load(used_ptr + bag), n_short, n_long, long_rows, LEAST)
        of_bag_ptr = large_ptr + tl.cast(n_splits, tl.int64) * (bag * n_large)
        total += sum_large_partials(of_bag_ptr, columns, n_large, splits, BP)
    return total


@triton.jit
def sum_of_logits(d_logits_ptr, used_ptr, bias, n_logits, fits, BAGS: tl.constexpr):
    """Sum of the gradients of the logits over those of a model's bags that have rows."""
    total = tl.load(d_logits_ptr + bias, mask=fits, other=0.0)
    for bag in range(1, BAGS):
        of_bag_fits = fits & (tl.load(used_ptr + bag) > 0)
        total += tl.load(d_logits_ptr + bag * n_logits + bias, mask=of_bag_fits, other=0.0)
    return total


@triton.jit
def update_kernel(
    large_ptr, small_ptr, d_logits_ptr, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr, used_ptr,
    cursor_ptr, bags_ptr, n_programs, positions, parameters, n_reduction, n_large, n_small, n_logits, work_rest,
    work_rest_size, idle_first, n_idle, n_splits, n_short, n_long, long_rows, n_row_programs, row_block,
    weight_1, weight_2, epsilon,
    BAGS: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr, BLOCKS: tl.constexpr,
    LEAST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Parameters in their flat order: matrices from split sums, the small ones from programs' sums, then head biases.

    A single branch's own head has no part in the loss, and is left as it is: `n_idle` numbers from `idle_first` on,
    and the first half of the biases. Every model has `n_programs`, and BAGS bags in a row, whose gradients are added;
    one whose first bag had no rows is left as it is. The last model comes first: its gradients are those that L2 still
    holds. Working copies of the first `n_reduction` numbers, whole blocks, of all models stand together, those of the
    other matrices from `work_rest` on, `work_rest_size` for each model.
    """
    model = tl.num_programs(0) // n_programs - 1 - tl.program_id(0) // n_programs
    program = tl.program_id(0) % n_programs
    n_small_programs = tl.cdiv(n_small, BS)
    place = model * BAGS  # of its first bag, among those of all models
    used_ptr += place
    used = tl.load(used_ptr, cache_modifier=".cg")
    if used > 0:
        of_model = tl.cast(model, tl.int64) * parameters
        master_ptr += of_model
        first_moment_ptr += of_model
        second_moment_ptr += of_model
        update_ptr += model * 3
        if program < n_small_programs:  # the longest first
            small = program * BS + tl.arange(0, BS)
            small_fits = small < n_small
            small_at = n_large + small
            small_state = load_state(master_ptr, first_moment_ptr, second_moment_ptr, small_at, small_fits)
            wait_for_previous(CHAINED)
            of_model_ptr = small_ptr + tl.cast(place, tl.int64) * n_row_programs * n_small
            gradient = sum_small_of_bags(
                of_model_ptr, used, used_ptr, small, n_small, n_row_programs, row_block, BAGS, BS, BLOCKS
            )
            adamw(
                small_state, gradient, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr,
                update_ptr, small_at, small, small_fits, weight_1, weight_2, epsilon, False,
            )  # fmt: skip
        elif program < n_programs - 1:
            large = (program - n_small_programs) * BC + tl.arange(0, BC)
            fits = (large < n_large) & ((large < idle_first) | (large >= idle_first + n_idle))
            large_state = load_state(master_ptr, first_moment_ptr, second_moment_ptr, large, fits)
            wait_for_previous(CHAINED)
            of_model_ptr = large_ptr + tl.cast(place, tl.int64) * n_splits * n_large
            total = sum_large_of_bags(
                of_model_ptr, used, used_ptr, large, n_large, n_splits, n_short, n_long, long_rows, BAGS, BP, LEAST
            )
            work_first = tl.cast(model, tl.int64) * n_reduction
            if (program - n_small_programs) * BC >= n_reduction:
                work_first = tl.cast(model, tl.int64) * work_rest_size + work_rest - n_reduction
            adamw(
                large_state, total, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr, update_ptr,
                large, work_first + large, fits, weight_1, weight_2, epsilon, True,
            )  # fmt: skip
        else:
            bias = tl.arange(0, BB)
            bias_fits = (bias < n_logits) & ((n_idle == 0) | (bias >= n_logits // 2))
            bias_at = n_large + n_small + bias
            bias_state = load_state(master_ptr, first_moment_ptr, second_moment_ptr, bias_at, bias_fits)
            wait_for_previous(CHAINED)
            d_logits = sum_of_logits(d_logits_ptr + place * n_logits, used_ptr, bias, n_logits, bias_fits, BAGS)
            adamw(
                bias_state, d_logits, master_ptr, first_moment_ptr, second_moment_ptr, work_ptr,
                update_ptr, bias_at, bias, bias_fits, weight_1, weight_2, epsilon, False,
            )  # fmt: skip
    else:
        wait_for_previous(CHAINED)
    if program == n_programs - 1:
        for bag in range(0, BAGS):
            next_bag(cursor_ptr + (place + bag) * 6, bags_ptr + (place + bag) * positions * 3, positions, used)
