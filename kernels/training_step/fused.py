"""Whole training steps on static buffers: eight launches, no autograd, nothing read back to the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from acmil.kernels.gated_scores.launches import (
    Parts,
    PoolGradients,
    Rows,
    Tile,
    Tiles,
    Weights,
    choose_shares,
    choose_tiles,
    gate_backward_programs,
    launch_gate,
    launch_gate_backward,
    launch_reduce,
    launch_reduction_backward,
    launch_weight_gradient,
    new_signs,
)
from acmil.kernels.launch import MAX_BAGS, ceil_div, chained, n_processors, power_of_2_at_least
from acmil.kernels.top_k_masking.fused import drop_table, launch_mask, n_to_find, new_picks
from acmil.kernels.training_step.losses_kernel import losses_kernel
from acmil.kernels.training_step.parameters import GatedParameters, sizes_of, views_of
from acmil.kernels.training_step.update_kernel import update_kernel

LOSS_TERMS = ("total", "bag", "branch", "diversity")

_UPDATE_BLOCK, _SMALL_BLOCK, _ROW_PARTIALS = 512, 16, 256
_MOST_SLOTS = 512  # whose sums make up those of a bag
_SUMS_AT_ONCE = 2048
LARGEST_TILE = 128  # rows
_DEEPEST_TILE = 64
STEPS_A_GRAPH = 2  # of which the second begins while the first ends
CURSOR = 6  # position, first row, 0, length, label, step number


class Bag(NamedTuple):
    """What a step is told of its bag."""

    first_row: int  # of the features
    n_rows: int  # 0: there is no such bag at this step; a model without any is left as it is
    label: int


class TrainingStep:
    """Training steps of ACMIL with gated attention for capture in a CUDA graph.

    Everything a step depends on lives on the device: which bag is next, its rows, the learning rate, the random state
    of the masking. So the same launches, or one captured graph, do every step: `schedule` sets the bags and the
    rates, and each `launch` takes the next bag. A launch for `n_rows` rows does for every bag up to that size.

    Several models take their steps together, each with bags of its own, `batch_size` of them or fewer, whose mean is
    the loss; what a model becomes does not depend, to the bit, on what is trained beside it, nor on the size that a
    launch is for. Inside, every bag has a place with buffers of its own, those of a model side by side.

    Attributes:
        master: (M, P or more) float32, the parameters of each model one after another.
        moments: (2, M, P or more) float32, AdamW's.
        losses: (M B, positions + 1, 4) float32, those of each bag, a row a step since `schedule`: the terms of
            `LOSS_TERMS`. Where there was no bag, they are not written.

    Args:
        models: Initial parameters of each model, up to `MAX_BAGS`; copied.
        features: X of all bags one after another, (ΣN, D), in the type to compute in (float32, bfloat16, float16).
        longest: Rows of the longest bag.
        positions: Most steps between two calls of `schedule`.
        top_k: Size of the pool that masking draws from; 0 masks nothing.
        ratio: Share of the pool to mask, in [0, 1].
        weight_decay: AdamW's.
        seeds: Of the masks, a model.
        batch_size: B, most bags of a model's step; M B is at most `MAX_BAGS`.
        betas: AdamW's.
        epsilon: AdamW's.

    Raises:
        ValueError: If shapes disagree.
    """

    def __init__(
        self,
        models: Sequence[GatedParameters],
        *,
        features: Tensor,
        longest: int,
        positions: int,
        top_k: int,
        ratio: float,
        weight_decay: float,
        seeds: Sequence[int],
        batch_size: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        self.n_models = len(models)
        if not 1 <= self.n_models <= MAX_BAGS or len(seeds) != self.n_models:
            raise ValueError(
                f"models must be 1 to {MAX_BAGS}, with a seed each, got {self.n_models} and {len(seeds)} seeds."
            )
        if not 1 <= batch_size <= MAX_BAGS // self.n_models:
            raise ValueError(
                f"batch_size must be 1 to {MAX_BAGS // self.n_models} for {self.n_models} models, got {batch_size}."
            )
        self.batch_size, self.n_places = batch_size, self.n_models * batch_size
        self.sizes = sizes = sizes_of(models[0])
        if any(sizes_of(model) != sizes for model in models):
            raise ValueError(f"models must have the same sizes, got {sorted({sizes_of(model) for model in models})}.")
        if features.dim() != 2 or features.shape[1] != sizes.features:
            raise ValueError(f"features must have shape (any, {sizes.features}), got {tuple(features.shape)}.")
        device = features.device
        self.features = features.contiguous()
        self.longest, self.top_k, self.betas, self.epsilon = longest, top_k, betas, epsilon
        self.weight_decay = weight_decay
        self.master = torch.zeros((self.n_models, ceil_div(sizes.n_all, 16) * 16), device=device)  # wide loads
        for line, model in zip(self.master, models, strict=True):
            line[: sizes.n_all] = torch.cat([p.detach().to(device, torch.float32).flatten() for p in model])
        self.moments = torch.zeros((2, *self.master.shape), device=device)
        self._place_matrices(features.dtype)
        self.head_bias = self.master[:, sizes.n_all - sizes.n_logits :]
        self.positions = positions
        self.cursor = torch.zeros((self.n_places, CURSOR), dtype=torch.int64, device=device)
        self.bags = torch.zeros((self.n_places, positions, len(Bag._fields)), dtype=torch.int64, device=device)
        self.rates = torch.zeros((self.n_models, positions + 1), dtype=torch.float64, device=device)
        self.losses = torch.zeros((self.n_places, positions + 1, len(LOSS_TERMS)), device=device)
        powers = torch.tensor([1.0, 1.0, *betas], dtype=torch.float64, device=device)
        self.powers = powers.repeat(self.n_models, 1)
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.drop, self.n_find = drop_table(top_k, ratio, device), n_to_find(top_k, ratio)
        self.shares = choose_shares(
            sizes.features, sizes.hidden, sizes.gate, features.dtype, device, heads=True, bags_a_model=batch_size
        )  # fmt: skip
        self._allocate(device, features.dtype)

    def _place_matrices(self, dtype: torch.dtype) -> None:
        """Working copies of the matrices: W1 of all models one below the other, then [V; U; W; zeros] of all."""
        s, n_models, device = self.sizes, self.n_models, self.master.device
        lines = power_of_2_at_least(s.n_logits)
        read = max(2 * s.gate + lines, s.gate + power_of_2_at_least(s.gate))  # by whole blocks, from V or U on
        self.parts = Parts(ceil_div(read, _DEEPEST_TILE) * _DEEPEST_TILE, self.master.shape[1])
        n_reduction, n_rest = s.hidden * s.features, self.parts.weight_rows * s.hidden
        self.work = torch.zeros(n_models * (n_reduction + n_rest), dtype=dtype, device=device)
        self.reductions = self.work[: n_models * n_reduction].view(n_models, s.hidden, s.features)
        self.below = self.work[n_models * n_reduction :].view(n_models, self.parts.weight_rows, s.hidden)
        self.reductions.copy_(self.master[:, :n_reduction].view_as(self.reductions))
        n_below = s.n_large // s.hidden - s.features  # rows of V, U and the heads
        self.below[:, :n_below] = self.master[:, n_reduction : s.n_large].view(n_models, n_below, s.hidden)

    def parameters_of(self, model: int) -> GatedParameters:
        """Views of the float32 master parameters of a model, updated in place."""
        return views_of(self.master[model, : self.sizes.n_all], self.sizes)

    def weights_of(self, model: int) -> Weights:
        """The weights of a model as they are multiplied, in the working type; biases are added in float32."""
        parameters, gate = self.parameters_of(model), self.sizes.gate
        below = self.below[model]
        return Weights(
            self.reductions[model], below[:gate], parameters.v_bias, below[gate : 2 * gate], parameters.u_bias,
            parameters.score_weight, parameters.score_bias,
        )  # fmt: skip

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Scratch for the longest bag, a place."""
        s, m, n_rows = self.sizes, self.n_places, ceil_div(self.longest, LARGEST_TILE) * LARGEST_TILE
        self.model_rows = n_rows
        self.hidden = torch.empty((m * n_rows, s.hidden), dtype=dtype, device=device)
        self.signs = new_signs(m * n_rows, s.hidden, device)
        self.d_reduced = torch.empty_like(self.hidden)
        self.gate = torch.empty((m * n_rows, 2 * s.gate), dtype=dtype, device=device)
        columns = 2 * s.gate + power_of_2_at_least(s.n_logits)
        self.d_gate = torch.empty((m * n_rows, columns), dtype=dtype, device=device)
        self.scores = torch.empty((m * s.branches, n_rows), device=device)
        self.projections = torch.empty((m * s.n_logits, n_rows), device=device)
        self.picks = new_picks(m * s.branches, n_rows, 1, self.n_find, device)
        self.arrived = torch.zeros(m * (s.branches + 1), dtype=torch.int32, device=device)
        self.sums = torch.empty((m, _MOST_SLOTS + 1, s.branches, 1 + 2 * s.classes + s.branches), device=device)
        self.maxima = torch.empty((m, s.branches), device=device)
        self.inverses = torch.empty_like(self.maxima)
        self.d_logits = torch.empty((m, s.n_logits), device=device)
        self.d_pairs = torch.empty((m, s.branches, s.branches), device=device)
        self.correction = torch.empty((m, s.branches), device=device)
        self.update = torch.empty((self.n_models, 3), device=device)
        self.used = torch.zeros(m, dtype=torch.int32, device=device)
        self.small = torch.empty((m, 2 * n_processors(device), s.n_small), device=device)
        self.large = torch.empty((m, self.shares.most(self.longest), s.n_large), device=device)

    def schedule(self, bags: Tensor, rates: Tensor) -> None:
        """Set which bags come next, and with which learning rates; the next step takes the first of them.

        Behind the last a step takes that one again.

        Args:
            bags: (M, steps, B, 3) int64, the fields of `Bag`. The first bag of a step has rows if any of them has.
            rates: (M, steps) float64.

        Raises:
            ValueError: If there are none, or more than there is room for.
        """
        steps = bags.shape[1]
        expected = (self.n_models, steps, self.batch_size, len(Bag._fields))
        if not 1 <= steps <= self.positions or bags.shape != expected or rates.shape != expected[:2]:
            raise ValueError(
                f"bags and rates must be of {self.n_models} models, 1 to {self.positions} steps and {self.batch_size} "
                f"bags a step, got {tuple(bags.shape)} and {tuple(rates.shape)}."
            )
        bags = bags.transpose(1, 2).flatten(0, 1)
        self.bags[:, :steps].copy_(bags)
        self.bags[:, steps:].copy_(bags[:, -1:].expand(-1, self.positions - steps, -1))
        self.rates[:, :steps].copy_(rates)
        zero = torch.zeros_like(self.cursor[:, :1])
        first = self.bags[:, 0]
        self.cursor[:, :5].copy_(torch.cat([zero, first[:, :1], zero, first[:, 1:]], dim=1))

    def launch(self, n_rows: int | None = None, tiles: Tiles | None = None) -> None:
        """Do the next step.

        Args:
            n_rows: The bags have at most so many rows; None: they may be the longest.
            tiles: Block sizes to use in place of those chosen for `n_rows`.
        """
        n_rows = self.longest if n_rows is None else n_rows
        s, m = self.sizes, self.n_places
        rows = Rows(n_rows, self.cursor[0, 2:4], self.cursor[0, 1:2], m, CURSOR, self.model_rows, self.batch_size)
        device = self.features.device
        if tiles is None:
            tiles = choose_tiles(m * n_rows, s.hidden, s.gate, self.features.dtype, device)
        row_programs = gate_backward_programs(n_rows, tiles.gate_backward, device)
        if row_programs > self.small.shape[1]:
            raise ValueError(f"tiles.gate_backward must have at most 2 programs, got {tiles.gate_backward.programs}.")
        scores, projections = self.scores[:, :n_rows], self.projections[:, :n_rows]
        launch_reduce(self.features, self.reductions.flatten(0, 1), self.hidden, self.signs, rows, tiles.reduce)
        self.launch_gate(self.hidden, scores, self.gate, projections, rows, tiles.gate)
        launch_mask(
            scores, None, self.picks, self.arrived[m:], self.drop, self.seeds, self.cursor[0, 5:6], self.top_k,
            rows.offsets, n_find=self.n_find, maxima=self.maxima, models=m, stride=CURSOR,
            bags_a_model=self.batch_size,
        )  # fmt: skip
        self._launch_losses(n_rows)
        pool = PoolGradients(
            scores, self.maxima, self.inverses, projections, self.d_logits, self.d_pairs if s.branches > 1 else None,
            self.correction,
        )  # fmt: skip
        launch_gate_backward(
            self.gate, self.weights_of(0), self.d_gate, self.small, rows, tiles.gate_backward, pool=pool,
            parts=self.parts,
        )  # fmt: skip
        launch_reduction_backward(
            self.signs, self.d_gate, self._below(0), self.d_reduced, rows, tiles.reduction_backward, parts=self.parts
        )
        launch_weight_gradient(
            self.features, self.hidden, self.d_reduced, self.d_gate, s.gate, self.large, rows, tiles.weight_gradient,
            self.shares, n_heads=s.n_logits,
        )  # fmt: skip
        self._launch_update(n_rows, row_programs, tiles.gate_backward.rows)

    def launch_gate(
        self, hidden: Tensor, scores: Tensor, gate: Tensor | None, projections: Tensor, rows: Rows, tile: Tile
    ) -> None:
        """Write scores, arguments of the gate and projections, by the models' weights."""
        launch_gate(
            hidden, self.weights_of(0)._replace(v=self._below(0), u=self._below(self.sizes.gate)), scores, gate, rows,
            tile, heads=self._below(2 * self.sizes.gate), n_lines=self.sizes.n_logits, projections=projections,
            parts=self.parts,
        )  # fmt: skip

    def _below(self, row: int) -> Tensor:
        """[V; U; W] of all models one below the other, from a row of the first model's on."""
        return self.below.flatten(0, 1)[row:]

    def capture(self, sizes: Sequence[int], steps: int = 1) -> "list[torch.cuda.CUDAGraph]":
        """A CUDA graph of some steps for each size of bag; the state is left as it was.

        Args:
            sizes: Most rows of each graph's bags.
            steps: So many in each graph, where a step's first programs are put in place while the one before it ends.

        Returns:
            One graph a size; replaying it does the next `steps` steps.
        """
        kept = (self.master, self.moments, self.work, self.cursor, self.powers, self.losses)
        state = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graphs = []
        with torch.cuda.stream(stream):
            for n_rows in sorted(sizes, reverse=True):  # warm: kernels are compiled
                self.launch(n_rows)
            for n_rows in sizes:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    for _ in range(steps):
                        self.launch(n_rows)
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(kept, state, strict=True):
            tensor.copy_(before)
        return graphs

    def _launch_losses(self, n_rows: int) -> None:
        s, sums = self.sizes, power_of_2_at_least(self.sums[0, 0].numel())
        block = max(1, _SUMS_AT_ONCE // sums)
        n_slots = min(_MOST_SLOTS, ceil_div(n_rows, block))
        losses_kernel[(self.n_places * n_slots,)](
            self.scores, self.projections, self.maxima, self.inverses, self.sums, self.arrived, self.head_bias,
            self.d_logits, self.d_pairs, self.correction, self.cursor, self.losses, self.rates, self.powers,
            self.update, self.used, n_slots, self.parts.parameters, self.positions + 1, self.scores.stride(0),
            self.weight_decay,
            BAGS=self.batch_size, K=s.branches, C=s.classes, BN=block, BK=power_of_2_at_least(s.branches, least=2),
            BX=power_of_2_at_least(self.sums.shape[3]), BS=sums, AT_ONCE=4 * block, MOST=_MOST_SLOTS, num_warps=4,
            **chained(self.features.device),
        )  # fmt: skip

    def _launch_update(self, n_rows: int, row_programs: int, row_block: int) -> None:
        s, n_splits = self.sizes, self.shares.most(n_rows)
        n_reduction = s.hidden * s.features
        block = _UPDATE_BLOCK if n_reduction % _UPDATE_BLOCK == 0 else _UPDATE_BLOCK // 2  # which never reaches across
        programs = ceil_div(s.n_small, _SMALL_BLOCK) + ceil_div(s.n_large, block) + 1
        idle = s.classes * s.hidden if s.branches == 1 else 0
        update_kernel[(self.n_models * programs,)](
            self.large, self.small, self.d_logits, self.master, *self.moments, self.work, self.update, self.used,
            self.cursor, self.bags, programs, self.positions, self.parts.parameters, n_reduction, s.n_large, s.n_small,
            s.n_logits, self.n_models * n_reduction, self.parts.weight_rows * s.hidden,
            s.hidden * (s.features + 2 * s.gate), idle, n_splits, *self.shares[:3], row_programs, row_block,
            1.0 - self.betas[0], 1.0 - self.betas[1], self.epsilon,
            BAGS=self.batch_size, BC=block, BS=_SMALL_BLOCK, BB=power_of_2_at_least(s.n_logits),
            BP=power_of_2_at_least(n_splits, least=1), BLOCKS=_ROW_PARTIALS, LEAST=self.shares.least_rows, num_warps=4,
            **chained(self.features.device),
        )  # fmt: skip
