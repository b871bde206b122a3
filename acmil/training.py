"""The training loop: the reference's recipe, one bag a step, read once from top to bottom in `fit`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acmil.kernels import pad_rows
from acmil.precision import Precision, as_computed
from acmil.selection import SELECTION_METRICS, EpochRecord, Selection

if TYPE_CHECKING:
    from acmil.bags import Bag
    from acmil.engine import TrainingJob
    from acmil.models.protocol import MILModel

Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]

LOSS_TERMS = ("total", "bag", "branch", "diversity")
N_TOP = 10  # tiles whose share of the attention is recorded

_KEPT = ("epochs", "learning_rate", "min_learning_rate", "warmup_epochs", "weight_decay", "seed", "batch_size")
_SHARE_OF_MEMORY = 0.8  # of what a GPU has free: beyond it features stay in main memory


class FitResult(NamedTuple):
    """What training leaves: state dicts on the CPU, and the history."""

    best_weights: dict[str, Tensor]
    last_weights: dict[str, Tensor]
    best_epoch: int
    history: list[EpochRecord]


class Validation(NamedTuple):
    """What an epoch's validation says."""

    loss: float
    metrics: dict[str, float]
    attention_entropy: float
    attention_top10_mass: float


class _LoadedBags(NamedTuple):
    """Bags as a model must get them: on the device where all of them fit, else moved when asked for."""

    bags: "Sequence[Tensor] | Sequence[Bag]"  # S, of (N, D), or (N + padding, D) on a CPU
    lengths: list[int]  # S of N
    labels: Tensor  # (S,) int64, on the device
    slide_ids: list[str]
    precision: Precision

    def features(self, index: int) -> Tensor:
        """(N, D) of one bag, on the device."""
        bag = self.bags[index]
        if isinstance(bag, Tensor):
            return bag[: self.lengths[index]]
        return _as_computed(bag, self.labels.device, self.precision)

    def pack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features (ΣN or more, D), offsets (B+1,) and labels (B,) of several bags; None for [0, N], if that is all."""
        ends = np.cumsum([0, *(self.lengths[index] for index in indices)], dtype=np.int64)
        if len(indices) == 1:
            index = indices[0]
            bag, labels = self.bags[index], self.labels[index : index + 1]
            features = bag if isinstance(bag, Tensor) else self.features(index)
            if len(features) == self.lengths[index]:
                return features, None, labels
        else:
            features, labels = pad_rows(torch.cat([self.features(i) for i in indices])), self.labels[list(indices)]
        return features, torch.from_numpy(ends).to(self.labels.device), labels


def fit(
    model: "MILModel",
    train_bags: "Sequence[Bag]",
    val_bags: "Sequence[Bag]",
    *,
    epochs: int,
    learning_rate: float,
    min_learning_rate: float,
    warmup_epochs: float,
    weight_decay: float,
    seed: int,
    batch_size: int = 1,
    device: torch.device | str,
    score: Score,
    precision: Precision = "fp32",
    on_epoch: Callable[[EpochRecord], None] | None = None,
    state: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train a model: AdamW, one bag a step by default, the learning rate set before every step, the best epoch kept.

    The selected epoch has the highest validation `f1_macro + auroc`. Where epochs tie, which is common with few
    validation bags, the one with the lower validation loss is taken (the reference implementation takes the first); a
    metric that is not defined (NaN) counts as 0.

    Order, masks and dropout come from generators of this function's own: torch's global one is neither read nor
    changed. The model's weights are the caller's: build it under a seed. A run that was stopped and resumed from a
    state gives bit for bit the weights and history of one that was not (`seconds` apart).

    With `precision` bf16 the products over instances are computed in bf16, in training alone: weights, softmax, losses
    and optimizer are float32. Validation is float32 always, as evaluation and heatmaps of the run will be, so that the
    epoch is selected by the figures that the chosen weights get afterwards.

    Args:
        model: Made by `create_model`; trained in place, and left with the last epoch's weights, in
            evaluation mode.
        train_bags: Labelled bags; each is read once and kept as stored, on `device`. On a GPU without room for all,
            bags stay where they are and are moved there a step at a time.
        val_bags: Labelled bags that select the epoch.
        epochs: Passes over the training bags.
        learning_rate: Highest learning rate.
        min_learning_rate: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear rise from 0.
        weight_decay: AdamW's.
        seed: Of order, masks and dropout.
        batch_size: Bags a step; the loss is their mean. The last step of an epoch takes those that are left.
        device: Where to compute.
        score: Takes labels (S,) int64 and probabilities (S, C) float64 to metrics by name, with `f1_macro` and `auroc`.
        precision: How training steps compute, `choose_precision` says what suits a device.
        on_epoch: Called after each epoch with its record.
        state: A state that `checkpoint` was given, to go on from; the other arguments must be those of that run.
        checkpoint: Called after each epoch, before `on_epoch`, with all that resuming needs: tensors on the CPU and
            plain values, the caller's to keep.

    Returns:
        Best and last weights, the best epoch, and one record an epoch.

    Raises:
        ValueError: If a bag has no label or one that the model lacks, a set is empty, `batch_size` is below 1, the loss
            is not finite (naming bag and epoch), `score` lacks a metric that selection needs, or `state` is of another
            run.
    """
    device = torch.device(device)
    model.to(device)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    n_classes = model.options["n_classes"]
    on_device = _have_room((train_bags, val_bags), device)
    train = _load(train_bags, "train", n_classes, device, precision, on_device=on_device)
    val = _load(val_bags, "val", n_classes, device, "fp32", on_device=on_device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    order_generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator(device).manual_seed(another_seed(seed))
    run = {
        "model": {"name": model.name, **model.options},
        "epochs": epochs,
        "learning_rate": learning_rate,
        "min_learning_rate": min_learning_rate,
        "warmup_epochs": warmup_epochs,
        "weight_decay": weight_decay,
        "seed": seed,
        "batch_size": batch_size,
        "device": device.type,
        "precision": precision,
        "engine": "eager",
        "train_bags": len(train.bags),
        "val_bags": len(val.bags),
    }
    selection = Selection()
    if state is not None:
        check_same_run(state.get("run", {}), run)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order_generator.set_state(state["order_generator"])
        noise_generator.set_state(state["noise_generator"])
        selection = Selection.from_state(state)

    for epoch in range(len(selection.history), epochs):
        started = time.perf_counter()
        model.train()
        order = torch.randperm(len(train.bags), generator=order_generator).tolist()
        steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        losses = torch.zeros(len(steps), len(LOSS_TERMS), device=device)  # read once an epoch: reading waits for a GPU
        for step, indices in enumerate(steps):
            rate = learning_rate_at(
                epoch + step / len(steps),
                epochs=epochs,
                learning_rate=learning_rate,
                min_learning_rate=min_learning_rate,
                warmup_epochs=warmup_epochs,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            features, offsets, labels = train.pack(indices)
            out = model(features, offsets, generator=noise_generator)
            terms = model.loss(out, labels)
            total = terms.total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses[step] = torch.stack([term.detach() for term in (total, terms.bag, terms.branch, terms.diversity)])
        names = ["', '".join(train.slide_ids[index] for index in indices) for indices in steps]
        of_terms = mean_losses(losses, names, epoch)

        validation = _validate(model, val, score)
        record = EpochRecord(
            epoch=epoch,
            learning_rate=rate,
            train_loss=of_terms["total"],
            train_loss_bag=of_terms["bag"],
            train_loss_branch=of_terms["branch"],
            train_loss_diversity=of_terms["diversity"],
            val_loss=validation.loss,
            attention_entropy=validation.attention_entropy,
            attention_top10_mass=validation.attention_top10_mass,
            seconds=time.perf_counter() - started,
            val=validation.metrics,
        )
        selection.add(record, lambda: to_cpu(model.state_dict()))
        if checkpoint is not None:
            checkpoint(
                {
                    "run": run,
                    "model": to_cpu(model.state_dict()),
                    "optimizer": to_cpu(optimizer.state_dict()),
                    "order_generator": order_generator.get_state(),
                    "noise_generator": noise_generator.get_state(),
                    **selection.as_state(),
                }
            )
        if on_epoch is not None:
            on_epoch(record)
    return FitResult(selection.best_weights, to_cpu(model.state_dict()), selection.best_epoch, selection.history)


def learning_rate_at(
    epoch: float, *, epochs: int, learning_rate: float, min_learning_rate: float, warmup_epochs: float
) -> float:
    """Linear warm-up from 0, then a half cosine from `learning_rate` to `min_learning_rate`.

    `min + (lr − min) · ½ · (1 + cos(π · (e − w) / (epochs − w)))` from epoch w, the end of the warm-up, on.

    Args:
        epoch: Fractional epoch e, from 0.
        epochs: Where the cosine ends.
        learning_rate: Highest rate.
        min_learning_rate: Lowest rate of the cosine.
        warmup_epochs: w.

    Examples:
        >>> schedule = dict(epochs=100, learning_rate=1e-4, min_learning_rate=0.0, warmup_epochs=0)
        >>> learning_rate_at(0.0, **schedule), learning_rate_at(50.0, **schedule)
        (0.0001, 5e-05)
    """
    if epoch < warmup_epochs:
        return learning_rate * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_learning_rate + (learning_rate - min_learning_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))


def run_settings(job: "TrainingJob", *, device: torch.device, precision: Precision, engine: str) -> dict[str, Any]:
    """What a run must keep when it is resumed; `fit` writes the same by itself."""
    return {
        "model": {"name": job.model.name, **job.model.options},
        **{name: getattr(job, name) for name in _KEPT},
        "device": device.type,
        "precision": precision,
        "engine": engine,
        "train_bags": len(job.train_bags),
        "val_bags": len(job.val_bags),
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a state with other settings: the result would be that of neither run."""
    changed = [f"{name} {before.get(name)!r} → {value!r}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"a resumed run must keep its settings, changed: {', '.join(changed)}. Start a new run.")


def checked_bags(bags: "Iterable[Bag]", name: str, n_classes: int) -> "Iterator[Bag]":
    """The bags of a set one by one, refusing what cannot be trained on while the slide can still be named.

    Raises:
        ValueError: If there is no bag, or one has no tile, no label or one that the model lacks.
    """
    bag = None
    for bag in bags:
        if bag.label is None or not 0 <= bag.label < n_classes:
            raise ValueError(f"label of a {name} bag must be 0 to {n_classes - 1}, got {bag.label} ('{bag.slide_id}').")
        if len(bag.features) == 0:
            raise ValueError(f"bag '{bag.slide_id}' holds 0 tiles, need at least 1. Drop the slide from the cohort.")
        yield bag
    if bag is None:
        raise ValueError(f"{name} bags must be at least 1, got 0.")


def mean_losses(losses: Tensor, names: Sequence[str], epoch: int) -> dict[str, float]:
    """Mean of each term over the steps (S, 4); refuses a loss that is not finite, naming the first step's bags."""
    values = losses.cpu()
    bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        first, where = values[bad[0], 0].item(), names[bad[0]]
        raise ValueError(
            f"training loss must be finite, got {first} at bag '{where}' in epoch {epoch}. "
            "Look for NaN or very large features in that bag, or lower the learning rate."
        )
    return dict(zip(LOSS_TERMS, values.double().mean(dim=0).tolist(), strict=True))


def assess(logits: Tensor, spread: Tensor, labels: Tensor, slide_ids: Sequence[str], score: Score) -> Validation:
    """Judge an epoch by its validation bags.

    Args:
        logits: (S, C), on the CPU, as all tensors here.
        spread: (S, 2), normalised entropy and top-10 mass of the attention.
        labels: (S,) int64.
        slide_ids: S names.
        score: As `fit` takes it.

    Raises:
        ValueError: If a prediction is not finite, or `score` lacks a metric that selection needs.
    """
    logits = logits.double()
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        where = slide_ids[bad[0]]
        raise ValueError(f"prediction must be finite, got NaN or Inf for val bag '{where}'. Look into its features.")
    entropy, top_mass = spread.double().mean(dim=0).tolist()
    metrics = score(labels.numpy(), logits.softmax(dim=-1).numpy())
    missing = [name for name in SELECTION_METRICS if name not in metrics]
    if missing:
        raise ValueError(f"score must return {list(SELECTION_METRICS)}, which select the epoch, {missing} missing.")
    return Validation(
        loss=F.cross_entropy(logits, labels).item(),
        metrics={name: float(value) for name, value in metrics.items()},
        attention_entropy=entropy,
        attention_top10_mass=top_mass,
    )


def another_seed(seed: int) -> int:
    """A seed for masks and dropout whose stream has nothing to do with that of the order."""
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def to_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_cpu(item) for item in value]
    return value


@torch.no_grad()
def _validate(model: "MILModel", bags: _LoadedBags, score: Score) -> Validation:
    """Loss, metrics and spread of the attention over bags, in evaluation mode."""
    model.eval()
    logits, spread = [], []
    for index in range(len(bags.bags)):
        out = model(bags.features(index))
        logits.append(out.logits)  # (1, C)
        spread.append(_attention_spread(out.attention))
    return assess(torch.cat(logits).cpu(), torch.stack(spread).cpu(), bags.labels.cpu(), bags.slide_ids, score)


def _attention_spread(attention: Tensor | None) -> Tensor:
    """Normalised entropy and top-10 mass of the branches' mean attention of one bag (K, N)."""
    if attention is None:
        return torch.full((2,), math.nan)
    mean = attention.mean(dim=0)  # (N,)
    n_instances = mean.shape[0]
    top_mass = mean.topk(min(N_TOP, n_instances)).values.sum()
    if n_instances == 1:
        return torch.stack([torch.ones_like(top_mass), top_mass])  # one tile: attention is as even as it can be
    return torch.stack([torch.special.entr(mean).sum() / math.log(n_instances), top_mass])


def _have_room(sets: "Sequence[Sequence[Bag]]", device: torch.device) -> bool:
    """Whether all bags can be kept on the device beside what training needs."""
    if device.type != "cuda":
        return True
    needed = sum(bag.features.nbytes for bags in sets for bag in bags)
    return needed <= _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]


def _load(
    bags: "Sequence[Bag]", name: str, n_classes: int, device: torch.device, precision: Precision, *, on_device: bool
) -> _LoadedBags:
    """Read each bag once, if there is room; else the caller's are asked for them, which may read them from their files.

    One at a time: a bag that is mapped from its file keeps that file open.
    """
    features, lengths, labels, slide_ids = [], [], [], []
    for bag in checked_bags(bags, name, n_classes):
        if on_device:
            features.append(pad_rows(_as_computed(bag, device, precision)))
        lengths.append(len(bag.features))
        labels.append(bag.label)
        slide_ids.append(bag.slide_id)
    return _LoadedBags(
        features if on_device else bags, lengths, torch.tensor(labels, device=device), slide_ids, precision
    )


def _as_computed(bag: "Bag", device: torch.device, precision: Precision) -> Tensor:
    features = torch.from_numpy(np.array(bag.features))  # a copy: the file's map is read-only
    return as_computed(features.to(device), precision)
