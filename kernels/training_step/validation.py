"""The forward pass of validation on static buffers: four launches, by the weights of a training step's models."""

import torch
from torch import Tensor

from acmil.kernels.gated_scores.launches import Rows, choose_tiles, launch_reduce
from acmil.kernels.launch import MAX_BAGS, ceil_div, chained, power_of_2_at_least
from acmil.kernels.top_k_masking.fused import BLOCK
from acmil.kernels.training_step.fused import CURSOR, LARGEST_TILE, Bag, TrainingStep
from acmil.kernels.training_step.validation_kernels import bag_logits_kernel, spread_kernel

_MOST_SLOTS, _SUMS_AT_ONCE = 160, 2048
ROWS_AT_ONCE = 2**18  # of bags that are looked at together


class ValidationPass:
    """Logits of bags, and the spread of their attention, by the models of a training step as they are.

    As in the step all that a pass depends on lies on the device. Each model takes `at_once` bags at a time.

    Attributes:
        at_once: Bags of a model that are looked at together.

    Args:
        step: Whose models and features are used.
        longest: Rows of the longest bag.
        n_bags: Most bags of a model.
        n_top: How many of the highest tiles the spread tells of.
        at_once: Bags of a model that are looked at together; None: as many as make a good launch. It changes no result.

    Raises:
        ValueError: If more bags than `MAX_BAGS` would be looked at together.
    """

    def __init__(
        self, step: TrainingStep, *, longest: int, n_bags: int, n_top: int, at_once: int | None = None
    ) -> None:
        self.step, self.longest, self.n_top = step, longest, n_top
        s, device = step.sizes, step.features.device
        rows = ceil_div(longest, LARGEST_TILE) * LARGEST_TILE
        most = min(MAX_BAGS, max(step.n_models, ROWS_AT_ONCE // rows)) // step.n_models
        self.at_once = min(most, n_bags) if at_once is None else at_once
        if not 1 <= self.at_once * step.n_models <= MAX_BAGS:
            raise ValueError(
                f"bags at once must be 1 to {MAX_BAGS} for all models, got {self.at_once} of each of {step.n_models}."
            )
        self.positions = ceil_div(n_bags, self.at_once)
        n = step.n_models * self.at_once
        needed = n * rows * s.hidden
        self.model_rows = rows
        self.hidden = (  # the step's is free while no step is taken
            step.hidden.flatten()[:needed]
            if step.hidden.numel() >= needed
            else torch.empty(needed, dtype=step.hidden.dtype, device=device)
        ).view(n * rows, s.hidden)
        self.scores = torch.empty((n * s.branches, rows), device=device)
        self.projections = torch.empty((n * s.n_logits, rows), device=device)
        self.cursor = torch.zeros((n, CURSOR), dtype=torch.int64, device=device)
        self.bags = torch.zeros((n, self.positions, len(Bag._fields)), dtype=torch.int64, device=device)
        self.current = torch.zeros((n, 2), dtype=torch.int32, device=device)  # rows of a bag, and its line
        self.arrived = torch.zeros((2, n), dtype=torch.int32, device=device)
        self.block = power_of_2_at_least(s.branches * (1 + s.classes))
        self.sums = torch.empty((n, 2 * _MOST_SLOTS + 1, self.block), device=device)
        self.maxima, self.inverses = torch.empty((2, n, s.branches), device=device)
        self.slots = ceil_div(longest, BLOCK)
        self.picks = torch.empty((n, self.slots, 2, power_of_2_at_least(n_top)), dtype=torch.int32, device=device)
        self.entropies = torch.empty((n, self.slots), device=device)
        self.all_logits = torch.empty((n, self.positions + 1, s.classes), device=device)
        self.all_spread = torch.empty((n, self.positions + 1, 2), device=device)

    def schedule(self, bags: Tensor) -> None:
        """Set the bags to come; the next launch takes the first of them.

        Args:
            bags: (M, positions, at_once, 3) int64, the fields of `Bag`; 0 rows: none.
        """
        self.bags.copy_(bags.transpose(1, 2).flatten(0, 1))  # a model's first bags stand side by side
        zero, first = torch.zeros_like(self.cursor[:, :1]), self.bags[:, 0]
        self.cursor[:, :5].copy_(torch.cat([zero, first[:, :1], zero, first[:, 1:]], dim=1))

    def results_of(self, model: int) -> tuple[Tensor, Tensor]:
        """Logits (bags, C) and spread (bags, 2): entropy of the mean attention, and mass of the `n_top` highest."""
        of = slice(model * self.at_once, (model + 1) * self.at_once)
        logits, spread = (of_all[of, : self.positions] for of_all in (self.all_logits, self.all_spread))
        return logits.transpose(0, 1).flatten(0, 1), spread.transpose(0, 1).flatten(0, 1)

    def launch(self) -> None:
        """Look at the next bags of every model."""
        step, s, n_rows, device = self.step, self.step.sizes, self.longest, self.step.features.device
        n = step.n_models * self.at_once
        rows = Rows(n_rows, self.cursor[0, 2:4], self.cursor[0, 1:2], n, CURSOR, self.model_rows, self.at_once)
        tiles = choose_tiles(n * n_rows, s.hidden, s.gate, self.hidden.dtype, device)
        launch_reduce(step.features, step.reductions.flatten(0, 1), self.hidden, None, rows, tiles.reduce)
        step.launch_gate(self.hidden, self.scores, None, self.projections, rows, tiles.gate)
        block = max(1, _SUMS_AT_ONCE // self.block)
        slots = min(_MOST_SLOTS, ceil_div(n_rows, block))
        bag_logits_kernel[(n * slots,)](
            self.scores, self.projections, self.sums, self.maxima, self.inverses, self.arrived[0], step.head_bias,
            self.cursor, self.current, self.all_logits, slots, self.at_once, step.parts.parameters, self.positions,
            self.scores.stride(0),
            K=s.branches, C=s.classes, BN=block, BS=self.block, BK=power_of_2_at_least(s.branches, least=2),
            BC=power_of_2_at_least(s.classes, least=2), MOST=_MOST_SLOTS, num_warps=4, **chained(device),
        )  # fmt: skip
        spread_kernel[(n * self.slots,)](
            self.scores, self.maxima, self.inverses, self.picks, self.entropies, self.arrived[1], self.current,
            self.all_spread, self.cursor, self.bags, self.slots, self.positions, self.scores.stride(0), self.n_top,
            K=s.branches, BN=BLOCK, BP=self.picks.shape[3], num_warps=4, **chained(device),
        )  # fmt: skip

    def capture(self) -> "torch.cuda.CUDAGraph":
        """A CUDA graph of one launch."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.cursor.zero_()  # no rows
            self.launch()  # kernels are compiled
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.launch()
        torch.cuda.current_stream().wait_stream(stream)
        return graph
