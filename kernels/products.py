"""Device functions that the kernels' arithmetic shares."""
# ruff: noqa: ANN001, ANN201, RET505

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Wait until the launch before this one has ended; where CHAINED its programs were put in place while it ran.

    Before it a program may read what launches further back have written, past the L1 (`cache_modifier=".cg"`), which
    may hold older lines: the launch before this one let it begin once it had waited itself. That is inferred; the PTX
    manual promises what the launch before has written, after the wait. What the launch directly before may have
    written is never read here: not by `reduce`, which follows the update and copies of PyTorch's, nor by what an
    operator begins with. Nothing is written.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def dot_with_float32(left, right, acc, PRECISION: tl.constexpr):
    """Add `left right` to acc for a float32 `right`, which half operands take as two terms.

    The backward of a softmax takes the difference of sums over a bag that all but cancel: rounding `right` once would
    push all rows the same way, and show in their sum.
    """
    high = right.to(left.dtype)
    acc = tl.dot(left, high, acc, input_precision=PRECISION)
    if left.dtype != tl.float32:
        acc = tl.dot(left, (right - high.to(tl.float32)).to(left.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_of_pairs(left, right, acc, PRECISION: tl.constexpr):
    """Add `left right` of float32 operands to acc, as exact as float32 is, whatever type the features have."""
    if PRECISION == "ieee":
        return tl.dot(left, right, acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision="tf32x3")


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """Hyperbolic tangent; FAST is the GPU's own, right to 11 bits, which is finer than what half types keep."""
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def held_beside(x, other, FAST: tl.constexpr):
    """Give back x, float32, distributed over the threads as `other` is, of the same shape.

    Where x is needed in two distributions the compiler would rather work out twice all that follows from it.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1; // $2", "=f,f,f", [x, other], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Logistic function."""
    if FAST:
        return 0.5 * tanh(0.5 * x, True) + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def store_tile(matrix, tile, row, column, BN: tl.constexpr, BL: tl.constexpr):
    """Write a tile (BN, BL) by a descriptor, whose blocks have a quarter of the columns where BL is 256.

    The copies then need little of the shared memory, which is left to one more block of operands under way.
    """
    if BL == 256:
        left, right = tl.split(tl.permute(tl.reshape(tile, (BN, 2, BL // 2)), (0, 2, 1)))
        first, second = tl.split(tl.permute(tl.reshape(left, (BN, 2, BL // 4)), (0, 2, 1)))
        third, fourth = tl.split(tl.permute(tl.reshape(right, (BN, 2, BL // 4)), (0, 2, 1)))
        matrix.store([row, column], first)
        matrix.store([row, column + BL // 4], second)
        matrix.store([row, column + BL // 2], third)
        matrix.store([row, column + BL // 4 * 3], fourth)
    else:
        matrix.store([row, column], tile)
