"""Training that stays on the GPU: features are packed once, steps are captured graphs, many runs share them.

Same recipe as `acmil.training.fit`, order of bags included. Runs of one kind of model form groups, whose steps are
taken together: one graph is two steps of each. Nothing within an epoch waits for the host: the next epoch is queued
before the figures of the last are read. The masks come from the kernels' own generator, and validation computes in the
precision of training.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from acmil.kernels.gated_scores.launches import choose_shares
from acmil.kernels.launch import MAX_BAGS, power_of_2_at_least
from acmil.kernels.training_step import GatedParameters
from acmil.kernels.training_step.fused import STEPS_A_GRAPH, TrainingStep
from acmil.kernels.training_step.parameters import sizes_of, views_of
from acmil.kernels.training_step.validation import ROWS_AT_ONCE, ValidationPass
from acmil.precision import Precision
from acmil.resident_features import Lane, Place, Sets, Store, free_bytes, ring_slots
from acmil.selection import EpochRecord, Selection
from acmil.training import (
    N_TOP,
    FitResult,
    Score,
    another_seed,
    assess,
    check_same_run,
    learning_rate_at,
    mean_losses,
    run_settings,
    to_cpu,
)

if TYPE_CHECKING:
    from acmil.engine import TrainingJob

_NAMES = (  # in a state dict, in the order of `GatedParameters`
    "reduction.weight", "gate_v.weight", "gate_u.weight", "branch_head.weight", "bag_head.weight", "gate_v.bias",
    "gate_u.bias", "score.weight", "score.bias", "branch_head.bias", "bag_head.bias",
)  # fmt: skip
_SHARE_OF_MEMORY = 0.9  # of what is free
_GROUP = 13  # runs whose steps are taken together; 25 are two groups
_GROWTH = 1.25  # a graph is for the larger of its bags, and others that differ by at most this factor
_LEAST_ROWS = 128


def fit_resident(
    jobs: "Sequence[TrainingJob]",
    *,
    device: torch.device,
    score: Score,
    precision: Precision,
    feature_bytes: int | None = None,
    group: int = _GROUP,
    on_result: Callable[[int, FitResult | Exception], None] | None = None,
) -> list[FitResult | Exception]:
    """Train runs together, their features on the GPU once; a run that fails leaves its exception.

    A run's result does not depend, to the bit, on what trains beside it, nor on whether its features are streamed.
    Bags of one `slide_id` must be the same in all jobs.

    Args:
        jobs: Runs of `acmil_ga`, of up to 32 bags a step.
        device: A GPU; elsewhere the kernels need Triton's interpreter.
        score: As `fit` takes it.
        precision: Of the products over instances, in training and validation; features are held in its type.
        feature_bytes: Room for features on the GPU; None: what is free, but for what the steps need. Bags beyond it
            stay in page-locked memory and are copied while the steps before theirs run.
        group: Most runs whose steps are taken together, up to 32; fewer where 32 bags would not do for a step of them
            all. Each group has a stream of its own.
        on_result: Called with the place of a run and its result, when it has ended.

    Raises:
        ValueError: If feature sizes differ between jobs, or `group` is not 1 to 32.
    """
    if not 1 <= group <= MAX_BAGS:
        raise ValueError(f"group must be 1 to {MAX_BAGS}, got {group}.")
    results: dict[int, FitResult | Exception] = {}

    def finish(number: int, result: FitResult | Exception) -> None:
        results[number] = result
        if on_result is not None:
            on_result(number, result)

    sets: dict[int, Sets] = {}
    for number, job in enumerate(jobs):
        try:
            if not 1 <= job.batch_size <= MAX_BAGS:
                raise ValueError(f"batch_size must be 1 to {MAX_BAGS}, got {job.batch_size}.")
            sets[number] = Sets.of(job)
        except Exception as error:  # noqa: BLE001  of this run alone
            finish(number, error)
    sizes = {slide.n_features for one in sets.values() for slide in one.all}
    if len(sizes) > 1:
        raise ValueError(f"all runs must have one feature size, got {', '.join(map(str, sorted(sizes)))}.")
    plan = _Plan(jobs, sets, device, score, precision, feature_bytes, group, finish)
    for numbers in plan.in_parts(list(sets)):
        try:
            plan.train(numbers)
        except Exception as error:  # noqa: BLE001  of these runs: what follows may do with less
            for number in numbers:
                if number not in results:
                    finish(number, error)
    return [results[number] for number in range(len(jobs))]


class _Plan(NamedTuple):
    """Which runs train together, and the room that they need."""

    jobs: "Sequence[TrainingJob]"
    sets: "Mapping[int, Sets]"  # of the jobs whose bags may be used
    device: torch.device
    score: Score
    precision: Precision
    feature_bytes: int | None
    most: int  # runs of a group
    finish: Callable[[int, FitResult | Exception], None]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def in_parts(self, numbers: list[int]) -> list[list[int]]:
        """Runs in as few parts as fit into the memory, one after another: halved until each does."""
        if len(numbers) <= 1 or self._fits(numbers):
            return [numbers] if numbers else []
        half = len(numbers) // 2
        return self.in_parts(numbers[:half]) + self.in_parts(numbers[half:])

    def _fits(self, numbers: list[int]) -> bool:
        """Whether there is room for the features of all bags, or at least for the ring to stream them through."""
        return self._least_bytes(numbers) <= self._room(numbers)

    def _least_bytes(self, numbers: list[int]) -> int:
        slides = {slide.name: slide for number in numbers for slide in self.sets[number].all}
        row_bytes = next(iter(slides.values())).n_features * self.dtype.itemsize
        lengths = [slide.n_rows for slide in slides.values()]
        return min(sum(lengths), self._ring(numbers) * max(lengths)) * row_bytes

    def _ring(self, numbers: list[int]) -> int:
        """Bags of some runs that may be on their way, or in use, when features are streamed."""
        return sum(ring_slots(self.jobs[number].batch_size) for number in numbers)

    def _room(self, numbers: list[int]) -> int:
        """Bytes for features."""
        if self.feature_bytes is not None:
            return self.feature_bytes
        scratch = sum(
            _scratch_bytes([(self.jobs[number], self.sets[number]) for number in members], self.dtype, self.device)
            for members in self._groups(numbers)
        )
        return int(free_bytes(self.device) * _SHARE_OF_MEMORY) - scratch

    def _groups(self, numbers: list[int]) -> list[list[int]]:
        """Runs whose steps can be taken together: as few groups as may be, of about one size."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number in numbers:
            alike.setdefault(_kind(self.jobs[number]), []).append(number)
        groups = []
        for members in alike.values():
            n_groups = math.ceil(len(members) / min(self.most, MAX_BAGS // self.jobs[members[0]].batch_size))
            groups += [members[first::n_groups] for first in range(n_groups)]
        return groups

    def train(self, numbers: list[int]) -> None:
        """Train some runs together.

        Raises:
            ValueError: If not even a single run has the room that it needs.
        """
        if not self._fits(numbers):
            raise ValueError(
                f"there must be room on the device for {self._least_bytes(numbers) / 1e9:.1f} GB of features, those of "
                f"a step's bags and the next one's, got {max(0, self._room(numbers)) / 1e9:.1f} GB beside what the "
                "steps need. Lower batch_size, or give engine eager."
            )
        slides = [slide for number in numbers for slide in self.sets[number].all]
        store = Store(slides, self.dtype, self.device, self._room(numbers), self._ring(numbers))
        try:
            groups, first_row = [], store.ring_start
            for members in self._groups(numbers):
                runs = self._begin(members, store)
                slots = self._ring(members)
                try:
                    if runs:
                        groups.append(_Group(runs, store, Lane(store, first_row, slots)))
                except Exception as error:  # noqa: BLE001  of this group alone
                    for number in runs:
                        self.finish(number, error)
                first_row += slots * store.slot_rows
            _train(groups, self.finish)
        finally:
            store.close()

    def _begin(self, members: list[int], store: "Store") -> "dict[int, _Run]":
        """The runs of a group, but for those that cannot begin."""
        runs: dict[int, _Run] = {}
        for number in members:
            try:
                runs[number] = _Run(self.jobs[number], self.sets[number], store, self.score, self.precision)
            except Exception as error:  # noqa: BLE001  of this run alone
                self.finish(number, error)
        return runs


def _kind(job: "TrainingJob") -> tuple[Any, ...]:
    """What runs must have in common for their steps to be taken together."""
    options = job.model.options
    names = ("in_features", "hidden_features", "attention_features", "n_branches", "n_classes")
    of_model = (options[name] for name in names)
    return (*of_model, options["mask_top_k"], options["mask_ratio"], job.weight_decay, job.batch_size)


def _train(groups: "list[_Group]", finish: Callable[[int, FitResult | Exception], None]) -> None:
    """Go through the epochs of all runs: each is queued for the GPU before the one before it is looked at."""
    going = {number: run for group in groups for number, run in group.runs.items()}
    while going:
        ended: dict[int, FitResult | Exception] = {}
        for group in groups:
            try:
                group.enqueue()
            except Exception as error:  # noqa: BLE001  of this group alone
                ended |= {number: error for number, run in group.runs.items() if not run.stopped}
        for number, run in going.items():
            try:
                if number not in ended:
                    run.collect()
                    if run.done:
                        ended[number] = run.result()
            except Exception as error:  # noqa: BLE001  of this run alone
                ended[number] = error
        for number, result in ended.items():
            going.pop(number).stopped = True
            finish(number, result)


class _Snapshot(NamedTuple):
    """What an epoch left, copied in the order of the stream."""

    epoch: int
    steps: list[list[int]]  # numbers of the bags of each
    order_state: Tensor
    rate: float
    losses: Tensor  # (B, S, 4), on the host, as are the next two
    logits: Tensor  # (S_val, C)
    spread: Tensor  # (S_val, 2)
    master: Tensor
    optimizer: dict[str, Tensor]
    ready: "torch.cuda.Event | None"


class _Epoch(NamedTuple):
    """What a run goes through in an epoch."""

    number: int
    steps: list[list[int]]  # numbers of the bags of each
    rates: list[float]


class _Run:
    """One run: its bags, its history, and its place in the steps of a group."""

    def __init__(self, job: "TrainingJob", sets: Sets, store: Store, score: Score, precision: Precision) -> None:
        self.job, self.score = job, score
        n_features = job.model.options["in_features"]
        if n_features != store.features.shape[1]:
            raise ValueError(f"features must have in_features {n_features} columns, got {store.features.shape[1]}.")
        self.train, self.train_labels = store.places_of(sets.train), [slide.label for slide in sets.train]
        self.val, self.val_names = store.places_of(sets.val), [slide.name for slide in sets.val]
        self.val_labels = torch.tensor([slide.label for slide in sets.val])
        self.settings = run_settings(job, device=store.device, precision=precision, engine="resident")
        self.order_generator = torch.Generator().manual_seed(job.seed)
        self.selection, self.queued, self.stopped = Selection(), 0, False
        self.pending: deque[_Snapshot] = deque()
        if job.state is not None:
            check_same_run(job.state.get("run", {}), self.settings)
            job.model.load_state_dict(job.state["model"])
            self.order_generator.set_state(job.state["order_generator"])
            self.selection = Selection.from_state(job.state)
            self.queued = len(self.selection.history)
        job.model.to(store.device)
        weights = job.model.state_dict()
        self.parameters = GatedParameters(*(weights[name] for name in _NAMES))
        sizes = sizes_of(self.parameters)
        if job.state is not None:
            expected = {"moments": (2, sizes.n_all), "powers": (4,), "masks_drawn": (job.batch_size,)}
            found = {name: tuple(tensor.shape) for name, tensor in job.state["optimizer"].items()}
            if found != expected:
                raise ValueError(f"the optimizer's state must have shapes {expected}, got {found}.")
        self.finished = store.ready_since

    def join(self, step: TrainingStep, validation: ValidationPass, place: int, lane: Lane) -> None:
        """Take a place in the steps of a group."""
        self.step, self.validation, self.place, self.lane = step, validation, place, lane
        self.bags = slice(place * step.batch_size, (place + 1) * step.batch_size)  # their places in the step
        if self.job.state is not None:
            for name, tensor in self._optimizer_state().items():
                tensor.copy_(self.job.state["optimizer"][name])

    @property
    def done(self) -> bool:
        """Whether every epoch has been looked at."""
        return len(self.selection.history) >= self.job.epochs

    @property
    def has_next(self) -> bool:
        """Whether there is an epoch to queue."""
        return not self.stopped and self.queued < self.job.epochs

    def next_epoch(self) -> _Epoch:
        """Draw the order of the next epoch."""
        number, self.queued = self.queued, self.queued + 1
        order, size = torch.randperm(len(self.train), generator=self.order_generator).tolist(), self.job.batch_size
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        return _Epoch(number, steps, [self._rate(number + step / len(steps)) for step in range(len(steps))])

    def end_epoch(self, epoch: _Epoch) -> None:
        """Queue copies of what the epoch leaves."""
        self.pending.append(self._snapshot(epoch))

    def collect(self) -> None:
        """Look at the epoch before the one queued last, or at the last when no more will come."""
        if self.pending and (len(self.pending) > 1 or self.queued >= self.job.epochs):
            self._take_in(self.pending.popleft())

    def _take_in(self, snapshot: _Snapshot) -> None:
        """Record an epoch, select, and hand out the state to resume from."""
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        names = ["', '".join(self.train[index].name for index in step) for step in snapshot.steps]
        terms = mean_losses(_mean_over_bags(snapshot.losses, snapshot.steps), names, snapshot.epoch)
        validation = assess(snapshot.logits, snapshot.spread, self.val_labels, self.val_names, self.score)
        now = time.perf_counter()
        record = EpochRecord(
            epoch=snapshot.epoch,
            learning_rate=snapshot.rate,
            train_loss=terms["total"],
            train_loss_bag=terms["bag"],
            train_loss_branch=terms["branch"],
            train_loss_diversity=terms["diversity"],
            val_loss=validation.loss,
            attention_entropy=validation.attention_entropy,
            attention_top10_mass=validation.attention_top10_mass,
            seconds=now - self.finished,
            val=validation.metrics,
        )
        self.finished = now
        weights = self._weights_of(snapshot.master)
        self.selection.add(record, lambda: to_cpu(weights))
        if self.job.checkpoint is not None:
            self.job.checkpoint(
                {
                    "run": self.settings,
                    "model": to_cpu(weights),
                    "optimizer": to_cpu(snapshot.optimizer),
                    "order_generator": snapshot.order_state,
                    **self.selection.as_state(),
                }
            )
        if self.job.on_epoch is not None:
            self.job.on_epoch(record)

    def result(self) -> FitResult:
        """What training leaves; the model gets the last weights."""
        if self.lane.on_gpu:
            self.lane.stream.synchronize()
        last = to_cpu(self._weights_of(self._master()))
        self.job.model.load_state_dict(last)
        self.job.model.eval()
        return FitResult(self.selection.best_weights, last, self.selection.best_epoch, self.selection.history)

    def _rate(self, epoch: float) -> float:
        job = self.job
        return learning_rate_at(
            epoch,
            epochs=job.epochs,
            learning_rate=job.learning_rate,
            min_learning_rate=job.min_learning_rate,
            warmup_epochs=job.warmup_epochs,
        )

    def _snapshot(self, epoch: _Epoch) -> _Snapshot:
        """Copies, queued behind the epoch; the host may read its own once `ready` has come."""
        results = (of_all[: len(self.val)] for of_all in self.validation.results_of(self.place))
        losses, logits, spread = map(_to_host, (self.step.losses[self.bags, : len(epoch.steps)], *results))
        optimizer = {} if self.job.checkpoint is None else self._optimizer_state()
        return _Snapshot(
            epoch.number, epoch.steps, self.order_generator.get_state(), epoch.rates[-1], losses, logits, spread,
            self._master().clone(), {name: tensor.clone() for name, tensor in optimizer.items()},
            self.lane.stream.record_event() if self.lane.on_gpu else None,
        )  # fmt: skip

    def _master(self) -> Tensor:
        return self.step.master[self.place, : self.step.sizes.n_all]

    def _optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer and the masks go on from: moments, powers of the betas, the number of masks drawn."""
        step, place = self.step, self.place
        moments = step.moments[:, place, : step.sizes.n_all]
        return {"moments": moments, "powers": step.powers[place], "masks_drawn": step.cursor[self.bags, 5]}

    def _weights_of(self, master: Tensor) -> dict[str, Tensor]:
        """A state dict of views, in the model's order."""
        views = dict(zip(_NAMES, views_of(master, self.step.sizes), strict=True))
        return {name: views[name] for name in self.job.model.state_dict()}


class _Group:
    """Runs that take their steps together; a single one does so by graphs for the sizes of its bags."""

    def __init__(self, numbered: dict[int, _Run], store: Store, lane: Lane) -> None:
        runs = list(numbered.values())
        self.runs, self.members, self.lane, job = numbered, runs, lane, runs[0].job
        if lane.on_gpu:
            lane.stream.wait_stream(torch.cuda.current_stream(store.device))  # which brought features and weights
        lengths = [place.n_rows for run in runs for place in run.train]
        self.steps_a_graph = 1 if store.slot_rows else STEPS_A_GRAPH  # a ring of streamed bags has room for one
        with lane.current(), torch.no_grad():
            self.step = TrainingStep(
                [run.parameters for run in runs],
                features=store.features,
                longest=max(lengths),
                positions=self._in_whole_graphs(max(math.ceil(len(run.train) / job.batch_size) for run in runs)),
                top_k=job.model.options["mask_top_k"],
                ratio=job.model.options["mask_ratio"],
                weight_decay=job.weight_decay,
                seeds=[another_seed(run.job.seed) for run in runs],
                batch_size=job.batch_size,
            )
            self.validation = ValidationPass(
                self.step,
                longest=max(place.n_rows for run in runs for place in run.val),
                n_bags=max(len(run.val) for run in runs),
                n_top=N_TOP,
                at_once=job.batch_size if store.slot_rows else None,  # the ring has room for as many
            )
            for place, run in enumerate(runs):
                run.join(self.step, self.validation, place, lane)
            self.sizes = dict(zip(lengths, bucket_sizes(lengths), strict=True))
            if len(runs) > 1:  # as large as the largest of their bags, at nearly every step
                self.sizes = dict.fromkeys(lengths, max(lengths))
            sizes = sorted(set(self.sizes.values()))
            self.replay: dict[int, Callable[[], None]] = {size: partial(self._launch, size) for size in sizes}
            self.validate: Callable[[], None] = self.validation.launch
            if lane.on_gpu:
                graphs = self.step.capture(sizes, self.steps_a_graph)
                self.replay = {n: graph.replay for n, graph in zip(sizes, graphs, strict=True)}
                self.validate = self.validation.capture().replay

    def _in_whole_graphs(self, n_steps: int) -> int:
        """Steps with those behind the last, without bags, that make the last graph whole."""
        return math.ceil(n_steps / self.steps_a_graph) * self.steps_a_graph

    def _launch(self, n_rows: int) -> None:
        """What a graph does."""
        for _ in range(self.steps_a_graph):
            self.step.launch(n_rows)

    def enqueue(self) -> None:
        """Queue the next epoch's training and validation of the runs that have one."""
        epochs = {place: run.next_epoch() for place, run in enumerate(self.members) if run.has_next}
        if not epochs:
            return
        n_steps = self._in_whole_graphs(max(len(epoch.steps) for epoch in epochs.values()))
        steps = [
            {
                (place, seat): self.members[place].train[index]
                for place, epoch in epochs.items()
                for step in epoch.steps[number : number + 1]
                for seat, index in enumerate(step)
            }
            for number in range(n_steps)
        ]
        at_once, n_passes = self.validation.at_once, self.validation.positions
        passes = [
            {
                (place, seat): bag
                for place in epochs
                for seat, bag in enumerate(self.members[place].val[first : first + at_once])
            }
            for first in range(0, n_passes * at_once, at_once)
        ]
        starts = iter(self.lane.starts_of([bag for bags in (*steps, *passes) for bag in bags.values()]))
        bags = np.zeros((len(self.members), n_steps, self.step.batch_size, 3), np.int64)
        for number, step in enumerate(steps):
            for (place, seat), bag in step.items():
                label = self.members[place].train_labels[epochs[place].steps[number][seat]]
                bags[place, number, seat] = next(starts), bag.n_rows, label
        rates = np.zeros((len(self.members), n_steps))
        for place, epoch in epochs.items():
            rates[place, : len(epoch.rates)] = epoch.rates
        val_bags = np.zeros((len(self.members), n_passes, at_once, 3), np.int64)
        for number, one in enumerate(passes):
            for (place, seat), bag in one.items():
                val_bags[place, number, seat] = next(starts), bag.n_rows, 0
        with self.lane.current(), torch.no_grad():
            self.step.schedule(self._sent(bags), self._sent(rates))
            for number in range(0, n_steps, self.steps_a_graph):
                in_graph = [bag for step in steps[number : number + self.steps_a_graph] for bag in step.values()]
                with self._in_place(in_graph):
                    self.replay[max(self.sizes[bag.n_rows] for bag in in_graph)]()
            self.validation.schedule(self._sent(val_bags))
            for one in passes:
                with self._in_place(one.values()):
                    self.validate()
            for place, epoch in epochs.items():
                self.members[place].end_epoch(epoch)

    @contextmanager
    def _in_place(self, bags: Iterable[Place]) -> Iterator[None]:
        """Within, what is queued on the lane may read these bags."""
        with ExitStack() as in_use:
            for bag in bags:
                if bag.start is None:
                    in_use.enter_context(self.lane.at(bag))
            yield

    def _sent(self, values: np.ndarray) -> Tensor:
        """Values on the device, without waiting for it."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.lane.store.device, non_blocking=True) if self.lane.on_gpu else tensor


def _mean_over_bags(losses: Tensor, steps: Sequence[Sequence[int]]) -> Tensor:
    """Losses of each step (S, 4), the mean over its bags, from those of bags (B, S, 4); a step may have fewer."""
    counts = torch.tensor([len(step) for step in steps])
    has_bag = torch.arange(len(losses))[:, None] < counts
    return losses.where(has_bag[:, :, None], 0.0).sum(dim=0) / counts[:, None]


def bucket_sizes(lengths: Sequence[int]) -> list[int]:
    """For each bag the most rows of the bags that share its graph, which differ by at most a quarter.

    Examples:
        >>> bucket_sizes([10, 100, 1000, 1050, 90000])
        [100, 100, 1050, 1050, 90000]
    """
    buckets = [max(0, math.ceil(math.log(max(n, 1) / _LEAST_ROWS, _GROWTH))) for n in lengths]
    most: dict[int, int] = {}
    for bucket, n in zip(buckets, lengths, strict=True):
        most[bucket] = max(n, most.get(bucket, 0))
    return [most[bucket] for bucket in buckets]


def _scratch_bytes(members: "Sequence[tuple[TrainingJob, Sets]]", dtype: torch.dtype, device: torch.device) -> int:
    """About what a group needs beside the features."""
    job = members[0][0]
    options: Mapping[str, Any] = job.model.options
    hidden, gate, branches = options["hidden_features"], options["attention_features"], options["n_branches"]
    n_logits = (branches + 1) * options["n_classes"]
    longest = max(slide.n_rows for _, sets in members for slide in sets.train)
    longest_val = max(slide.n_rows for _, sets in members for slide in sets.val)
    of_scores = 4 * (branches + n_logits)
    row = (2 * hidden + 4 * gate + power_of_2_at_least(n_logits)) * dtype.itemsize + hidden // 8 + of_scores
    of_matrices = 4 * hidden * (options["in_features"] + 2 * gate + n_logits)
    shares = choose_shares(
        options["in_features"], hidden, gate, dtype, device, heads=True, bags_a_model=job.batch_size
    )  # fmt: skip
    bag = longest * row + shares.most(longest) * of_matrices + 2**23
    model = 8 * of_matrices + 2**25  # weights and moments, and copies of them while steps are captured
    val_row = hidden * dtype.itemsize + of_scores
    val_rows = max(len(members) * job.batch_size * longest_val, min(ROWS_AT_ONCE, MAX_BAGS * longest_val))
    return len(members) * (job.batch_size * bag + model) + val_rows * val_row


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, queued on the current stream."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
