"""Time of one ACMIL-GA training step: the eager loop, PyTorch compiled and captured, and the fused step.

    python benchmarks/training_step.py --result results/training_step
    python benchmarks/training_step.py --device cpu        # a smoke run in Triton's interpreter

Bags are synthetic: normal features. For each size the fused step is first held against the reference in float64, loss
and every gradient by norm, with its buffers poisoned: in float32 as it is, in a half type beside what PyTorch's own
autocast step of that type gets on the same inputs. No time is taken of a step that is wrong. Then the arms are timed in
one process, each going round several bags, so that no cache holds the features from one step to the next: the median
of many samples, with the 10th and 90th percentile. The arm `packed` takes several bags a step, and tells the time of
each, beside the eager loop's with the fused operators on bags that are joined already. The arm `mixed` takes
bags of different sizes, log-normal around N, by graphs of one, two and four steps; the arm `group` the steps of several
models in one launch on such bags, and tells the time of each; their samples are as many bags as there are. Their share
of the floor is that of a bag of N tiles. The arm `energy` runs each launch of such a group over and over, and whole
steps, for seconds, and tells what a model's share of it takes from the card: where power is the limit, it is the time.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

PRODUCT_FLOPS, COPY_BYTES = 757e12, 3.0e12  # measured on an H100: a large bf16 product; a copy, read plus written
TOP_K, RATIO, WEIGHT_DECAY, RATE = 10, 0.6, 1e-5, 1e-4
CACHE_BYTES = 300e6  # features that the bags of a size hold together, several times the L2
GROUP_BAGS = 64  # of a group of models
ENERGY_SECONDS = 3.0  # of each launch: the card's counter moves on some ten times a second
HALF_ERROR, HALF_RATIO = 2e-3, 2.0  # a half type may err HALF_RATIO times as far as PyTorch's own
FLOAT32_NEAR_ZERO = 1e-6  # of the norms of a row and a line: a product of them may be on either side of zero
FLOAT32_ERROR, FLOAT32_BIAS_ERROR = 1e-4, 1e-3  # the gradient of bV is what is left of sums that all but cancel


class Shape(NamedTuple):
    """One size of bag and model."""

    n: int
    d: int
    l: int  # noqa: E741
    a: int = 128
    k: int = 5
    c: int = 2

    def __str__(self) -> str:
        return f"N={self.n:,} D={self.d} L={self.l}"

    def floor_ms(self) -> float:
        """No step can be faster: arithmetic at the rate of a large product, or the features read twice."""
        flops = 2 * self.n * (2 * self.d * self.l + 3 * self.l * 2 * self.a)
        return 1e3 * max(flops / PRODUCT_FLOPS, 4 * self.n * self.d / COPY_BYTES)

    def inference_floor_ms(self) -> float:
        """The same for a forward pass."""
        flops = 2 * self.n * (self.d * self.l + self.l * 2 * self.a)
        return 1e3 * max(flops / PRODUCT_FLOPS, 2 * self.n * self.d / COPY_BYTES)


SHAPES = [
    Shape(1_000, 1024, 512), Shape(10_000, 1024, 512), Shape(100_000, 1024, 512), Shape(10_000, 384, 128),
]  # fmt: skip


class Bags(NamedTuple):
    """Bags of one size on the device, one after another."""

    features: Tensor  # (S·N, D)
    offsets: Tensor  # (S+1,) int64
    labels: Tensor  # (S,) int64


class Timing(NamedTuple):
    """Milliseconds a step."""

    median: float
    low: float
    high: float


def make_bags(shape: Shape, dtype: torch.dtype, device: torch.device, n_bags: int) -> Bags:
    """Normal features, as a backbone with a final LayerNorm gives them."""
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn((n_bags * shape.n, shape.d), generator=generator, device=device).to(dtype)
    offsets = torch.arange(n_bags + 1, device=device) * shape.n
    return Bags(features, offsets, torch.arange(n_bags, device=device) % shape.c)


def make_model(shape: Shape, device: torch.device) -> Any:
    """The model as training builds it."""
    from acmil.models import create_model

    torch.manual_seed(0)
    model = create_model(
        "acmil_ga", in_features=shape.d, n_classes=shape.c, n_branches=shape.k, mask_top_k=TOP_K, mask_ratio=RATIO,
        hidden_features=shape.l, attention_features=shape.a,
    )  # fmt: skip
    return model.to(device)


def parameters_of(model: Any) -> Any:
    """The model's parameters in the order of the fused step."""
    from acmil.kernels.training_step import GatedParameters

    return GatedParameters(
        model.reduction.weight, model.gate_v.weight, model.gate_u.weight, model.branch_head.weight,
        model.bag_head.weight, model.gate_v.bias, model.gate_u.bias, model.score.weight, model.score.bias,
        model.branch_head.bias, model.bag_head.bias,
    )  # fmt: skip


