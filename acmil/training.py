"""The training loop: the reference's recipe, one bag a step, read once from top to bottom in `fit`."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from acmil.bags import Bag
    from acmil.models.protocol import MILModel

logger = logging.getLogger(__name__)

Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]

SELECTION_METRICS = ("f1_macro", "auroc")  # their sum selects the epoch
LOSS_TERMS = ("total", "bag", "branch", "diversity")
N_TOP = 10  # tiles whose share of the attention is recorded


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: Counted from 0.
        learning_rate: Of the last step.
        train_loss: Mean over the epoch's steps of the total loss; the terms follow.
        train_loss_bag: Cross entropy of the prediction.
        train_loss_branch: Cross entropy of the branches.
        train_loss_diversity: Similarity of the branches' attention.
        val_loss: Cross entropy of the prediction, mean over the validation bags.
        attention_entropy: Mean over the validation bags of the entropy of the branches' mean attention, divided by
            log N: 1 is even attention, 0 a single tile. NaN for a model without attention.
        attention_top10_mass: Mean over the validation bags of the attention on the 10 most attended tiles.
        seconds: Wall-clock time, validation included.
        val: What `score` returned for the validation bags, by name.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_loss_bag: float
    train_loss_branch: float
    train_loss_diversity: float
    val_loss: float
    attention_entropy: float
    attention_top10_mass: float
    seconds: float
    val: dict[str, float] = field(default_factory=dict)

    def as_row(self) -> dict[str, float]:
        """All values flat, those of `val` as `val_<metric>`; `val_loss` is the record's own."""
        row = {name: value for name, value in asdict(self).items() if name != "val"}
        return row | {f"val_{name}": value for name, value in self.val.items() if name != "loss"}


class FitResult(NamedTuple):
    """What training leaves: state dicts on the CPU, and the history."""

    best_weights: dict[str, Tensor]
    last_weights: dict[str, Tensor]
    best_epoch: int
    history: list[EpochRecord]


class _LoadedBags(NamedTuple):
    """Bags as tensors on the device, with the dtype they were stored in."""

    features: list[Tensor]  # S of (N, D)
    labels: Tensor  # (S,) int64
    slide_ids: list[str]


