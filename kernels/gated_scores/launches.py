"""Launches of the gated-score kernels over buffers that the caller gives: an operator's, or a training step's."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from acmil.kernels.gated_scores.backward_kernels import (
    gate_backward_kernel,
    reduction_backward_kernel,
    weight_gradient_kernel,
)
from acmil.kernels.gated_scores.forward_kernels import gate_kernel, reduce_kernel
from acmil.kernels.launch import (
    BRANCH_BLOCK,
    SHARED_BYTES,
    ceil_div,
    chained,
    dot_precision,
    may_approximate,
    n_processors,
    power_of_2_at_least,
)

_GATE_REST_BYTES = 10_240  # of shared memory, beside what the gate has under way
_STAGES_REST_BYTES = 1_024  # the same for the gradients of the weights
_TYPICAL_ROWS = (10_000, 30_000)  # of a bag that is not long, and of one that is
_SHORT_ROWS = 1_024  # a bag up to here is not cut into shares where its tiles are enough for all processors
_LEAST_SHARE = 256  # rows, elsewhere: a smaller one is not worth its partial sum
_ROWS_OF_A_PARTIAL = 4_000  # whose product takes as long as writing and adding one more partial sum, as measured


class Weights(NamedTuple):
    """The operator's weights, in the order of the public functions; of several models, those of the first."""

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
        n_rows: Most rows of a bag.
        offsets: (2,) int64 on the device: the last entry is how many of the rows are used. None: all.
        x_first: (1,) int64 on the device, the row of X where the bag begins. None: 0. Like the offsets it must not be
            of the launch directly before, but for `launch_reduce`: the others read them before they wait.
        models: How many bags there are, each with buffers and partial sums of its own, as if of as many models; at most
            `MAX_BAGS`.
        stride: Numbers from a model's offsets, and its first row of X, to the next one's.
        model_rows: Rows of the buffers from a model's to the next one's, whole tiles.
        bags_a_model: So many bags in a row are of one model, and share its weights.
    """

    n_rows: int
    offsets: Tensor | None = None
    x_first: Tensor | None = None
    models: int = 1
    stride: int = 0
    model_rows: int = 0
    bags_a_model: int = 1


class Parts(NamedTuple):
    """Where the parameters of several models lie.

    Attributes:
        weight_rows: From the V, U and heads of a model to those of the next, with zeros behind them.
        parameters: Numbers from the biases and w of a model to those of the next.
    """

    weight_rows: int = 0
    parameters: int = 0


ONE_MODEL = Parts()


class Shares(NamedTuple):
    """Into how many shares the rows of a bag are cut for the gradients of the weights."""

    short: int  # or fewer, of `least_rows` each
    long: int
    long_rows: int  # from so many on
    least_rows: int  # a share below this is not worth its partial sum

    def of(self, n_rows: int) -> int:
        """Shares of a bag."""
        return self.long if n_rows >= self.long_rows else min(self.short, ceil_div(n_rows, self.least_rows))

    def most(self, n_rows: int) -> int:
        """Most shares of a bag of up to so many rows."""
        return max(self.of(n_rows), self.of(min(n_rows, self.long_rows - 1)))


class Tile(NamedTuple):
    """Block sizes of a kernel, and how its programs are laid out."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int  # a multiprocessor


class PoolGradients(NamedTuple):
    """What the backward of the scores needs to take in that of one bag's pool and heads, in the same pass over rows.

    Those of several models lie one after another.
    """

    scores: Tensor  # (K, ΣN) float32
    maxima: Tensor  # (K,) float32
    inverses: Tensor  # (K,) float32: of the sum of exponentials
    projections: Tensor  # H Wᵀ, ((K + 1) C, ΣN) float32
    d_logits: Tensor  # ((K + 1) C,) float32: of the branches, then of the bag
    d_pairs: Tensor | None  # (K, K) float32: dG + dGᵀ of the Gram matrix
    correction: Tensor  # (K,) float32: Σ_n P dP


class Tiles(NamedTuple):
    """The tile of each kernel."""

    reduce: Tile
    gate: Tile
    gate_backward: Tile
    reduction_backward: Tile
    weight_gradient: Tile


