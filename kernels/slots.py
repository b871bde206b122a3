"""Device functions that cut packed bags into slots of rows, each within one bag.

With slots of `size` rows, slot `c` of bag `b` has the number `offsets[b] // size + b + c`. No two slots share a
number, since `floor((o + n) / size) - floor(o / size) + 1 >= ceil(n / size)`, and `ceil(ΣN / size) + B - 1` numbers are
enough, since `floor(o / size) + ceil(n / size) <= ceil((o + n) / size)`: the number of programs is known without
reading the offsets. A number that no slot has is skipped.
"""
# ruff: noqa: ANN001, ANN201, RET505

import triton
import triton.language as tl


@triton.jit
def used_rows(offsets_ptr, n_rows, n_bags, PACKED: tl.constexpr):
    """How many rows belong to bags: on a buffer larger than the batch, the rows behind the last bag are left alone."""
    used = tl.zeros((), tl.int32) + n_rows
    if PACKED:
        used = tl.load(offsets_ptr + n_bags, cache_modifier=".cg").to(tl.int32)
    return used


@triton.jit
def slot_size(used, n_slots, BLOCK: tl.constexpr):
    """Rows of a slot, a multiple of BLOCK, so that about `n_slots` of them cover all rows."""
    return tl.cdiv(tl.cdiv(used, n_slots), BLOCK) * BLOCK


@triton.jit
def find_slot(slot, size, offsets_ptr, n_rows, n_bags, PACKED: tl.constexpr, SEARCH: tl.constexpr):
    """Bag of a slot, its first row and its end; there is none where the first row is not below the end."""
    size = tl.maximum(size, 1)  # without any row there is no slot
    bag = tl.zeros((), tl.int32)
    first = slot * size
    bag_end = tl.zeros((), tl.int32) + n_rows
    if PACKED:
        low = tl.zeros((), tl.int32)
        high = tl.zeros((), tl.int32) + n_bags - 1
        for _ in tl.static_range(SEARCH):  # the last bag whose first slot is not behind this one
            middle = (low + high + 1) // 2
            of_middle = tl.load(offsets_ptr + middle, cache_modifier=".cg").to(tl.int32)
            not_behind = of_middle // size + middle <= slot
            low = tl.where(not_behind, middle, low)
            high = tl.where(not_behind, high, middle - 1)
        bag = low
        start = tl.load(offsets_ptr + bag, cache_modifier=".cg").to(tl.int32)
        bag_end = tl.load(offsets_ptr + bag + 1, cache_modifier=".cg").to(tl.int32)
        first = start + (slot - start // size - bag) * size
    return bag, first, tl.minimum(first + size, bag_end)


@triton.jit
def slots_of_bag(bag, size, offsets_ptr, n_rows, PACKED: tl.constexpr):
    """First slot of a bag, and how many it has."""
    first_slot = tl.zeros((), tl.int32)
    length = tl.zeros((), tl.int32) + n_rows
    if PACKED:
        start = tl.load(offsets_ptr + bag).to(tl.int32)
        length = tl.load(offsets_ptr + bag + 1).to(tl.int32) - start
        first_slot = start // size + bag
    return first_slot, tl.cdiv(length, size)


@triton.jit
def hold_within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices that never reach SIZE. Where whole blocks make up SIZE they stay as they are: loads keep their width."""
    if SIZE % BLOCK == 0:
        return index
    else:
        return tl.minimum(index, SIZE - 1)
