"""The Triton kernel of stochastic top-k masking: one launch finds each row's highest scores and draws which to mask."""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from acmil.kernels.products import wait_for_previous
from acmil.kernels.slots import find_slot, slot_size, slots_of_bag, used_rows

NO_KEY: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def score_keys(scores, rows, fits):
    """Whole numbers in the order of the scores; of equal scores the one of the lower row is the higher."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - rows).to(tl.int64)
    return tl.where(fits, keys, NO_KEY)


@triton.jit
def find_top(keys, n_top, BP: tl.constexpr):
    """The `n_top` highest of `keys`, falling, (BP,); what is left over is NO_KEY."""
    place = tl.arange(0, BP)
    picks = tl.full((BP,), NO_KEY, tl.int64)
    for i in range(0, n_top):
        highest = tl.max(keys, axis=0)
        keys = tl.where(keys == highest, NO_KEY, keys)
        picks = tl.where(place == i, highest, picks)
    return picks


@triton.jit
def merge_top(picks, keys, n_top, BP: tl.constexpr):
    """The `n_top` highest of `picks` (BP,) and `keys`, falling; what is left over is NO_KEY."""
    place = tl.arange(0, BP)
    merged = tl.full((BP,), NO_KEY, tl.int64)
    for i in range(0, n_top):
        highest = tl.maximum(tl.max(picks, axis=0), tl.max(keys, axis=0))
        picks = tl.where(picks == highest, NO_KEY, picks)
        keys = tl.where(keys == highest, NO_KEY, keys)
        merged = tl.where(place == i, highest, merged)
    return merged


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
    n_rows, n_bags, n_slots, stride, n_lines, score_stride, top_k, n_find,
    BN: tl.constexpr, BP: tl.constexpr, KEEP: tl.constexpr, MAXIMA: tl.constexpr, PACKED: tl.constexpr,
    SEARCH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Mask one row of scores in one slot's share; the program that comes last in a bag draws for the whole bag.

    With KEEP a mask is written, (R, ΣN) bytes; otherwise masked scores become -inf in place, where a softmax gives them
    exactly nothing. `n_drop_ptr[n]` is how many of a pool of n are masked. With MAXIMA the highest score that is left
    is written, (R, B): for that the `n_find` highest are looked for, one more than the pool where all of it is masked.
    Every `n_lines` rows belong to one model: its offsets and step are `stride` numbers behind those of the one before.
    """
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
    if first < end:
        line_ptr = scores_ptr + line.to(tl.int64) * score_stride
        rows = first + tl.arange(0, BN)  # a slot is one block: there are as many as the rows can fill
        fits = rows < end
        keys = score_keys(tl.load(line_ptr + rows, mask=fits, other=0.0), rows, fits)
        picks = find_top(keys, n_find, BP)
        if KEEP:
            tl.store(keep_ptr + line.to(tl.int64) * n_rows + rows, tl.full((BN,), 1, tl.int8), mask=fits)
        first_slot, count = slots_of_bag(bag, size, offsets_ptr, n_rows, PACKED)
        if PACKED:
            length = (tl.load(offsets_ptr + bag + 1) - tl.load(offsets_ptr + bag)).to(tl.int32)
        else:
            length = tl.zeros((), tl.int32) + n_rows
        all_slots = tl.num_programs(1)
        picks_line_ptr = picks_ptr + line * all_slots * BP
        tl.store(picks_line_ptr + slot * BP + place, picks)
        tl.debug_barrier()  # every thread's writes come before the count below
        last = tl.atomic_add(arrived_ptr + line * n_bags + bag, 1, sem="acq_rel", scope="gpu") == count - 1
        if last:
            if count > 1:
                at = tl.arange(0, BN)
                keys = tl.load(picks_line_ptr + first_slot * BP + at, mask=at < count * BP, other=NO_KEY)
                picks = find_top(keys, n_find, BP)
                for n in range(BN, count * BP, BN):
                    at = n + tl.arange(0, BN)
                    keys = tl.load(picks_line_ptr + first_slot * BP + at, mask=at < count * BP, other=NO_KEY)
                    picks = merge_top(picks, keys, n_find, BP)
            n_drop = tl.load(n_drop_ptr + tl.minimum(top_k, length))
            n_drop = tl.minimum(n_drop, length - 1)
            in_pool = (picks != NO_KEY) & (place < top_k)
            number = (line - model * n_lines) * n_bags + bag
            seed, step = tl.load(seed_ptr + model), tl.load(step_ptr + model * stride)
            masked = draw_masked(in_pool, n_drop, seed, step, number, BP)
            masked_rows = 0x7FFFFFFF - (picks & 0x7FFFFFFF).to(tl.int32)
            if KEEP:
                tl.store(keep_ptr + line.to(tl.int64) * n_rows + masked_rows, tl.zeros((BP,), tl.int8), mask=masked)
            else:
                tl.store(line_ptr + masked_rows, tl.full((BP,), float("-inf"), tl.float32), mask=masked)
            if MAXIMA:
                highest = (tl.max(tl.where(masked, NO_KEY, picks), axis=0) >> 32).to(tl.int32)
                bits = tl.where(highest < 0, highest ^ 0x7FFFFFFF, highest)
                tl.store(maxima_ptr + line * n_bags + bag, bits.to(tl.float32, bitcast=True))
            tl.store(arrived_ptr + line * n_bags + bag, 0)  # ready for the next launch