def choose_tiles(n_rows: int, n_hidden: int, n_gate: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Block sizes for a size of bag, or for so many rows of several bags.

    They change no bits: each sum runs over its terms in the same order in every tile.
    """
    processors, whole_gate = n_processors(device), power_of_2_at_least(n_gate)
    if dtype == torch.float32:
        return Tiles(
            reduce=Tile(64, 64, 32, 4, 3, 2),
            gate=Tile(16, whole_gate, 32, 8, 2, 2),
            gate_backward=Tile(16 if n_gate > 128 else 32, whole_gate, 32, 8, 2, 1),
            reduction_backward=Tile(64, 64, 32, 4, 3, 2),
            weight_gradient=Tile(64, 64, 32, 4, 3, 2),
        )
    return Tiles(
        reduce=_reduction_tile(n_rows, n_hidden, processors),
        gate=_gate_tile(n_rows, whole_gate, processors),
        gate_backward=_gate_backward_tile(n_rows, whole_gate, processors),
        reduction_backward=_reduction_backward_tile(n_rows, n_hidden, processors),
        weight_gradient=_weight_gradient_tile(n_rows, processors),
    )


def _long_bag(device: torch.device) -> int:
    """From how many rows on the largest tiles leave no processor without work."""
    return 128 * n_processors(device)


def _reduction_tile(n_rows: int, n_columns: int, processors: int) -> Tile:
    """Tile of the reduction: its worth is its speed on a full chip times the share of the chip its last wave fills."""
    best, best_worth = None, 0.0
    for tile, speed in (
        (Tile(128, 256, 64, 8, 4, 1), 1.0),
        (Tile(128, 128, 64, 4, 4, 1), 0.95),
        (Tile(64, 128, 64, 4, 4, 2), 0.75),
        (Tile(64, 64, 128, 4, 5, 1), 0.55),
    ):
        n_tiles = ceil_div(n_rows, tile.rows) * ceil_div(n_columns, tile.columns)
        used = n_columns / (ceil_div(n_columns, tile.columns) * tile.columns)
        worth = speed * used * n_tiles / (ceil_div(n_tiles, processors) * processors)
        if worth > best_worth:
            best, best_worth = tile, worth
    assert best is not None
    return best


def _gate_tile(n_rows: int, n_gate: int, processors: int) -> Tile:
    """Tile of the gate: two programs a processor where there is work for as many."""
    if n_gate > 128:
        return Tile(64, n_gate, 64, 8, 3, 1)
    if n_rows >= 128 * processors:
        return Tile(128, n_gate, 64, 8, 4, 1)
    return Tile(64, n_gate, 64, 4, 2, 2) if n_rows >= 64 * processors else Tile(64, n_gate, 64, 4, 3, 1)


def _gate_backward_tile(n_rows: int, n_gate: int, processors: int) -> Tile:
    """Tile of the backward of the gate: twice the warps where a program has one block of rows, and no other beside it.

    With these gates alone each warp then has the columns that it has otherwise, whose sums stay the same to the bit.
    """
    stages = 3 if n_rows > 64 * processors else 2
    has_one_block = n_gate == 128 and n_rows <= 32 * processors
    return Tile(32, n_gate, 64, 8 if n_gate > 128 or has_one_block else 4, stages, 2)


def _weight_gradient_tile(n_rows: int, processors: int) -> Tile:
    """Tile of the gradients of the weights; of a short bag, in few shares or one, they are small and many."""
    if n_rows >= 128 * processors:
        return Tile(128, 256, 64, 8, 3, 1)
    return Tile(64, 64, 64, 4, 4, 2) if n_rows <= _SHORT_ROWS else Tile(128, 128, 64, 4, 4, 1)


def _reduction_backward_tile(n_rows: int, n_hidden: int, processors: int) -> Tile:
    """Tile of the backward of the reduction: the largest that leaves no processor without work."""
    if n_hidden >= 256 and n_rows >= 128 * processors:
        return Tile(128, 256, 64, 8, 4, 1)
    fills = ceil_div(n_rows, 64) * ceil_div(n_hidden, 128) >= processors
    return Tile(64, 128, 64, 4, 3 if fills else 4, 2)


def _grid(n_programs: int, tile: Tile, device: torch.device) -> tuple[int]:
    """A program for each block of work, or as many as the GPU holds at once, which then walk over the blocks."""
    return (min(n_programs, tile.programs * n_processors(device)),)


def _options(tensor: Tensor, tile: Tile, *, fast: bool = False) -> dict[str, object]:
    """What every launch is told besides its operands; `fast`: the kernel has functions that may be approximated."""
    options: dict[str, object] = {"FAST": may_approximate(tensor.dtype, tensor.device)} if fast else {}
    options |= {"PRECISION": dot_precision(tensor.dtype), **chained(tensor.device)}
    return {**options, "num_warps": tile.warps, "num_stages": tile.stages}


def _store_block(tile: Tile) -> list[int]:
    """Block of the descriptor that `store_tile` writes a tile by."""
    return [tile.rows, tile.columns // 4 if tile.columns == 256 else tile.columns]


def new_signs(n_rows: int, n_hidden: int, device: torch.device) -> Tensor:
    """Room for the signs of H (N, L): whole words, 4 for every 64 columns."""
    return torch.empty((n_rows, ceil_div(n_hidden, 64) * 4), dtype=torch.int16, device=device)


def launch_reduce(
    features: Tensor, weight: Tensor, hidden: Tensor, signs: Tensor | None, rows: Rows, tile: Tile
) -> None:
    """Write H = relu(X W1ᵀ) and, where there is a place for them, its signs.

    Rows of `hidden` behind the last one used may be overwritten, up to a whole tile. The weights of several models,
    (L, D) each, stand one below the other.
    """
    n_hidden, n_features = hidden.shape[1], features.shape[1]
    n_tiles = rows.models * ceil_div(rows.n_rows, tile.rows) * ceil_div(n_hidden, tile.columns)
    reduce_kernel[_grid(n_tiles, tile, hidden.device)](
        TensorDescriptor.from_tensor(features, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        TensorDescriptor.from_tensor(hidden, _store_block(tile)),
        signs, rows.x_first, rows.offsets, rows.n_rows, 1, rows.models, rows.stride, rows.model_rows,
        rows.bags_a_model,
        D=n_features, L=n_hidden, BN=tile.rows, BL=tile.columns, BD=tile.depth, SEVERAL=rows.models > 1,
        SIGNS=signs is not None, WINDOW=rows.x_first is not None, PACKED=rows.offsets is not None,
        **_options(hidden, tile),
    )  # fmt: skip


def launch_gate(
    hidden: Tensor,
    weights: Weights,
    scores: Tensor,
    gate: Tensor | None,
    rows: Rows,
    tile: Tile,
    *,
    heads: Tensor | None = None,
    n_lines: int = 1,
    projections: Tensor | None = None,
    parts: Parts = ONE_MODEL,
) -> None:
    """Write the scores (K, ΣN) and, where there is a place for them, the arguments of the gate (ΣN, 2A).

    With `heads`, `n_lines` rows of L, the projections on them too, (Q, ΣN) float32, of the scores' row stride.
    """
    n_branches, n_gate = weights.score.shape
    block = [tile.columns, tile.depth]
    lines = power_of_2_at_least(n_lines)
    stage_bytes = (tile.rows + 2 * tile.columns + lines) * tile.depth * hidden.element_size()
    rest_bytes = _GATE_REST_BYTES + 4 * tile.rows * lines  # the projections on their way out
    tile = tile._replace(stages=max(1, min(tile.stages, (SHARED_BYTES - rest_bytes) // stage_bytes)))
    gate_kernel[_grid(rows.models * ceil_div(rows.n_rows, tile.rows), tile, hidden.device)](
        TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weights.v, block), weights.v_bias,
        TensorDescriptor.from_tensor(weights.u, block), weights.u_bias, weights.score, weights.score_bias,
        None if heads is None else TensorDescriptor.from_tensor(heads, [lines, tile.depth]),
        scores, gate, projections, rows.offsets, rows.n_rows, 1, rows.models, rows.stride, rows.model_rows,
        rows.bags_a_model, *parts, scores.stride(0),
        L=hidden.shape[1], A=n_gate, K=n_branches, Q=n_lines, BN=tile.rows, BL=tile.depth, BA=tile.columns,
        BK=BRANCH_BLOCK, BQ=lines, SEVERAL=rows.models > 1, SAVE_GATE=gate is not None, HEADS=heads is not None,
        PACKED=rows.offsets is not None, **_options(hidden, tile, fast=True),
    )  # fmt: skip


def gate_backward_programs(n_rows: int, tile: Tile, device: torch.device) -> int:
    """How many programs the backward of the gate has a model: each leaves a share of the gradients of biases and w."""
    return _grid(ceil_div(n_rows, tile.rows), tile, device)[0]


def launch_gate_backward(
    gate: Tensor,
    weights: Weights,
    d_gate: Tensor,
    small: Tensor,
    rows: Rows,
    tile: Tile,
    *,
    d_scores: Tensor | None = None,
    pool: PoolGradients | None = None,
    parts: Parts = ONE_MODEL,
) -> None:
    """Write the gradients of the gate's arguments (ΣN, 2A) and, program by program, of biases and w.

    With `pool` in place of `d_scores`, those of the projections behind them: `d_gate` has (ΣN, 2A + 16 or more).
    """
    n_branches, n_gate = weights.score.shape
    strided = d_scores if pool is None else pool.scores
    assert strided is not None
    n_lines = BRANCH_BLOCK if pool is None else pool.d_logits.shape[-1]
    n_programs = gate_backward_programs(rows.n_rows, tile, gate.device)
    gate_backward_kernel[(rows.models * n_programs,)](
        TensorDescriptor.from_tensor(gate, [tile.rows, tile.columns]), weights.score, d_scores,
        *((None,) * 7 if pool is None else pool), d_gate, small,
        rows.offsets, rows.n_rows, 1, rows.stride, rows.model_rows, rows.bags_a_model, parts.parameters,
        strided.stride(0), n_programs,
        A=n_gate, K=n_branches, C=n_lines // (n_branches + 1), G=d_gate.shape[1], BN=tile.rows, BA=tile.columns,
        BK=BRANCH_BLOCK, BQ=power_of_2_at_least(n_lines), POOL=pool is not None,
        PAIRS=pool is not None and pool.d_pairs is not None, PACKED=rows.offsets is not None,
        **_options(gate, tile, fast=True),
    )  # fmt: skip


def launch_reduction_backward(
    signs: Tensor,
    d_gate: Tensor,
    gate_weight: Tensor,
    d_reduced: Tensor,
    rows: Rows,
    tile: Tile,
    *,
    d_hidden: Tensor | None = None,
    parts: Parts = ONE_MODEL,
) -> None:
    """Write d(X W1ᵀ) (ΣN, L) from the signs of H and the gradients of the gate's arguments, and of H or projections.

    `gate_weight` is `[V; U]`, (2A, L), or with the heads behind it. Rows of `d_reduced` behind the last one used may be
    overwritten.
    """
    n_hidden = d_reduced.shape[1]
    if d_hidden is not None:  # which takes shared memory to bring to the threads
        tile = tile._replace(stages=min(tile.stages, 3))
    n_tiles = rows.models * ceil_div(rows.n_rows, tile.rows) * ceil_div(n_hidden, tile.columns)
    grid = _grid(n_tiles, tile, d_gate.device)
    reduction_backward_kernel[grid](
        signs,
        TensorDescriptor.from_tensor(d_gate, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(gate_weight, [tile.depth, tile.columns]),
        TensorDescriptor.from_tensor(d_reduced, _store_block(tile)),
        d_hidden, rows.offsets, rows.n_rows, 1, rows.models, rows.stride, rows.model_rows, rows.bags_a_model,
        parts.weight_rows,
        L=n_hidden, G=d_gate.shape[1], BN=tile.rows, BL=tile.columns, BD=tile.depth, SEVERAL=rows.models > 1,
        D_HIDDEN=d_hidden is not None, FLAT=n_tiles > grid[0], PACKED=rows.offsets is not None,
        **_options(d_gate, tile),
    )  # fmt: skip


def count_gradient_tiles(n_features: int, n_hidden: int, n_gate: int, tile: Tile, *, heads: bool = False) -> int:
    """Output tiles of the weight gradients."""
    columns = ceil_div(n_hidden, tile.columns)
    tiles = ceil_div(n_hidden, tile.rows) * ceil_div(n_features, tile.columns)
    return tiles + ceil_div(2 * n_gate, tile.rows) * columns + (columns if heads else 0)


def choose_shares(
    n_features: int,
    n_hidden: int,
    n_gate: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    heads: bool = False,
    bags_a_model: int = 1,
) -> Shares:
    """Shares of the rows, so that all processors work on a model's bags: by sizes alone, whatever else is launched.

    For one bag as many as there are processors for. With several, more shares fill the last wave of programs better,
    but each leaves partial sums to write and read, and those of short bags are as large as others.
    """
    processors = n_processors(device)

    def fill(n_rows: int) -> int:
        tile = choose_tiles(n_rows * bags_a_model, n_hidden, n_gate, dtype, device).weight_gradient
        tiles = count_gradient_tiles(n_features, n_hidden, n_gate, tile, heads=heads)
        at_once = tile.programs * processors

        def rows_in_turn(shares: int) -> float:
            waves = ceil_div(tiles * bags_a_model * shares, at_once)
            return waves * (n_rows / shares + _ROWS_OF_A_PARTIAL)

        return min(range(1, max(1, at_once // tiles) + 1), key=rows_in_turn)

    short, long = (fill(n_rows) for n_rows in _TYPICAL_ROWS)
    small_tiles = count_gradient_tiles(n_features, n_hidden, n_gate, _weight_gradient_tile(1, processors), heads=heads)
    least = _SHORT_ROWS if small_tiles >= processors else _LEAST_SHARE
    if bags_a_model > 1:
        least = max(least, _SHORT_ROWS // 2 * bags_a_model)
    return Shares(short, long, _long_bag(device), least)


def launch_weight_gradient(
    features: Tensor,
    hidden: Tensor,
    d_reduced: Tensor,
    d_gate: Tensor,
    n_gate: int,
    large: Tensor,
    rows: Rows,
    tile: Tile,
    shares: Shares,
    *,
    n_heads: int = 0,
) -> None:
    """Write partial sums of dW1 and [dV; dU], (splits, L·D + 2A·L) float32, with those of `n_heads` rows behind them.

    `large` has room for the most splits of a bag of `rows.n_rows`, for every model.

    `d_gate` has the gradients of the gate's arguments, (ΣN, 2A), and those of the projections on heads behind them.
    """
    n_features, n_hidden, n_columns = features.shape[1], hidden.shape[1], d_gate.shape[1]
    tiles = count_gradient_tiles(n_features, n_hidden, n_gate, tile, heads=n_heads > 0)
    n_splits = shares.most(rows.n_rows)
    lines = max(1, n_columns - 2 * n_gate)
    stage_bytes = tile.depth * (tile.columns + max(tile.rows, lines)) * hidden.element_size()
    tile = tile._replace(stages=max(1, min(tile.stages, (SHARED_BYTES - _STAGES_REST_BYTES) // stage_bytes)))
    left, right = [tile.depth, tile.rows], [tile.depth, tile.columns]
    d_projected = TensorDescriptor.from_tensor(d_gate[:, 2 * n_gate :], [tile.depth, lines]) if n_heads > 0 else None
    weight_gradient_kernel[(rows.models * tiles * n_splits,)](
        TensorDescriptor.from_tensor(d_reduced, left), TensorDescriptor.from_tensor(features, right),
        TensorDescriptor.from_tensor(d_gate, left), TensorDescriptor.from_tensor(hidden, right), d_projected,
        d_reduced, features, d_gate, hidden, large, rows.x_first, rows.offsets, rows.n_rows, 1, rows.stride,
        rows.model_rows, n_splits, *shares[:3],
        D=n_features, L=n_hidden, A=n_gate, Q=n_heads, G=n_columns, BM=tile.rows, BC=tile.columns, BN=tile.depth,
        BQ=lines, LEAST=shares.least_rows, WINDOW=rows.x_first is not None, PACKED=rows.offsets is not None,
        **_options(hidden, tile),
    )  # fmt: skip
