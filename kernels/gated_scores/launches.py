"""Launches of the gated-score kernels over buffers that the caller gives: an operator's, or a training step's."""

from typing import NamedTuple

import torch
from torch import Tensor

from acmil.kernels.gated_scores.backward_kernels import rows_backward_kernel, weight_gradient_kernel
from acmil.kernels.gated_scores.forward_kernels import gate_kernel, reduce_kernel
from acmil.kernels.launch import BRANCH_BLOCK, ceil_div, dot_precision, n_processors, power_of_2_at_least

LEAST_SPLIT_ROWS = 256  # a share of the rows below this is not worth its partial sum


class Weights(NamedTuple):
    """The operator's weights, in the order of the public functions."""

    reduction: Tensor  # (L, D)
    v: Tensor  # (A, L)
    v_bias: Tensor  # (A,)
    u: Tensor  # (A, L)
    u_bias: Tensor  # (A,)
    score: Tensor  # (K, A)
    score_bias: Tensor  # (K,)


class Rows(NamedTuple):
    """Which rows a launch works on.

    Attributes:
        n_rows: Rows of the buffers.
        offsets: (2,) int64 on the device: the last entry is how many of the rows are used. None: all.
        x_first: (1,) int64 on the device, the row of X where the bag begins. None: 0.
    """

    n_rows: int
    offsets: Tensor | None = None
    x_first: Tensor | None = None


class Tile(NamedTuple):
    """Block sizes of a kernel, and how its programs are laid out."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int  # a multiprocessor


class PoolGradients(NamedTuple):
    """What the backward of the scores needs to take in that of one bag's pool, in the same pass over the rows."""

    scores: Tensor  # (K, ΣN) float32
    stats: Tensor  # (K, 2) float32: maximum, and the inverse of the sum of exponentials
    d_pooled: Tensor  # (K, L) float32
    d_pairs: Tensor | None  # (K, K) float32: dG + dGᵀ of the Gram matrix
    correction: Tensor  # (K,) float32: Σ_n P dP


class Tiles(NamedTuple):
    """The tile of each kernel."""

    reduce: Tile
    gate: Tile
    rows_backward: Tile
    weight_gradient: Tile


