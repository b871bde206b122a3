"""Stochastic top-k masking in one launch, without reading anything back to the host."""

from functools import lru_cache

import torch
from torch import Tensor

from acmil.kernels.launch import ceil_div, chained, power_of_2_at_least, search_steps
from acmil.kernels.top_k_masking.counts import share_of_pool
from acmil.kernels.top_k_masking.kernels import mask_kernel

BLOCK = 1024  # scores that a warp holds at once, at most
MOST_SLOTS = 64  # but for the longest bags


def stochastic_top_k_mask(
    scores: Tensor, *, top_k: int, ratio: float, generator: torch.Generator | None, offsets: Tensor | None
) -> Tensor:
    """The reference's function by the fused kernel; the seed of its draw comes from the generator."""
    seed = torch.randint(2**62, (1,), generator=generator, device=scores.device)
    return top_k_mask_op(scores.detach(), seed, top_k, ratio, offsets)


@torch.library.custom_op("acmil::top_k_mask", mutates_args=())
def top_k_mask_op(scores: Tensor, seed: Tensor, top_k: int, ratio: float, offsets: Tensor | None) -> Tensor:
    """Keep mask (R, ΣN) bool; `seed` (1,) int64 on the device."""
    scores = scores.float().contiguous()
    n_lines, n_rows = scores.shape
    n_bags = 1 if offsets is None else offsets.shape[0] - 1
    keep = torch.empty((n_lines, n_rows), dtype=torch.bool, device=scores.device)
    arrived = torch.zeros((n_lines * n_bags,), dtype=torch.int32, device=scores.device)
    zero = torch.zeros((1,), dtype=torch.int64, device=scores.device)
    picks = new_picks(n_lines, n_rows, n_bags, top_k, scores.device)
    launch_mask(
        scores, keep, picks, arrived, drop_table(top_k, ratio, scores.device), seed, zero, top_k, offsets, n_find=top_k
    )
    return keep


@top_k_mask_op.register_fake
def _(scores: Tensor, seed: Tensor, top_k: int, ratio: float, offsets: Tensor | None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def slot_of(n_rows: int, n_bags: int) -> tuple[int, int]:
    """Scores of a slot, and warps to search them."""
    if n_bags == 1 and n_rows <= BLOCK:  # one slot, so that there is no second search
        block = max(BLOCK // 4, power_of_2_at_least(n_rows))
        return block, 4 if block == BLOCK else 1
    block = _block_size(n_rows)
    return block, ceil_div(block, BLOCK)


def _block_size(n_rows: int) -> int:
    """Scores of a slot: as few as a warp finds fast, where that does not make too many slots."""
    if n_rows <= 16 * BLOCK // 4:
        return BLOCK // 4
    if n_rows <= 32 * BLOCK // 2:
        return BLOCK // 2
    return BLOCK if n_rows <= MOST_SLOTS * BLOCK else 2 * BLOCK


def new_picks(n_lines: int, n_rows: int, n_bags: int, n_find: int, device: torch.device) -> Tensor:
    """Room for the highest of each slot of up to `n_rows` scores and their rows, (R, slots, 2, n) int32."""
    n_slots = max(MOST_SLOTS, ceil_div(n_rows, 2 * BLOCK)) + n_bags
    return torch.empty((n_lines, n_slots, 2, power_of_2_at_least(n_find)), dtype=torch.int32, device=device)


@lru_cache
def drop_table(top_k: int, ratio: float, device: torch.device) -> Tensor:
    """How many of a pool of 0, 1, …, top_k are masked, (top_k + 1,) int32: reckoned once, on the host, exactly."""
    return torch.tensor([share_of_pool(n, ratio) for n in range(top_k + 1)], dtype=torch.int32, device=device)


def n_to_find(top_k: int, ratio: float) -> int:
    """How many of the highest scores show the highest that stays: one more than the pool where all of it is masked."""
    return top_k + 1 if share_of_pool(top_k, ratio) == top_k else top_k


def launch_mask(
    scores: Tensor,
    keep: Tensor | None,
    picks: Tensor,
    arrived: Tensor,
    n_drop: Tensor,
    seed: Tensor,
    step: Tensor,
    top_k: int,
    offsets: Tensor | None,
    *,
    n_find: int,
    maxima: Tensor | None = None,
    models: int = 1,
    stride: int = 0,
    bags_a_model: int = 1,
) -> None:
    """Mask scores (R, ΣN) float32 of packed bags: in `keep`, or in place as -inf.

    Each of several models has R / M rows, and a bag of its own; or `bags_a_model` bags in a row are of one.

    Args:
        scores: (R, ΣN) float32; their row stride may be larger.
        keep: (R, ΣN) bool to write, or None.
        picks: Scratch, of `new_picks` for `n_find`.
        arrived: (R · B,) int32, zeros; left as zeros.
        n_drop: Of `drop_table`.
        seed: (1,) int64, or one a model: with `step` and the row, all that the draw depends on.
        step: (1,) int64.
        top_k: Size of the pool; 0 masks nothing.
        offsets: (B+1,) int64, or None for one bag.
        n_find: `top_k`, or `n_to_find` where there are maxima.
        maxima: (R, B) float32 to write: the highest score that is not masked. With them seed, step and offsets must not
            be of the launch directly before: they are read before the wait for it.
        models: M, each with a bag.
        stride: Numbers from a model's offsets, and its step, to the next one's.
        bags_a_model: So many of the M in a row are one, with several bags.
    """
    n_lines, n_rows = scores.shape
    n_bags = 1 if offsets is None else offsets.shape[0] - 1
    block, warps = slot_of(n_rows, n_bags)
    n_slots = ceil_div(n_rows, block)
    places = power_of_2_at_least(n_find)
    warps = max(warps, min(8, places * places // 4096))  # a large pool is compared with itself
    mask_kernel[(n_lines, n_slots + n_bags - 1)](
        scores, keep, maxima, picks, arrived, n_drop, seed, step, offsets, n_rows, n_bags, n_slots, stride,
        n_lines // models, bags_a_model, scores.stride(0), top_k, n_find,
        BN=block, BM=min(BLOCK, power_of_2_at_least(n_slots * places)), BP=places, KEEP=keep is not None,
        MAXIMA=maxima is not None, PACKED=offsets is not None, SEARCH=search_steps(n_bags),
        ALONE=n_slots == 1 and n_bags == 1, num_warps=warps, **chained(scores.device),
    )  # fmt: skip