def make_step(shape: Shape, bags: Bags, device: torch.device, positions: int, batch_size: int = 1) -> Any:
    """A fused step that goes round the bags, so many at a time."""
    from acmil.kernels.training_step.fused import TrainingStep

    step = TrainingStep(
        [parameters_of(make_model(shape, device))], features=bags.features, longest=shape.n, positions=positions,
        top_k=TOP_K, ratio=RATIO, weight_decay=WEIGHT_DECAY, seeds=[1], batch_size=batch_size,
    )  # fmt: skip
    order = torch.arange(positions * batch_size, device=device).view(1, positions, batch_size) % bags.labels.numel()
    table = torch.stack([bags.offsets[:-1], bags.offsets.diff(), bags.labels], dim=1)
    step.schedule(table[order], torch.full((1, positions), RATE, dtype=torch.float64, device=device))
    return step


def make_group(shape: Shape, dtype: torch.dtype, device: torch.device, n_models: int, positions: int) -> Any:
    """A step of several models, each with its own order of bags, log-normal around N tiles (sigma 0.5)."""
    from acmil.kernels.training_step.fused import TrainingStep

    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(shape.n), 0.5, GROUP_BAGS).astype(int).clip(1)
    features = torch.randn((int(lengths.sum()), shape.d), device=device).to(dtype)
    step = TrainingStep(
        [parameters_of(make_model(shape, device)) for _ in range(n_models)], features=features,
        longest=int(lengths.max()), positions=positions, top_k=TOP_K, ratio=RATIO, weight_decay=WEIGHT_DECAY,
        seeds=range(n_models),
    )  # fmt: skip
    table = np.stack([lengths.cumsum() - lengths, lengths, np.arange(GROUP_BAGS) % shape.c], axis=1)
    rounds = -(-positions // GROUP_BAGS)
    orders = [np.concatenate([random.permutation(GROUP_BAGS) for _ in range(rounds)]) for _ in range(n_models)]
    bags = torch.from_numpy(np.stack([table[order[:positions]] for order in orders])).to(device)
    step.schedule(bags[:, :, None], torch.full((n_models, positions), RATE, dtype=torch.float64, device=device))
    return step


def poison(step: Any) -> None:
    """Fill every buffer that a step should write with NaN."""
    buffers = (
        step.hidden, step.gate, step.d_gate, step.d_reduced, step.scores, step.projections, step.sums,
        step.maxima, step.inverses, step.d_logits, step.d_pairs, step.correction, step.small, step.large, step.losses,
    )  # fmt: skip
    for buffer in buffers:
        buffer.fill_(float("nan"))


def errors_of_step(
    shape: Shape, bags: Bags, device: torch.device, batch_size: int = 1
) -> dict[str, tuple[float, float]]:
    """Relative errors, by norm, of losses and gradients against the reference in float64; of the first bags.

    Of the fused step, and of the reference in the features' type by autocast (0 for float32).
    """
    from acmil.kernels.training_step.parameters import views_of

    step = make_step(shape, bags, device, 1, batch_size)
    poison(step)
    initial = [p.clone() for p in step.parameters_of(0)]
    step.launch()
    keep = ~torch.isinf(step.scores[:, : shape.n])
    dropped = (~keep).sum(dim=1).tolist()
    expected_dropped = int(min(TOP_K, shape.n) * RATIO + 1e-9)
    if dropped != [expected_dropped] * (shape.k * batch_size):
        raise SystemExit(f"{shape}: masked {dropped} of a pool of {TOP_K}, expected {expected_dropped} each")
    of_bags = _first(bags, batch_size, shape.n)
    keep = keep.view(batch_size, shape.k, shape.n)
    expected = reference_gradients(initial, of_bags, keep, torch.float64)
    # The first moment after one step is (1 − β1) g.
    moments = views_of(step.moments[0, 0, : step.sizes.n_all], step.sizes)
    loss = step.losses[:, 0, 0].mean()
    fused = {"loss": loss, **{n: m / 0.1 for n, m in moments._asdict().items() if n in expected}}
    if bags.features.dtype == torch.float32:
        lines = lines_on_one_side(step, initial[0], of_bags, shape)
        for gradients in (fused, expected):
            gradients["reduction_weight"] = gradients["reduction_weight"][lines]
        return {name: (error, 0.0) for name, error in _errors(fused, expected).items()}
    errors = _errors(fused, expected)
    with torch.autocast(device.type, bags.features.dtype):
        plain = _errors(reference_gradients(initial, of_bags, keep, torch.float32), expected)
    return {name: (error, plain[name]) for name, error in errors.items()}


def lines_on_one_side(step: Any, reduction_weight: Tensor, bags: Bags, shape: Shape) -> Tensor:
    """Lines of W1, (L,) bool, for which every row of H is above zero in the step as it is in float64.

    In float32 one value in some ten millions falls on the other side of the ReLU, which adds or takes a whole row of X
    to the gradient of its line: 3e-4 of all of it with eight bags of 10,000, in PyTorch's float32 as here. Ends the
    program if a value did that was not next to zero, or if few lines are left.
    """
    flipped = torch.zeros(shape.l, dtype=torch.bool, device=reduction_weight.device)
    weight = reduction_weight.double()
    for place, features in enumerate(bags.features.split(shape.n)):
        exact = features.double() @ weight.T
        first_row = place * step.model_rows
        other_side = (step.hidden[first_row : first_row + shape.n] > 0) != (exact > 0)
        near = FLOAT32_NEAR_ZERO * torch.outer(features.double().norm(dim=1), weight.norm(dim=1))
        if (other_side & (exact.abs() > near)).any():
            raise SystemExit(f"{shape}: H is on the wrong side of zero")
        flipped |= other_side.any(dim=0)
    if flipped.sum() > shape.l // 2:
        raise SystemExit(f"{shape}: {int(flipped.sum())} lines of H have a value on the other side of zero")
    return ~flipped


def reference_gradients(initial: list[Tensor], bags: Bags, keep: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean loss of bags and its gradients by the reference, but for that of the scores' bias: nothing but rounding."""
    from acmil.kernels.training_step import GatedParameters, loss_terms

    parameters = GatedParameters(*(p.to(dtype).clone().requires_grad_() for p in initial))
    total = torch.zeros((), dtype=dtype, device=bags.features.device)
    parts = bags.features.tensor_split(bags.offsets[1:-1].cpu())
    for features, label, of_bag in zip(parts, bags.labels, keep, strict=True):
        loss = loss_terms(parameters, features.to(dtype), label, of_bag).total / len(parts)
        loss.backward()  # one bag's graph at a time
        total += loss.detach()
    gradients = {n: p.grad for n, p in parameters._asdict().items() if n != "score_bias"}
    return {"loss": total, **gradients}


def _errors(values: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((values[n].double() - e.double()).norm() / e.double().norm()).item() for n, e in expected.items()}


def check_step(shape: Shape, bags: Bags, device: torch.device, batch_size: int = 1) -> dict[str, Any]:
    """The largest error, and PyTorch's own at the same place; ends the program if one is beyond rounding."""
    errors = errors_of_step(shape, bags, device, batch_size)
    half = bags.features.dtype != torch.float32
    for name, (error, plain) in errors.items():
        exact = FLOAT32_BIAS_ERROR if name == "v_bias" else FLOAT32_ERROR
        if not error < (HALF_ERROR + HALF_RATIO * plain if half else exact):
            raise SystemExit(f"{shape} {bags.features.dtype}: wrong, relative errors (fused, autocast) {errors}")
    worst = max(errors, key=lambda name: errors[name][0])
    checked = {"size": str(shape), "dtype": str(bags.features.dtype), "bags": batch_size, "errors": errors}
    print(json.dumps(checked), flush=True)
    return {"error": errors[worst][0], "error_of": worst, "autocast_error": errors[worst][1]}


def timed(run: Callable[[int], None], device: torch.device, *, samples: int, steps: int) -> Timing:
    """Time of a call, from events around `steps` of them; the calls are numbered on."""
    times, number = [], 0
    for sample in range(samples + 2):
        start = _mark(device)
        for _ in range(steps):
            run(number)
            number += 1
        elapsed_ms = _since(start, device)
        if sample >= 2:  # the first are to warm up
            times.append(elapsed_ms / steps)
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return Timing(statistics.median(times), cuts[0], cuts[-1])


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    torch.cuda.synchronize()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _since(start: Any, device: torch.device) -> float:
    if device.type != "cuda":
        return 1e3 * (time.perf_counter() - start)
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def choose_operators(*, fused: bool) -> None:
    """Have the public operators run the fused kernels where they can, or their reference."""
    import acmil.kernels.branch_pool
    import acmil.kernels.gated_scores
    import acmil.kernels.top_k_masking
    from acmil.kernels.launch import takes_fused_path

    for package in (acmil.kernels.branch_pool, acmil.kernels.gated_scores, acmil.kernels.top_k_masking):
        package.takes_fused_path = takes_fused_path if fused else lambda *_, **__: False


def eager_arm(
    shape: Shape, bags: Bags, device: torch.device, *, fused: bool, batch_size: int = 1
) -> Callable[[int], None]:
    """The step of `acmil.training.fit`, in float32; with the fused operators, or with their reference."""
    choose_operators(fused=fused)
    model = make_model(shape, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator(device).manual_seed(1)
    parts, labels = bags.features.float().split(batch_size * shape.n), bags.labels.split(batch_size)
    offsets = bags.offsets[: batch_size + 1] if batch_size > 1 else None
    losses = torch.zeros(len(parts), 4, device=device)

    def run(number: int) -> None:
        index = number % len(parts)
        terms = model.loss(model(parts[index], offsets, generator=generator), labels[index])
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses[index] = torch.stack([terms.total, terms.bag, terms.branch, terms.diversity]).detach()

    return run


def compiled_arm(shape: Shape, bags: Bags, device: torch.device) -> Callable[[int], None]:
    """The step as vectorised PyTorch, compiled, autocast to the features' type, and captured in a graph a bag."""
    from acmil.kernels.training_step import GatedParameters, LossTerms

    model = make_model(shape, device)
    parameters = [p.detach().clone().requires_grad_() for p in parameters_of(model)]
    rate = torch.tensor(RATE, device=device)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY, fused=True, capturable=True)
    n_drop = int(min(TOP_K, shape.n) * RATIO + 1e-9)
    losses = torch.zeros(4, device=device)

    def loss(p: GatedParameters, x: Tensor, label: Tensor) -> LossTerms:
        hidden = torch.relu(F.linear(x, p.reduction_weight))
        gate = torch.tanh(F.linear(hidden, p.v_weight, p.v_bias)) * torch.sigmoid(
            F.linear(hidden, p.u_weight, p.u_bias)
        )
        scores = F.linear(gate, p.score_weight, p.score_bias).T.float()
        pool = scores.detach().topk(TOP_K, dim=-1).indices
        drop = torch.rand(pool.shape, device=x.device).topk(n_drop, dim=-1).indices
        scores = scores.scatter(1, pool.gather(1, drop), float("-inf"))
        attention = torch.softmax(scores, dim=-1)
        z = (attention.to(hidden.dtype) @ hidden).float()
        gram = attention @ attention.T
        norm = gram.diagonal().sqrt()
        cosine = gram / (norm[:, None] * norm[None, :])
        bag = F.cross_entropy(F.linear(z.mean(dim=0, keepdim=True), p.bag_head_weight, p.bag_head_bias), label)
        logits = (p.branch_head_weight @ z[:, :, None])[..., 0] + p.branch_head_bias
        branch = F.cross_entropy(logits, label.expand(shape.k))
        diversity = (cosine.sum() - cosine.diagonal().sum()) / (shape.k * (shape.k - 1))
        return LossTerms(bag + branch + diversity, bag, branch, diversity)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)

    def step(index: int) -> None:
        x = bags.features[index * shape.n : (index + 1) * shape.n]
        with torch.autocast(device.type, bags.features.dtype, enabled=bags.features.dtype != torch.float32):
            terms = compiled(GatedParameters(*parameters), x, bags.labels[index : index + 1])
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
        losses.copy_(torch.stack(terms).detach())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in (0, 1, 0, 1):
            step(index % bags.labels.numel())
    torch.cuda.synchronize()
    graphs = []
    for index in range(bags.labels.numel()):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            step(index)
        graphs.append(graph)
    return lambda number: graphs[number % len(graphs)].replay()


def fused_arm(step: Any, device: torch.device) -> Callable[[int], None]:
    """The fused step, captured once for all bags, with as many a graph as in training; on a CPU launched by hand."""
    if device.type != "cuda":
        return lambda _: step.launch()
    from acmil.kernels.training_step.fused import STEPS_A_GRAPH

    graph = step.capture([step.longest], STEPS_A_GRAPH)[0]  # as the resident engine does
    return lambda number: graph.replay() if number % STEPS_A_GRAPH == 0 else None


def mixed_arm(step: Any, device: torch.device, steps_a_graph: int) -> Callable[[int], None]:
    """Steps of one model on bags of different sizes, by graphs for the sizes that the resident engine has."""
    from acmil.resident import bucket_sizes

    lengths = step.bags[0, :, 1].tolist()
    sizes = dict(zip(lengths, bucket_sizes(lengths), strict=True))
    if device.type != "cuda":
        return lambda number: step.launch(sizes[lengths[number]])
    needed = sorted(set(sizes.values()))
    graphs = dict(zip(needed, step.capture(needed, steps_a_graph), strict=True))

    def run(number: int) -> None:
        if number % steps_a_graph == 0:
            graphs[max(sizes[n] for n in lengths[number : number + steps_a_graph])].replay()

    return run


def inference_arm(shape: Shape, bags: Bags, device: torch.device, *, fused: bool) -> Callable[[int], None]:
    """Attention and pooled features of a bag by the operators or their reference, captured in a graph a bag."""
    from acmil.kernels import gated_attention_pool

    choose_operators(fused=fused)
    exact = parameters_of(make_model(shape, device))
    p = type(exact)(*(parameter.detach().to(bags.features.dtype) for parameter in exact))
    weights = (p.reduction_weight, p.v_weight, p.v_bias, p.u_weight, p.u_bias, p.score_weight, p.score_bias)
    parts = bags.features.split(shape.n)
    with torch.no_grad():
        gated_attention_pool(parts[0], *weights)
        if device.type != "cuda":
            return lambda number: gated_attention_pool(parts[number % len(parts)], *weights)
        graphs = []
        for part in parts:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                gated_attention_pool(part, *weights)
            graphs.append(graph)
    return lambda number: graphs[number % len(graphs)].replay()


def launches_of(step: Any) -> dict[str, Callable[[], Any]]:
    """Each launch of a step, to do again on its own.

    The step is of no use after: an update directly behind another reads parameters that this is still writing.
    """
    from acmil.kernels.training_step import fused

    calls: dict[str, Callable[[], Any]] = {}
    places = [(fused, name) for name in vars(fused) if name.startswith("launch_")]
    places += [(step, "_launch_losses"), (step, "_launch_update")]
    plain = {name: getattr(owner, name) for owner, name in places}

    def note(name: str) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            calls[name.strip("_").removeprefix("launch_")] = lambda: plain[name](*args, **options)
            return plain[name](*args, **options)

        return launch

    for owner, name in places:
        setattr(owner, name, note(name))
    step.launch()
    for owner, name in places:
        setattr(owner, name, plain[name])
    return calls


def launch_times(step: Any, repeats: int = 10) -> dict[str, float]:
    """Microseconds of each launch of a step on its own: `repeats` of it in a graph, launches as close as they come.

    A profiler would count a launch that waits in place for the one before it as running.
    """
    device = torch.device("cuda")
    graphs = {name: _captured(call, repeats) for name, call in launches_of(step).items()}
    return {
        name: 1e3 / repeats * timed(lambda _, graph=graph: graph.replay(), device, samples=15, steps=1).median
        for name, graph in graphs.items()
    }


def _captured(call: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def launch_energies(step: Any, repeats: int = 10) -> dict[str, Any]:
    """Millijoules and microseconds, a model, of whole steps and of each launch on its own, when all there is for long.

    Always of the same bags, and the models stay as they are. At rest a card takes energy too: it is in all of these.
    Beside them, as yardsticks, PyTorch's X W1ᵀ of as many rows, its d(X W1ᵀ)ᵀ X of them in as many shares as there are,
    in the features' type, and a copy of as many rows of X.
    """
    step.rates.zero_()
    lengths = step.bags[:, 0, 1]
    x, weight = step.features[: int(lengths.sum())], step.reductions[0]
    copied, product = torch.empty_like(x), x.new_empty((x.shape[0], weight.shape[0]))
    step.launch()
    d_reduced = torch.cat([step.d_reduced[i * step.model_rows :][:n] for i, n in enumerate(lengths.tolist())])
    n_shares = step.n_models * step.shares.short
    in_shares = [m[: len(m) // n_shares * n_shares].view(n_shares, -1, m.shape[1]) for m in (d_reduced, x)]
    gradient = x.new_empty((n_shares, *weight.shape))
    graphs = {"whole step": _captured(step.launch, repeats)}
    graphs |= {name: _captured(call, repeats) for name, call in launches_of(step).items()}
    graphs["product of X and W1 by PyTorch"] = _captured(lambda: torch.mm(x, weight.T, out=product), repeats)
    graphs["product of d(X W1ᵀ) and X by PyTorch"] = _captured(
        lambda: torch.bmm(in_shares[0].transpose(1, 2), in_shares[1], out=gradient), repeats
    )
    graphs["copy of X"] = _captured(lambda: copied.copy_(x), repeats)
    energies = {name: _energy_of(graph, repeats * step.n_models) for name, graph in graphs.items()}
    return {"mean_rows": lengths.double().mean().item(), "launches_mj_us": energies}


def _energy_of(graph: torch.cuda.CUDAGraph, parts: int) -> tuple[float, float]:
    for _ in range(10):  # to warm up
        graph.replay()
    torch.cuda.synchronize()
    consumed, started, replays = consumed_mj(), time.perf_counter(), 0
    while time.perf_counter() - started < ENERGY_SECONDS:
        for _ in range(10):
            graph.replay()
        replays += 10
        torch.cuda.synchronize()
    elapsed_us = 1e6 * (time.perf_counter() - started)
    return (consumed_mj() - consumed) / (replays * parts), elapsed_us / (replays * parts)


def consumed_mj() -> int:
    """Millijoules that the current GPU has taken since its driver was loaded (NVML)."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    for status in (
        nvml.nvmlInit_v2(),
        nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid), ctypes.byref(device)),
        nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)),
    ):
        if status != 0:
            raise SystemExit(f"NVML does not tell the card's energy: error {status}")
    return energy.value


def peak_bytes(device: torch.device, action: Callable[[], Any]) -> tuple[int, Any]:
    """Most memory that an action held beyond what was there, and what it returned."""
    if device.type != "cuda":
        return 0, action()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def measure(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms at one size."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    n_bags = int(CACHE_BYTES / (shape.n * shape.d * dtype.itemsize)) if device.type == "cuda" else 0
    bags = make_bags(shape, dtype, device, max(4, *options.bags, min(n_bags, 64)))
    if dtype != torch.float32:
        check_step(shape, make_bags(shape, torch.float32, device, 1), device)
    error = check_step(shape, bags, device)
    rows: list[dict[str, Any]] = []

    def add(arm: str, run: Callable[[int], None], floor_ms: float, memory: int, steps: int, n_models: int = 1) -> None:
        timing = Timing(*(ms / n_models for ms in timed(run, device, samples=options.samples, steps=steps)))
        rows.append(
            {"size": str(shape), "dtype": options.dtype, "arm": arm, "ms": timing.median, "p10_ms": timing.low,
             "p90_ms": timing.high, "floor_share": floor_ms / timing.median, "peak_mb": memory / 1e6}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    quick, slow = (20, 3) if device.type == "cuda" else (1, 1)
    arms = options.arms.split(",")
    for arm, fused in (("eager", False), ("eager-operators", True)):
        if arm in arms:
            memory, run = peak_bytes(device, lambda fused=fused: _warm(eager_arm(shape, bags, device, fused=fused)))
            add(arm, run, shape.floor_ms(), memory, slow)
    if "compiled" in arms and device.type == "cuda":
        memory, run = peak_bytes(device, lambda: compiled_arm(shape, bags, device))
        add("compiled", run, shape.floor_ms(), memory, quick)
    if "fused" in arms:
        positions = (options.samples + 4) * quick + 40
        memory, step = peak_bytes(device, lambda: make_step(shape, bags, device, positions))
        run = fused_arm(step, device)
        add("fused", run, shape.floor_ms(), memory, quick)
        rows[-1] |= error
        if device.type == "cuda":
            rows[-1]["launches_us"] = launch_times(step)
            print(json.dumps(rows[-1]["launches_us"]), flush=True)
    for size in options.bags if "packed" in arms else ():
        whole = _first(bags, bags.labels.numel() // size * size, shape.n)
        if dtype != torch.float32:
            check_step(shape, make_bags(shape, torch.float32, device, size), device, size)
        packed = check_step(shape, whole, device, size)
        memory, run = peak_bytes(
            device, lambda b=size, w=whole: _warm(eager_arm(shape, w, device, fused=True, batch_size=b))
        )
        add(f"eager-operators, {size} bags a step, each", run, shape.floor_ms(), memory, slow, size)
        positions = (options.samples + 4) * quick + 40
        memory, step = peak_bytes(device, lambda b=size, w=whole, p=positions: make_step(shape, w, device, p, b))
        add(f"fused, {size} bags a step, each", fused_arm(step, device), shape.floor_ms(), memory, quick, size)
        rows[-1] |= packed
        del step
    for steps_a_graph in (1, 2, 4) if "mixed" in arms else ():
        steps = GROUP_BAGS if device.type == "cuda" else 1
        positions = (options.samples + 2) * steps
        memory, step = peak_bytes(device, lambda p=positions: make_group(shape, dtype, device, 1, p))
        memory = max(0, memory - step.features.nbytes)
        run = mixed_arm(step, device, steps_a_graph)
        add(f"fused, bags of many sizes, {steps_a_graph} steps a graph", run, shape.floor_ms(), memory, steps)
        del step, run
    if "group" in arms:
        for n_models in options.models:
            positions = (options.samples + 2) * GROUP_BAGS if device.type == "cuda" else 3
            memory, step = peak_bytes(device, lambda m=n_models, p=positions: make_group(shape, dtype, device, m, p))
            memory = max(0, memory - step.features.nbytes)
            steps = GROUP_BAGS if device.type == "cuda" else 1  # all bags once
            group_arm = f"{n_models} models in a launch, each"
            add(group_arm, fused_arm(step, device), shape.floor_ms(), memory, steps, n_models)
            del step
    for n_models in options.models if "energy" in arms and device.type == "cuda" else ():
        energies = launch_energies(make_group(shape, dtype, device, n_models, 1))
        rows.append({"size": str(shape), "dtype": options.dtype, "arm": "energy", "models": n_models, **energies})
        print(json.dumps(rows[-1]), flush=True)
    for arm, fused in (("inference-reference", False), ("inference", True)):
        if arm in arms:
            memory, run = peak_bytes(device, lambda fused=fused: inference_arm(shape, bags, device, fused=fused))
            add(arm, run, shape.inference_floor_ms(), memory, quick)
    return rows


def _first(bags: Bags, n_bags: int, n_rows: int) -> Bags:
    return Bags(bags.features[: n_bags * n_rows], bags.offsets[: n_bags + 1], bags.labels[:n_bags])


def _warm(run: Callable[[int], None]) -> Callable[[int], None]:
    run(0)
    return run


def as_markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = [
        "# One ACMIL-GA training step", "",
        f"{result['machine']}, torch {result['versions']['torch']}, triton {result['versions']['triton']}. "
        f"{result['note']}", "",
    ]  # fmt: skip
    timed_rows = [row for row in result["rows"] if "ms" in row]
    lines += [] if not timed_rows else [
        "| size | arm | ms, median (p10 to p90) | share of the floor | memory beyond the features, MB "
        "| largest error (autocast's) |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in timed_rows:
        error = f"{row['error']:.1e} ({row['autocast_error']:.1e})" if "error" in row else ""
        lines.append(
            f"| {row['size']} {row['dtype']} | {row['arm']} | {row['ms']:.4f} ({row['p10_ms']:.4f} to "
            f"{row['p90_ms']:.4f}) | {row['floor_share']:.2f} | {row['peak_mb']:.0f} | {error} |"
        )
    profiles = {row["size"]: row["launches_us"] for row in result["rows"] if "launches_us" in row}
    if profiles:
        names = list(dict.fromkeys(name for profile in profiles.values() for name in profile))
        lines += ["", "Each launch of the fused step on its own, µs (ten in a graph, on one bag):", ""]
        lines += ["| launch | " + " | ".join(profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
        lines += [f"| {n} | " + " | ".join(f"{profile[n]:.1f}" for profile in profiles.values()) + " |" for n in names]
    for row in result["rows"]:
        lines += _energy_table(row) if "launches_mj_us" in row else []
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _energy_table(row: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"{row['size']}, {row['models']} models in a launch, bags of {row['mean_rows']:,.0f} in the mean; each ",
    ]
    lines[-1] += f"on its own for {ENERGY_SECONDS:.0f} s, a model:"
    lines += ["", "| launch | mJ | µs | W |", "|---|---|---|---|"]
    for name, (mj, us) in row["launches_mj_us"].items():
        lines.append(f"| {name} | {mj:.2f} | {us:.2f} | {1e3 * mj / us:.0f} |")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float32", "float16"])
    arms = "eager,eager-operators,compiled,fused,packed,mixed,group,inference-reference,inference"
    parser.add_argument("--arms", default=arms, help="all but energy, which takes minutes")
    parser.add_argument("--bags", type=int, nargs="+", default=[4], help="a step, of the arm packed")
    parser.add_argument("--models", type=int, nargs="+", default=[4, 13, 25], help="of the arms group and energy")
    parser.add_argument("--sizes", default="", help="N:D:L,… in place of the standard sizes")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--result", type=Path, help="written with the suffixes .json and .md")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which happens on first use
        options.samples = 2
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    shapes = [Shape(*map(int, size.split(":"))) for size in options.sizes.split(",") if size]
    if not shapes:
        shapes = SHAPES if options.device == "cuda" else [Shape(100, 32, 32, 16, 3)]
    from acmil.environment import describe

    note = "Synthetic bags. Floor: 757 TFLOP/s in products or 3.0 TB/s, whichever takes longer."
    result: dict[str, Any] = {**describe(), "note": note, "rows": []}
    for shape in shapes:
        result["rows"] += measure(shape, options)
        if options.result is not None:  # after each size: what is measured is kept
            options.result.parent.mkdir(parents=True, exist_ok=True)
            options.result.with_suffix(".json").write_text(json.dumps(result, indent=1))
            options.result.with_suffix(".md").write_text(as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