class _Validation(NamedTuple):
    loss: float
    metrics: dict[str, float]
    attention_entropy: float
    attention_top10_mass: float


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
    device: torch.device | str,
    score: Score,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    state: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train a model: AdamW, one bag a step, the learning rate set before every step, the best epoch kept.

    The selected epoch has the highest validation `f1_macro + auroc`. Where epochs tie, which is common with few
    validation bags, the one with the lower validation loss is taken (the reference implementation takes the first); a
    metric that is not defined (NaN) counts as 0.

    Order, masks and dropout come from generators of this function's own: torch's global one is neither read nor
    changed. The model's weights are the caller's: build it under a seed. A run that was stopped and resumed from a
    state gives bit for bit the weights and history of one that was not (`seconds` apart).

    Args:
        model: Made by `create_model`; trained in place, and left with the last epoch's weights, in
            evaluation mode.
        train_bags: Labelled bags; each is read once and kept as stored, on `device`.
        val_bags: Labelled bags that select the epoch.
        epochs: Passes over the training bags.
        learning_rate: Highest learning rate.
        min_learning_rate: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear rise from 0.
        weight_decay: AdamW's.
        seed: Of order, masks and dropout.
        device: Where to compute.
        score: Takes labels (S,) int64 and probabilities (S, C) float64 to metrics by name, with `f1_macro` and `auroc`.
        on_epoch: Called after each epoch with its record.
        state: A state that `checkpoint` was given, to go on from; the other arguments must be those of that run.
        checkpoint: Called after each epoch, before `on_epoch`, with all that resuming needs: tensors on the CPU and
            plain values, the caller's to keep.

    Returns:
        Best and last weights, the best epoch, and one record an epoch.

    Raises:
        ValueError: If a bag has no label or one that the model lacks, a set is empty, the loss is not finite (naming
            bag and epoch), `score` lacks a metric that selection needs, or `state` is of another run.
    """
    device = torch.device(device)
    model.to(device)
    n_classes = model.options["n_classes"]
    train, val = _load(train_bags, "train", n_classes, device), _load(val_bags, "val", n_classes, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    order_generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator(device).manual_seed(_another_seed(seed))
    run = {
        "model": {"name": model.name, **model.options},
        "epochs": epochs,
        "learning_rate": learning_rate,
        "min_learning_rate": min_learning_rate,
        "warmup_epochs": warmup_epochs,
        "weight_decay": weight_decay,
        "seed": seed,
        "device": device.type,
        "train_bags": len(train.features),
        "val_bags": len(val.features),
    }
    history: list[EpochRecord] = []
    best_epoch, best_score, best_loss = -1, -math.inf, math.inf
    best_weights: dict[str, Tensor] = {}
    if state is not None:
        _check_same_run(state.get("run", {}), run)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order_generator.set_state(state["order_generator"])
        noise_generator.set_state(state["noise_generator"])
        history = [EpochRecord(**record) for record in state["history"]]
        best_epoch, best_score, best_loss = state["best_epoch"], state["best_score"], state["best_loss"]
        best_weights = dict(state["best_weights"])

    for epoch in range(len(history), epochs):
        started = time.perf_counter()
        model.train()
        order = torch.randperm(len(train.features), generator=order_generator).tolist()
        losses = torch.zeros(len(order), len(LOSS_TERMS), device=device)  # read once an epoch: reading waits for a GPU
        for step, index in enumerate(order):
            rate = learning_rate_at(
                epoch + step / len(order),
                epochs=epochs,
                learning_rate=learning_rate,
                min_learning_rate=min_learning_rate,
                warmup_epochs=warmup_epochs,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = model.loss(model(train.features[index], generator=noise_generator), train.labels[index : index + 1])
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            losses[step] = torch.stack([getattr(terms, name).detach() for name in LOSS_TERMS])
        mean_losses = _mean_losses(losses, [train.slide_ids[index] for index in order], epoch)

        validation = _validate(model, val, score)
        record = EpochRecord(
            epoch=epoch,
            learning_rate=rate,
            train_loss=mean_losses["total"],
            train_loss_bag=mean_losses["bag"],
            train_loss_branch=mean_losses["branch"],
            train_loss_diversity=mean_losses["diversity"],
            val_loss=validation.loss,
            attention_entropy=validation.attention_entropy,
            attention_top10_mass=validation.attention_top10_mass,
            seconds=time.perf_counter() - started,
            val=validation.metrics,
        )
        history.append(record)
        epoch_score = selection_score(validation.metrics)
        if (epoch_score, -validation.loss) > (best_score, -best_loss):
            best_epoch, best_score, best_loss = epoch, epoch_score, validation.loss
            best_weights = _to_cpu(model.state_dict())
        if checkpoint is not None:
            checkpoint(
                {
                    "run": run,
                    "model": _to_cpu(model.state_dict()),
                    "optimizer": _to_cpu(optimizer.state_dict()),
                    "order_generator": order_generator.get_state(),
                    "noise_generator": noise_generator.get_state(),
                    "history": [asdict(past) for past in history],
                    "best_epoch": best_epoch,
                    "best_score": best_score,
                    "best_loss": best_loss,
                    "best_weights": dict(best_weights),
                }
            )
        if on_epoch is not None:
            on_epoch(record)
    return FitResult(best_weights, _to_cpu(model.state_dict()), best_epoch, history)


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


def selection_score(metrics: Mapping[str, float]) -> float:
    """Sum of the metrics that select the epoch; one that is not defined counts as 0."""
    return sum(metrics[name] for name in SELECTION_METRICS if not math.isnan(metrics[name]))


@torch.no_grad()
def _validate(model: "MILModel", bags: _LoadedBags, score: Score) -> _Validation:
    """Loss, metrics and spread of the attention over bags, in evaluation mode."""
    model.eval()
    logits, spread = [], []
    for features in bags.features:
        out = model(features)
        logits.append(out.logits)  # (1, C)
        spread.append(_attention_spread(out.attention))
    all_logits = torch.cat(logits).double()  # (S, C)
    bad = (~torch.isfinite(all_logits).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        where = bags.slide_ids[bad[0]]
        raise ValueError(f"prediction must be finite, got NaN or Inf for val bag '{where}'. Look into its features.")
    entropy, top_mass = torch.stack(spread).double().mean(dim=0).tolist()
    metrics = score(bags.labels.cpu().numpy(), all_logits.softmax(dim=-1).cpu().numpy())
    missing = [name for name in SELECTION_METRICS if name not in metrics]
    if missing:
        raise ValueError(f"score must return {list(SELECTION_METRICS)}, which select the epoch, {missing} missing.")
    return _Validation(
        loss=F.cross_entropy(all_logits, bags.labels).item(),
        metrics={name: float(value) for name, value in metrics.items()},
        attention_entropy=entropy,
        attention_top10_mass=top_mass,
    )


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


def _mean_losses(losses: Tensor, slide_ids: Sequence[str], epoch: int) -> dict[str, float]:
    """Mean of each term over the steps (S, 4); refuses a loss that is not finite, naming the first bag that had it."""
    values = losses.cpu()
    bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        first, where = values[bad[0], 0].item(), slide_ids[bad[0]]
        raise ValueError(
            f"training loss must be finite, got {first} at bag '{where}' in epoch {epoch}. "
            "Look for NaN or very large features in that bag, or lower the learning rate."
        )
    return dict(zip(LOSS_TERMS, values.double().mean(dim=0).tolist(), strict=True))


def _load(bags: "Sequence[Bag]", name: str, n_classes: int, device: torch.device) -> _LoadedBags:
    """Read each bag once; labels are checked here, where the slide can still be named."""
    features, labels, slide_ids = [], [], []
    for bag in bags:
        if bag.label is None or not 0 <= bag.label < n_classes:
            raise ValueError(f"label of a {name} bag must be 0 to {n_classes - 1}, got {bag.label} ('{bag.slide_id}').")
        if len(bag.features) == 0:
            raise ValueError(f"bag '{bag.slide_id}' holds 0 tiles, need at least 1. Drop the slide from the cohort.")
        features.append(torch.from_numpy(np.array(bag.features)).to(device))  # a copy: the file's map is read-only
        labels.append(bag.label)
        slide_ids.append(bag.slide_id)
    if not features:
        raise ValueError(f"{name} bags must be at least 1, got 0.")
    return _LoadedBags(features, torch.tensor(labels, device=device), slide_ids)


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a state with other settings: the result would be that of neither run."""
    changed = [f"{name} {before.get(name)!r} → {value!r}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"a resumed run must keep its settings, changed: {', '.join(changed)}. Start a new run.")


def _another_seed(seed: int) -> int:
    """A seed for masks and dropout whose stream has nothing to do with that of the order."""
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def _to_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return value
