"""The Triton kernel of stochastic top-k masking: one launch finds each row's highest scores and draws which to mask."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import wait_for_previous
from acmil.kernels.slots import find_slot, slot_size, slots_of_bag, used_rows

NO_SCORE: tl.constexpr = tl.constexpr(-(2**31))
LAST_ROW: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def score_keys(scores, fits):
    """Whole numbers, 32 bits, in the order of the scores."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(fits, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), NO_SCORE)


@triton.jit
def key_scores(keys):
    """The scores that `score_keys` made numbers of."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def find_top(keys, rows, n_top, BP: tl.constexpr):
    """The `n_top` highest keys, falling, and their rows, (BP,) each; of equal ones the lower row comes first.

    What is left over is NO_SCORE and LAST_ROW. Two searches of 32 bits are faster than one of 64: a warp has an
    instruction for them.
    """
    place = tl.arange(0, BP)
    top = tl.full((BP,), NO_SCORE, tl.int32)
    top_rows = tl.full((BP,), LAST_ROW, tl.int32)
    for i in range(0, n_top):
        highest = tl.max(keys, axis=0)
        row = tl.min(tl.where(keys == highest, rows, LAST_ROW), axis=0)
        keys = tl.where(rows == row, NO_SCORE, keys)
        rows = tl.where(rows == row, LAST_ROW, rows)
        top = tl.where(place == i, highest, top)
        top_rows = tl.where(place == i, row, top_rows)
    return top, top_rows


@triton.jit
def merge_top(top, top_rows, keys, rows, n_top, BP: tl.constexpr):
    """The `n_top` highest of two sets of keys, as `find_top` gives them; rows are of one set alone."""
    place = tl.arange(0, BP)
    merged = tl.full((BP,), NO_SCORE, tl.int32)
    merged_rows = tl.full((BP,), LAST_ROW, tl.int32)
    for i in range(0, n_top):
        highest = tl.maximum(tl.max(top, axis=0), tl.max(keys, axis=0))
        row = tl.min(tl.where(keys == highest, rows, LAST_ROW), axis=0)
        row = tl.minimum(row, tl.min(tl.where(top == highest, top_rows, LAST_ROW), axis=0))
        keys = tl.where(rows == row, NO_SCORE, keys)
        rows = tl.where(rows == row, LAST_ROW, rows)
        top = tl.where(top_rows == row, NO_SCORE, top)
        top_rows = tl.where(top_rows == row, LAST_ROW, top_rows)
        merged = tl.where(place == i, highest, merged)
        merged_rows = tl.where(place == i, row, merged_rows)
    return merged, merged_rows


@triton.jit
def save_top(picks_ptr, slot, top, top_rows, BP: tl.constexpr):
    """Write what was found in a slot; `picks_ptr` has room for 2 BP numbers a slot."""
    place = tl.arange(0, BP)
    tl.store(picks_ptr + slot * (2 * BP) + place, top)
    tl.store(picks_ptr + slot * (2 * BP) + BP + place, top_rows)


@triton.jit
def top_of_slots(picks_ptr, count, n_top, BM: tl.constexpr, BP: tl.constexpr):
    """The `n_top` highest of what was found in the first `count` slots, BM at a time."""
    top = tl.full((BP,), NO_SCORE, tl.int32)
    top_rows = tl.full((BP,), LAST_ROW, tl.int32)
    for n in range(0, count * BP, BM):
        at = n + tl.arange(0, BM)
        fits = at < count * BP
        at_ptr = picks_ptr + at // BP * (2 * BP) + at % BP
        keys = tl.load(at_ptr, mask=fits, other=NO_SCORE)
        rows = tl.load(at_ptr + BP, mask=fits, other=LAST_ROW)
        if n == 0:
            top, top_rows = find_top(keys, rows, n_top, BP)
        else:
            top, top_rows = merge_top(top, top_rows, keys, rows, n_top, BP)
    return top, top_rows


@triton.jit
def draw_masked(in_pool, n_drop, seed, step, row, BP: tl.constexpr):
    """Which `n_drop` of the pool are masked, (BP,) bool: those with the highest of independent random numbers."""
    place = tl.arange(0, BP)
    zero = tl.zeros((BP,), tl.int32)
    numbers, _, _, _ = tl.philox(
        seed, place, zero + row, zero + (step & 0xFFFFFFFF).to(tl.int32), zero + (step >> 32).to(tl.int32)
    )
    numbers = tl.where(in_pool, (numbers.to(tl.int64) << 16) | place.to(tl.int64), -1)  # ties are broken
    rank = tl.sum((numbers[None, :] > numbers[:, None]).to(tl.int32), axis=1)
    return (rank < n_drop) & in_pool


@triton.jit
def mask_kernel(
    scores_ptr, keep_ptr, maxima_ptr, picks_ptr, arrived_ptr, n_drop_ptr, seed_ptr, step_ptr, offsets_ptr,
    n_rows, n_bags, n_slots, stride, n_lines, bags_a_model, score_stride, top_k, n_find,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, KEEP: tl.constexpr, MAXIMA: tl.constexpr,
    PACKED: tl.constexpr, SEARCH: tl.constexpr, ALONE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Mask one row of scores in one slot's share; the program that comes last in a bag draws for the whole bag.

    With KEEP a mask is written, (R, ΣN) bytes; otherwise masked scores become -inf in place, where a softmax gives them
    exactly nothing. `n_drop_ptr[n]` is how many of a pool of n are masked. With MAXIMA the highest score that is left
    is written, (R, B): for that the `n_find` highest are looked for, one more than the pool where all of it is masked.
    Every `n_lines` rows belong to one model: its offsets and step are `stride` numbers behind those of the one before.
    `bags_a_model` bags in a row may be of one model: they share its seed, and draw as packed bags do.
    With ALONE there is one slot, of all rows of one bag: nothing to wait for, nothing to put together.
    """
    if not MAXIMA:  # the offsets may be of the launch before
        wait_for_previous(CHAINED)
    line = tl.program_id(0)
    slot = tl.program_id(1)
    model = line // n_lines
    if PACKED:
        offsets_ptr += model * stride
    used = used_rows(offsets_ptr, n_rows, n_bags, PACKED)
    size = slot_size(used, n_slots, BN)
    bag, first, end = find_slot(slot, size, offsets_ptr, n_rows, n_bags, PACKED, SEARCH)
    place = tl.arange(0, BP)
    length = tl.zeros((), tl.int32) + n_rows
    if PACKED:
        start = tl.load(offsets_ptr + bag, cache_modifier=".cg")
        length = (tl.load(offsets_ptr + bag + 1, cache_modifier=".cg") - start).to(tl.int32)
    n_drop = tl.load(n_drop_ptr + tl.minimum(top_k, length), cache_modifier=".cg")
    n_drop = tl.minimum(n_drop, length - 1)
    seed = tl.load(seed_ptr + model // bags_a_model, cache_modifier=".cg")
    step = tl.load(step_ptr + model * stride, cache_modifier=".cg")
    if MAXIMA:
        wait_for_previous(CHAINED)
    if first < end:
        line_ptr = scores_ptr + line.to(tl.int64) * score_stride
        rows = first + tl.arange(0, BN)  # a slot is one block: there are as many as the rows can fill
        fits = rows < end
        keys = score_keys(tl.load(line_ptr + rows, mask=fits, other=0.0), fits)
        top, top_rows = find_top(keys, tl.where(fits, rows, LAST_ROW), n_find, BP)
        if KEEP:
            tl.store(keep_ptr + line.to(tl.int64) * n_rows + rows, tl.full((BN,), 1, tl.int8), mask=fits)
        picks_line_ptr = picks_ptr + line * tl.num_programs(1) * (2 * BP)
        if not ALONE:
            save_top(picks_line_ptr, slot, top, top_rows, BP)
        tl.debug_barrier()  # every thread's writes come before the count, and before those of what is masked
        last = True
        if not ALONE:
            first_slot, count = slots_of_bag(bag, size, offsets_ptr, n_rows, PACKED)
            last = tl.atomic_add(arrived_ptr + line * n_bags + bag, 1, sem="acq_rel", scope="gpu") == count - 1
        if last:
            if not ALONE:  # noqa: SIM102 (the compiler looks at what it knows beforehand by itself)
                if count > 1:
                    top, top_rows = top_of_slots(picks_line_ptr + first_slot * (2 * BP), count, n_find, BM, BP)
            in_pool = (top_rows != LAST_ROW) & (place < top_k)
            number = ((line - model * n_lines) * bags_a_model + model % bags_a_model) * n_bags + bag
            masked = draw_masked(in_pool, n_drop, seed, step, number, BP)
            if KEEP:
                tl.store(keep_ptr + line.to(tl.int64) * n_rows + top_rows, tl.zeros((BP,), tl.int8), mask=masked)
            else:
                tl.store(line_ptr + top_rows, tl.full((BP,), float("-inf"), tl.float32), mask=masked)
            if MAXIMA:
                highest = tl.max(tl.where(masked, NO_SCORE, top), axis=0)
                tl.store(maxima_ptr + line * n_bags + bag, key_scores(highest))
            if not ALONE:
                tl.store(arrived_ptr + line * n_bags + bag, 0)  # ready for the next launch
