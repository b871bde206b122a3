"""Which engine trains: the loop of `acmil.training`, or the captured steps of `acmil.resident`; chosen in one place."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from acmil.kernels.launch import MAX_BAGS, MAX_BRANCHES, MAX_GATE, MAX_LOGITS, MAX_TOP_K, runs_fused_kernels
from acmil.precision import Precision
from acmil.training import EpochRecord, FitResult, Score, fit

if TYPE_CHECKING:
    from acmil.bags import Bag
    from acmil.models.protocol import MILModel

Engine = Literal["eager", "resident"]

ENGINES = ("auto", "eager", "resident")


@dataclass(frozen=True)
class TrainingJob:
    """One run to train, in the terms of `acmil.training.fit`, which says what each means."""

    model: "MILModel"
    train_bags: "Sequence[Bag]"
    val_bags: "Sequence[Bag]"
    epochs: int
    learning_rate: float
    min_learning_rate: float
    warmup_epochs: float
    weight_decay: float
    seed: int
    batch_size: int = 1
    on_epoch: Callable[[EpochRecord], None] | None = None
    state: Mapping[str, Any] | None = None
    checkpoint: Callable[[dict[str, Any]], None] | None = None


class EngineChoice(NamedTuple):
    """What trains, and why."""

    engine: Engine
    reason: str


def choose_engine(
    engine: str, *, device: torch.device, model: str, options: Mapping[str, Any], batch_size: int = 1
) -> EngineChoice:
    """Choose what trains; `resident` is refused where it cannot be had, and nothing falls back in silence.

    Args:
        engine: `auto`, `eager` or `resident`.
        device: Where training computes.
        model: Name of the model.
        options: Its options.
        batch_size: Bags a step.

    Raises:
        ValueError: If the name is none of these, or `resident` is asked for and cannot be had.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}, got {engine!r}.")
    if engine == "eager":
        return EngineChoice("eager", "as asked")
    missing = _why_not_resident(device, model, options, batch_size)
    if missing is None:
        return EngineChoice("resident", "features stay on the GPU, steps are captured graphs")
    if engine == "resident":
        raise ValueError(f"engine resident cannot be had: {missing}. Give engine auto or eager.")
    return EngineChoice("eager", missing)


def fit_jobs(
    jobs: Sequence[TrainingJob],
    *,
    engine: Engine,
    device: torch.device,
    score: Score,
    precision: Precision,
    on_result: Callable[[int, FitResult | Exception], None] | None = None,
) -> list[FitResult | Exception]:
    """Train several runs: together with the resident engine, one after another with the eager one.

    Each run's result is what it gives alone. A run that fails leaves its exception in its place, and the others go on.

    Args:
        jobs: The runs.
        engine: Of `choose_engine`, for every one of them.
        device: Where to compute.
        score: Of every run, as `fit` takes it.
        precision: Of every run.
        on_result: Called with the place of a run and its result when it has ended, before the next one begins or while
            the others go on.
    """
    if engine == "resident":
        from acmil.resident import fit_resident

        return fit_resident(jobs, device=device, score=score, precision=precision, on_result=on_result)
    results: list[FitResult | Exception] = []
    for number, job in enumerate(jobs):
        try:
            result: FitResult | Exception = fit(**vars(job), device=device, score=score, precision=precision)
        except Exception as error:  # noqa: BLE001  one run's end is not the others'
            result = error
        results.append(result)
        if on_result is not None:
            on_result(number, result)
    return results


def _why_not_resident(device: torch.device, model: str, options: Mapping[str, Any], batch_size: int) -> str | None:
    """What the resident engine lacks here, or None."""
    if device.type != "cuda":
        return "there is no GPU" if not torch.cuda.is_available() else f"training is on the {device.type.upper()}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not runs_fused_kernels(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU's compute capability is {major}.{minor}, fused kernels need 9 or 10 (227 KB of shared memory)"
    if model != "acmil_ga":
        return f"fused steps are there for acmil_ga, not for {model}"
    if batch_size > MAX_BAGS:
        return f"fused steps take at most {MAX_BAGS} bags, {batch_size} a step are asked for"
    sizes = {name: options[name] for name in ("in_features", "hidden_features", "attention_features")}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % 16 != 0]
    if odd:
        return f"fused steps need sizes that are multiples of 16, got {', '.join(odd)}"
    if options["n_branches"] > MAX_BRANCHES or options["attention_features"] > MAX_GATE:
        return f"fused steps take at most {MAX_BRANCHES} branches and {MAX_GATE} attention features"
    n_logits = (options["n_branches"] + 1) * options["n_classes"]
    if n_logits > MAX_LOGITS:
        return f"fused steps take at most {MAX_LOGITS} logits of all branches and the bag, got {n_logits}"
    if options["mask_top_k"] >= MAX_TOP_K:
        return f"fused steps mask among fewer than {MAX_TOP_K} tiles, got mask_top_k {options['mask_top_k']}"
    return None