def choose_tiles(n_rows: int, n_hidden: int, n_gate: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Block sizes for a size of bag."""
    processors = n_processors(device)
    if dtype == torch.float32:
        narrow = min(64, power_of_2_at_least(n_hidden))
        return Tiles(
            reduce=Tile(64, narrow, 32, 4, 3, 2),
            gate=Tile(64, power_of_2_at_least(n_gate), 32, 8, 2, 1),
            rows_backward=Tile(32, 32, 32, 4, 2, 2),
            weight_gradient=Tile(64, 64, 32, 4, 3, 2),
        )
    long = n_rows >= 128 * processors
    return Tiles(
        reduce=_reduction_tile(n_rows, n_hidden, processors),
        gate=Tile(128 if long and n_gate <= 128 else 64, power_of_2_at_least(n_gate), 64, 8, 3, 1),
        rows_backward=Tile(128, 128, 64, 8, 2, 1) if long else Tile(64, 128, 64, 4, 2, 2),
        weight_gradient=Tile(128, 128, 64, 8, 3, 2),
    )


def _reduction_tile(n_rows: int, n_columns: int, processors: int) -> Tile:
    """Tile of the reduction: its worth is its speed on a full chip times the share of the chip its last wave fills."""
    best, best_worth = None, 0.0
    for tile, speed in (
        (Tile(128, 256, 64, 8, 3, 1), 1.0),
        (Tile(128, 128, 64, 8, 3, 2), 0.9),
        (Tile(64, 128, 64, 4, 3, 2), 0.75),
        (Tile(64, 64, 64, 4, 4, 2), 0.55),
    ):
        n_tiles = ceil_div(n_rows, tile.rows) * ceil_div(n_columns, tile.columns)
        used = n_columns / (ceil_div(n_columns, tile.columns) * tile.columns)
        worth = speed * used * n_tiles / (ceil_div(n_tiles, processors) * processors)
        if worth > best_worth:
            best, best_worth = tile, worth
    assert best is not None
    return best


def launch_reduce(features: Tensor, weight: Tensor, hidden: Tensor, rows: Rows, tile: Tile) -> None:
    """Write H = relu(X W1ᵀ)."""
    n_hidden, n_features = weight.shape
    n_tiles = ceil_div(rows.n_rows, tile.rows) * ceil_div(n_hidden, tile.columns)
    reduce_kernel[(min(n_tiles, tile.programs * n_processors(hidden.device)),)](
        features, weight, hidden, rows.x_first, rows.offsets, rows.n_rows, 1,
        D=n_features, L=n_hidden, BN=tile.rows, BL=tile.columns, BD=tile.depth, WINDOW=rows.x_first is not None,
        PACKED=rows.offsets is not None, PRECISION=dot_precision(hidden.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_gate(hidden: Tensor, weights: Weights, scores: Tensor, gate: Tensor | None, rows: Rows, tile: Tile) -> None:
    """Write the scores (K, ΣN) and, where there is a place for them, the arguments of the gate (ΣN, 2A)."""
    n_branches, n_gate = weights.score.shape
    n_blocks = ceil_div(rows.n_rows, tile.rows)
    gate_kernel[(min(n_blocks, tile.programs * n_processors(hidden.device)),)](
        hidden, *weights[1:], scores, gate, rows.offsets, rows.n_rows, 1, scores.stride(0),
        L=hidden.shape[1], A=n_gate, K=n_branches, BN=tile.rows, BL=tile.depth, BA=tile.columns, BK=BRANCH_BLOCK,
        SAVE_GATE=gate is not None, PACKED=rows.offsets is not None, PRECISION=dot_precision(hidden.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_rows_backward(
    hidden: Tensor,
    gate: Tensor,
    weights: Weights,
    d_reduced: Tensor,
    d_gate: Tensor,
    small: Tensor,
    rows: Rows,
    tile: Tile,
    *,
    d_hidden: Tensor | None = None,
    d_scores: Tensor | None = None,
    pool: PoolGradients | None = None,
) -> None:
    """Write d(X W1ᵀ) (ΣN, L), the gradients of the gate's arguments (ΣN, 2A) and, block by block, partial sums.

    `d_gate` may be `gate` itself.
    """
    n_branches, n_gate = weights.score.shape
    strided = d_scores if pool is None else pool.scores
    n_blocks = ceil_div(rows.n_rows, tile.rows)
    rows_backward_kernel[(min(n_blocks, tile.programs * n_processors(hidden.device)),)](
        hidden, gate, weights.v, weights.u, weights.score, d_hidden, d_scores, *((None,) * 5 if pool is None else pool),
        d_reduced, d_gate, small, rows.offsets, rows.n_rows, 1, 0 if strided is None else strided.stride(0),
        L=hidden.shape[1], A=n_gate, K=n_branches, BN=tile.rows, BL=tile.columns, BD=tile.depth,
        BK=BRANCH_BLOCK, D_HIDDEN=d_hidden is not None, D_SCORES=d_scores is not None, POOL=pool is not None,
        PAIRS=pool is not None and pool.d_pairs is not None, PACKED=rows.offsets is not None,
        PRECISION=dot_precision(hidden.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def weight_gradient_splits(
    n_rows: int, n_features: int, n_hidden: int, n_gate: int, tile: Tile, device: torch.device
) -> tuple[int, int]:
    """Output tiles of the weight gradients, and into how many shares the rows are cut so that all processors work."""
    tiles = ceil_div(n_hidden, tile.rows) * ceil_div(n_features, tile.columns)
    tiles += ceil_div(2 * n_gate, tile.rows) * ceil_div(n_hidden, tile.columns)
    splits = min(tile.programs * n_processors(device) // tiles, ceil_div(n_rows, LEAST_SPLIT_ROWS))
    return tiles, max(1, splits)


def launch_weight_gradient(
    features: Tensor, hidden: Tensor, d_reduced: Tensor, d_gate: Tensor, large: Tensor, rows: Rows, tile: Tile
) -> None:
    """Write partial sums of dW1 and [dV; dU], (splits, L·D + 2A·L) float32."""
    n_features, n_hidden, gates = features.shape[1], hidden.shape[1], d_gate.shape[1]
    tiles, _ = weight_gradient_splits(rows.n_rows, n_features, n_hidden, gates // 2, tile, hidden.device)
    weight_gradient_kernel[(tiles * large.shape[0],)](
        d_reduced, features, d_gate, hidden, large, rows.x_first, rows.offsets, rows.n_rows, 1, large.shape[0],
        D=n_features, L=n_hidden, G=gates, BM=tile.rows, BC=tile.columns, BN=tile.depth, LEAST=LEAST_SPLIT_ROWS,
        WINDOW=rows.x_first is not None, PACKED=rows.offsets is not None, PRECISION=dot_precision(hidden.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
