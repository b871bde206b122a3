"""The branch pool by fused kernels: three launches forward, one or two backward, registered with torch.library."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from acmil.kernels.branch_pool.kernels import (
    attention_kernel,
    combine_kernel,
    dots_kernel,
    pool_backward_kernel,
    pool_kernel,
)
from acmil.kernels.launch import (
    BRANCH_BLOCK,
    ceil_div,
    chained,
    dot_precision,
    n_processors,
    power_of_2_at_least,
    search_steps,
)

BLOCK = 64  # rows that a program of the backward holds at once
SLOT_BLOCK = 128  # slots that are summed at once
ATTENTION_BLOCK = 256  # rows whose attention a program writes at once
SUM_COLUMNS = 32  # columns of z that a program sums


class PoolLayout(NamedTuple):
    """How the pool is cut into programs."""

    n_slots: int  # about
    rows: int  # that a program holds at once
    columns: int  # that a program holds


def masked_attention_pool(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's function by the fused kernels."""
    return branch_pool_op(hidden, scores, offsets, keep)


@torch.library.custom_op("acmil::branch_pool", mutates_args=())
def branch_pool_op(
    hidden: Tensor, scores: Tensor, offsets: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool: z (B, K, L), P (K, ΣN) and G (B, K, K), all float32."""
    hidden, scores = hidden.contiguous(), scores.float().contiguous()
    keep = None if keep is None else keep.contiguous()
    pooled, attention, gram = _empty_outputs(hidden, scores, offsets)
    (n_bags, n_branches, n_hidden), n_rows = pooled.shape, hidden.shape[0]
    stats = torch.empty((n_bags, n_branches, 2), dtype=torch.float32, device=hidden.device)
    layout = pool_layout(n_rows, n_hidden, hidden.device)
    partials = new_partials(layout.n_slots + n_bags, n_branches, n_hidden, hidden.device)
    launch_pool(hidden, scores, keep, partials, offsets, layout)
    shared = {"K": n_branches, "BK": BRANCH_BLOCK, "PACKED": offsets is not None, **chained(hidden.device)}
    combine_kernel[(n_bags * n_branches * ceil_div(n_hidden, SUM_COLUMNS),)](
        *partials, pooled, stats, gram, offsets, n_rows, n_bags, layout.n_slots,
        L=n_hidden, BN=layout.rows, BL=SUM_COLUMNS, BS=SLOT_BLOCK, **shared,
    )  # fmt: skip
    n_slots = max(1, min(2 * n_processors(hidden.device), ceil_div(n_rows, ATTENTION_BLOCK)))
    attention_kernel[(n_slots + n_bags,)](
        scores, keep, stats, attention, offsets, n_rows, n_bags, n_slots, BN=ATTENTION_BLOCK,
        KEEP=keep is not None, SEARCH=search_steps(n_bags), **shared,
    )  # fmt: skip
    return pooled, attention, gram


@branch_pool_op.register_fake
def _(hidden: Tensor, scores: Tensor, offsets: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, scores, offsets)


def _empty_outputs(hidden: Tensor, scores: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n_bags, n_branches = 1 if offsets is None else offsets.shape[0] - 1, scores.shape[0]
    return (
        hidden.new_empty(n_bags, n_branches, hidden.shape[1], dtype=torch.float32),
        scores.new_empty(scores.shape, dtype=torch.float32),
        hidden.new_empty(n_bags, n_branches, n_branches, dtype=torch.float32),
    )


def pool_layout(n_rows: int, n_hidden: int, device: torch.device) -> PoolLayout:
    """Slots for all processors, few enough to be summed at once; whole rows of H in each, where they are short."""
    columns = next((c for c in (512, 256, 128) if n_hidden % c == 0), min(128, power_of_2_at_least(n_hidden)))
    most = max(1, min(SLOT_BLOCK, n_processors(device)) // ceil_div(n_hidden, columns))
    rows = 32 if n_rows >= 32 * most else 16
    return PoolLayout(min(most, ceil_div(n_rows, rows)), rows, columns)


def new_partials(n_slots: int, n_branches: int, n_hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the partial sums of slots: (slots, K, L), (slots, K, 2) and (slots, K, K), float32."""
    shapes = ((n_hidden,), (2,), (n_branches,))
    parts, stats, grams = (torch.empty((n_slots, n_branches, *shape), device=device) for shape in shapes)
    return parts, stats, grams


def launch_pool(
    hidden: Tensor,
    scores: Tensor,
    keep: Tensor | None,
    partials: tuple[Tensor, Tensor, Tensor],
    offsets: Tensor | None,
    layout: PoolLayout,
) -> None:
    """Write the partial sums of every slot."""
    (n_rows, n_hidden), n_branches, half = hidden.shape, scores.shape[0], hidden.dtype != torch.float32
    n_bags = 1 if offsets is None else offsets.shape[0] - 1
    programs = (layout.n_slots if offsets is None else layout.n_slots + n_bags) * ceil_div(n_hidden, layout.columns)
    pool_kernel[(programs,)](
        hidden, scores, keep, *partials, offsets, n_rows, n_bags, layout.n_slots, scores.stride(0),
        L=n_hidden, K=n_branches, BN=layout.rows, BL=layout.columns, BK=BRANCH_BLOCK, KEEP=keep is not None,
        PACKED=offsets is not None, SEARCH=search_steps(n_bags), PRECISION=dot_precision(hidden.dtype),
        num_warps=8 if layout.columns > 128 else 4, num_stages=4 if half else 2, **chained(hidden.device),
    )  # fmt: skip


@torch.library.custom_op("acmil::branch_pool_backward", mutates_args=())
def branch_pool_backward_op(
    d_pooled: Tensor | None,
    d_attention: Tensor | None,
    d_gram: Tensor | None,
    hidden: Tensor,
    pooled: Tensor,
    attention: Tensor,
    gram: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients dH (ΣN, L) and dS (K, ΣN)."""
    hidden = hidden.contiguous()
    d_pooled, d_attention, d_gram = (
        None if d is None else d.float().contiguous() for d in (d_pooled, d_attention, d_gram)
    )
    (n_bags, n_branches, n_hidden), n_rows = pooled.shape, hidden.shape[0]
    d_hidden, d_scores = torch.empty_like(hidden), torch.empty_like(attention)
    shared = {
        "K": n_branches, "BK": BRANCH_BLOCK, "BN": BLOCK, "PACKED": offsets is not None, "SEARCH": search_steps(n_bags),
        **chained(hidden.device),
    }  # fmt: skip
    n_slots = max(1, min(2 * n_processors(hidden.device), ceil_div(n_rows, BLOCK)))
    dots = None
    if d_attention is not None:
        dots = torch.empty((n_slots + n_bags, n_branches), dtype=torch.float32, device=hidden.device)
        dots_kernel[(n_slots + n_bags,)](attention, d_attention, dots, offsets, n_rows, n_bags, n_slots, **shared)
    pool_backward_kernel[(n_slots + n_bags,)](
        hidden, attention, pooled, gram, d_pooled, d_attention, d_gram, dots, d_hidden, d_scores, offsets,
        n_rows, n_bags, n_slots, L=n_hidden, BL=min(64, power_of_2_at_least(n_hidden)), BS=SLOT_BLOCK,
        D_POOLED=d_pooled is not None, D_ATTENTION=d_attention is not None, D_GRAM=d_gram is not None,
        PRECISION=dot_precision(hidden.dtype), num_warps=4, num_stages=2, **shared,
    )  # fmt: skip
    return d_hidden, d_scores


@branch_pool_backward_op.register_fake
def _(
    d_pooled: Tensor | None, d_attention: Tensor | None, d_gram: Tensor | None, hidden: Tensor, pooled: Tensor,
    attention: Tensor, gram: Tensor, offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return hidden.new_empty(hidden.shape), torch.empty_like(attention)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, scores, offsets, _ = inputs
    ctx.save_for_backward(hidden, offsets, *output)
    ctx.scores_dtype = scores.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_pooled: Tensor | None, d_attention: Tensor | None, d_gram: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, offsets, pooled, attention, gram = ctx.saved_tensors
    d_hidden, d_scores = branch_pool_backward_op(
        d_pooled, d_attention, d_gram, hidden, pooled, attention, gram, offsets
    )
    return d_hidden, d_scores.to(ctx.scores_dtype), None, None


branch_pool_op.register_autograd(_backward, setup_context=_setup)
