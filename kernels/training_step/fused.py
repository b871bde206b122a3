"""A whole training step on static buffers: eight launches, no autograd, nothing read back to the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from acmil.kernels.gated_scores.launches import (
    LEAST_SPLIT_ROWS,
    PoolGradients,
    Rows,
    Tiles,
    Weights,
    choose_tiles,
    gate_backward_programs,
    launch_gate,
    launch_gate_backward,
    launch_reduce,
    launch_reduction_backward,
    launch_weight_gradient,
    weight_gradient_splits,
)
from acmil.kernels.launch import (
    ceil_div,
    chained,
    n_processors,
    power_of_2_at_least,
)
from acmil.kernels.top_k_masking.fused import drop_table, launch_mask, n_to_find, new_picks
from acmil.kernels.training_step.losses_kernel import losses_kernel
from acmil.kernels.training_step.parameters import GatedParameters, sizes_of, views_of
from acmil.kernels.training_step.update_kernel import update_kernel

LOSS_TERMS = ("total", "bag", "branch", "diversity")

_UPDATE_BLOCK, _SMALL_BLOCK, _ROW_PARTIALS = 512, 16, 256
_MOST_SLOTS = 160  # whose sums make up those of a bag
_LARGEST_TILE = 128  # rows
_SHORT_BAG = 4096  # rows


class TrainingStep:
    """Training steps of ACMIL with gated attention, one bag a step, for capture in a CUDA graph.

    Everything a step depends on lives on the device: which bag is next, its rows, the learning rate, the random state
    of the masking. So the same launches, or one captured graph, do every step: `schedule` sets the order and the
    rates, and each `launch` takes the next bag. A launch for `n_rows` rows does for every bag up to that size.

    Attributes:
        parameters: Views of the float32 master parameters, updated in place.
        losses: (positions + 1, 4) float32, a row a step since `schedule`: the terms of `LOSS_TERMS`.

    Args:
        parameters: Initial parameters; copied.
        features: X of all bags one after another, (ΣN, D), in the type to compute in (float32, bfloat16, float16).
        bag_offsets: (S+1,) int64: bag s is the rows `bag_offsets[s]` to `bag_offsets[s + 1]`.
        labels: (S,) int64.
        longest: Rows of the longest bag.
        top_k: Size of the pool that masking draws from; 0 masks nothing.
        ratio: Share of the pool to mask, in [0, 1].
        weight_decay: AdamW's.
        seed: Of the masks.
        betas: AdamW's.
        epsilon: AdamW's.
        positions: Most steps between two calls of `schedule`; None: one a bag.

    Raises:
        ValueError: If shapes disagree.
    """

    def __init__(
        self,
        parameters: GatedParameters,
        *,
        features: Tensor,
        bag_offsets: Tensor,
        labels: Tensor,
        longest: int,
        top_k: int,
        ratio: float,
        weight_decay: float,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        positions: int | None = None,
    ) -> None:
        self.sizes = sizes = sizes_of(parameters)
        if features.dim() != 2 or features.shape[1] != sizes.features:
            raise ValueError(f"features must have shape (any, {sizes.features}), got {tuple(features.shape)}.")
        device = features.device
        self.features, self.bag_offsets, self.labels = features.contiguous(), bag_offsets, labels
        self.longest, self.top_k, self.betas, self.epsilon = longest, top_k, betas, epsilon
        self.weight_decay = weight_decay
        self.master = torch.cat([p.detach().to(device, torch.float32).flatten() for p in parameters])
        self.moments = torch.zeros((2, self.master.numel()), device=device)
        half = features.dtype != torch.float32
        self.work = self.master.to(features.dtype) if half else self.master
        self.parameters = views_of(self.master, sizes)
        working = views_of(self.work, sizes)
        # What is multiplied is in the working type; biases are added in float32.
        self.weights = Weights(
            working.reduction_weight, working.v_weight, self.parameters.v_bias, working.u_weight,
            self.parameters.u_bias, working.score_weight, self.parameters.score_bias,
        )  # fmt: skip
        below_reduction = self.work[sizes.hidden * sizes.features : sizes.n_large].view(-1, sizes.hidden)
        self.gate_and_heads, self.heads = below_reduction, below_reduction[2 * sizes.gate :]  # [V; U; W], W
        self.head_bias = self.master[-sizes.n_logits :]
        positions = labels.numel() if positions is None else positions
        self.cursor = torch.zeros(6, dtype=torch.int64, device=device)
        self.order = torch.zeros(positions, dtype=torch.int64, device=device)
        self.rates = torch.zeros(positions + 1, dtype=torch.float64, device=device)
        self.losses = torch.zeros((positions + 1, len(LOSS_TERMS)), device=device)
        self.powers = torch.tensor([1.0, 1.0, *betas], dtype=torch.float64, device=device)
        self.seed = torch.tensor([seed], dtype=torch.int64, device=device)
        self.drop, self.n_find = drop_table(top_k, ratio, device), n_to_find(top_k, ratio)
        self._allocate(device, features.dtype)

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Scratch for the longest bag."""
        s, n_rows = self.sizes, ceil_div(self.longest, _LARGEST_TILE) * _LARGEST_TILE
        self.hidden = torch.empty((n_rows, s.hidden), dtype=dtype, device=device)
        self.d_reduced = torch.empty_like(self.hidden)
        self.gate = torch.empty((n_rows, 2 * s.gate), dtype=dtype, device=device)
        columns = 2 * s.gate + power_of_2_at_least(s.n_logits)
        self.d_gate = torch.empty((n_rows, columns), dtype=dtype, device=device)
        self.scores = torch.empty((s.branches, n_rows), device=device)
        self.projections = torch.empty((s.n_logits, n_rows), device=device)
        self.picks = new_picks(s.branches, n_rows, 1, self.n_find, device)
        self.arrived = torch.zeros(s.branches + 1, dtype=torch.int32, device=device)
        self.sums = torch.empty((_MOST_SLOTS + 1, s.branches, 1 + 2 * s.classes + s.branches), device=device)
        self.stats = torch.empty((2, s.branches), device=device)
        self.d_logits = torch.empty(s.n_logits, device=device)
        self.d_pairs = torch.empty((s.branches, s.branches), device=device)
        self.correction = torch.empty(s.branches, device=device)
        self.update = torch.empty(3, device=device)
        self.used = torch.zeros(1, dtype=torch.int32, device=device)
        self.small = torch.empty((2 * n_processors(device), s.n_small), device=device)
        self.large = torch.empty(0, device=device)

    def schedule(self, order: Tensor, rates: Tensor) -> None:
        """Set which bags come next, and with which learning rates; the next step takes the first of them.

        Args:
            order: (steps,) int64, places of bags.
            rates: (steps,) float64.

        Raises:
            ValueError: If there are none, or more than there is room for.
        """
        steps = order.numel()
        if not 1 <= steps <= self.order.numel() or rates.numel() != steps:
            raise ValueError(
                f"order and rates must be as long, 1 to {self.order.numel()} steps, got {steps} and {rates.numel()}."
            )
        self.order[:steps].copy_(order)
        self.order[steps:].copy_(self.order[steps - 1 : steps].expand(self.order.numel() - steps))
        self.rates[:steps].copy_(rates)
        first = self.order[:1]  # taken as tensors: an index that is read would wait for the device
        start, end = self.bag_offsets.take(first), self.bag_offsets.take(first + 1)
        zero = torch.zeros_like(start)
        self.cursor[:5].copy_(torch.cat([zero, start, zero, end - start, self.labels.take(first)]))

    def launch(self, n_rows: int | None = None, tiles: Tiles | None = None) -> None:
        """Do the next step.

        Args:
            n_rows: The bag has at most so many rows; None: it may be the longest.
            tiles: Block sizes to use in place of those chosen for `n_rows`.
        """
        n_rows = self.longest if n_rows is None else n_rows
        s, rows = self.sizes, Rows(n_rows, offsets=self.cursor[2:4], x_first=self.cursor[1:2])
        if tiles is None:
            tiles = choose_tiles(n_rows, s.hidden, s.gate, self.features.dtype, self.features.device)
        device = self.features.device
        row_programs = gate_backward_programs(n_rows, tiles.gate_backward, device)
        if row_programs > self.small.shape[0]:
            raise ValueError(f"tiles.gate_backward must have at most 2 programs, got {tiles.gate_backward.programs}.")
        scores, projections = self.scores[:, :n_rows], self.projections[:, :n_rows]
        launch_reduce(self.features, self.weights.reduction, self.hidden, rows, tiles.reduce)
        launch_gate(
            self.hidden, self.weights, scores, self.gate, rows, tiles.gate, heads=self.heads, projections=projections
        )
        launch_mask(
            scores, None, self.picks, self.arrived[1:], self.drop, self.seed, self.cursor[5:6], self.top_k,
            rows.offsets, n_find=self.n_find, maxima=self.stats[0],
        )  # fmt: skip
        self._launch_losses(n_rows)
        pool = PoolGradients(
            scores, self.stats, projections, self.d_logits, self.d_pairs if s.branches > 1 else None, self.correction
        )
        launch_gate_backward(self.gate, self.weights, self.d_gate, self.small, rows, tiles.gate_backward, pool=pool)
        launch_reduction_backward(
            self.hidden, self.d_gate, self.gate_and_heads, self.d_reduced, rows, tiles.reduction_backward
        )
        _, splits = weight_gradient_splits(
            n_rows, s.features, s.hidden, s.gate, tiles.weight_gradient, device, heads=True
        )
        large = self._partial_gradients(splits)
        launch_weight_gradient(
            self.features, self.hidden, self.d_reduced, self.d_gate, s.gate, large, rows, tiles.weight_gradient,
            n_heads=s.n_logits,
        )  # fmt: skip
        self._launch_update(large, row_programs, tiles.gate_backward.rows)

    def capture(self, sizes: Sequence[int]) -> "list[torch.cuda.CUDAGraph]":
        """A CUDA graph of one step for each size of bag; the state is left as it was.

        Args:
            sizes: Most rows of each graph's bags.

        Returns:
            One graph a size; replaying it does the next step.
        """
        state = [t.clone() for t in (self.master, self.moments, self.work, self.cursor, self.powers, self.losses)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graphs = []
        with torch.cuda.stream(stream):
            for n_rows in sorted(sizes, reverse=True):  # warm: kernels are compiled, buffers are there
                self.launch(n_rows)
            for n_rows in sizes:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self.launch(n_rows)
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(
            (self.master, self.moments, self.work, self.cursor, self.powers, self.losses), state, strict=True
        ):
            tensor.copy_(before)
        return graphs

    def _partial_gradients(self, splits: int) -> Tensor:
        """Room for the partial sums of the large gradients, (splits, n); it never shrinks, so graphs may hold it."""
        size = self.sizes.n_large
        if self.large.numel() < splits * size:
            self.large = torch.empty(splits * size, device=self.master.device)
        return self.large[: splits * size].view(splits, size)

    def _launch_losses(self, n_rows: int) -> None:
        s, sums = self.sizes, power_of_2_at_least(self.sums[0].numel())
        warps = 4 if n_rows <= _SHORT_BAG else 8
        block = max(1, 512 * warps // sums)  # 16 numbers a thread
        n_slots = min(_MOST_SLOTS, ceil_div(n_rows, block))
        losses_kernel[(n_slots,)](
            self.scores, self.projections, self.stats, self.sums, self.arrived, self.head_bias, self.d_logits,
            self.d_pairs, self.correction, self.cursor, self.losses, self.rates, self.powers, self.update, self.used,
            n_slots, self.scores.stride(0), self.weight_decay,
            K=s.branches, C=s.classes, BN=block, BK=power_of_2_at_least(s.branches, least=2),
            BX=power_of_2_at_least(self.sums.shape[2]), BS=sums, MOST=_MOST_SLOTS, num_warps=warps,
            **chained(self.features.device),
        )  # fmt: skip

    def _launch_update(self, large: Tensor, row_programs: int, row_block: int) -> None:
        s = self.sizes
        programs = ceil_div(s.n_small, _SMALL_BLOCK) + ceil_div(s.n_large, _UPDATE_BLOCK) + 1
        half = self.work is not self.master
        idle = s.classes * s.hidden if s.branches == 1 else 0
        update_kernel[(programs,)](
            large, self.small, self.d_logits, self.master, *self.moments, self.work if half else None, self.update,
            self.used, self.cursor, self.order, self.bag_offsets, self.labels, self.order.numel(),
            s.n_large, s.n_small, s.n_logits, s.hidden * (s.features + 2 * s.gate), idle,
            large.shape[0], row_programs, row_block, 1.0 - self.betas[0], 1.0 - self.betas[1], self.epsilon,
            BC=_UPDATE_BLOCK, BS=_SMALL_BLOCK, BB=power_of_2_at_least(s.n_logits),
            BP=power_of_2_at_least(large.shape[0], least=1), BLOCKS=_ROW_PARTIALS, LEAST=LEAST_SPLIT_ROWS, WORK=half,
            num_warps=4, **chained(self.features.device),
        )  # fmt: skip
