"""Device functions for launches that serve several models at once, each with a bag and parameters of its own.

The rows of all models lie in one matrix, those of model m from row `m * model_rows` on. How many of them are used is on
the device, `stride` numbers from one model to the next. Several bags of one model stand as if each had its own.
"""
# ruff: noqa: ANN001, ANN201, RET505

import triton
import triton.language as tl

from acmil.kernels.launch import MAX_BAGS
from acmil.kernels.slots import used_rows

MOST_MODELS: tl.constexpr = tl.constexpr(MAX_BAGS)


@triton.jit
def block_ends(
    offsets_ptr, n_rows, n_bags, n_models, stride, SEVERAL: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Blocks of rows that are used, of each model and those before it, (MOST_MODELS,); of a single one, a number."""
    if SEVERAL:
        model = tl.arange(0, MOST_MODELS)
        used = tl.load(offsets_ptr + model * stride + n_bags, mask=model < n_models, other=0, cache_modifier=".cg")
        return tl.cumsum(tl.cdiv(used.to(tl.int32), BLOCK), axis=0)
    else:
        return tl.cdiv(used_rows(offsets_ptr, n_rows, n_bags, PACKED), BLOCK)


@triton.jit
def count_blocks(ends, SEVERAL: tl.constexpr):
    """Blocks of all models."""
    if SEVERAL:
        return tl.max(ends, axis=0)
    else:
        return ends


@triton.jit
def find_model(block, ends, SEVERAL: tl.constexpr):
    """The model that a block belongs to, and its number among that model's blocks."""
    if SEVERAL:
        before = ends <= block
        return tl.sum(before.to(tl.int32), axis=0), block - tl.max(tl.where(before, ends, 0), axis=0)
    else:
        return tl.zeros((), tl.int32), block
