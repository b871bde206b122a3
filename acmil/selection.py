"""What a run has done so far, and its best epoch: the same rule for every engine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

SELECTION_METRICS = ("f1_macro", "auroc")  # their sum selects the epoch


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
        seconds: Wall-clock time, validation included. Of runs that train together: the time that all took.
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


@dataclass
class Selection:
    """The epochs of a run and the best of them: highest validation `f1_macro + auroc`, ties by validation loss.

    Attributes:
        history: A record an epoch.
        best_epoch: The selected one, -1 before the first.
        best_score: Its sum of the metrics that select.
        best_loss: Its validation loss.
        best_weights: Its state dict, on the CPU.
    """

    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, record: EpochRecord, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Take an epoch in; `weights` is asked for a copy on the CPU if it is the best."""
        self.history.append(record)
        score = selection_score(record.val)
        if (score, -record.val_loss) > (self.best_score, -self.best_loss):
            self.best_epoch, self.best_score, self.best_loss = record.epoch, score, record.val_loss
            self.best_weights = weights()

    def as_state(self) -> dict[str, Any]:
        """Plain values and tensors on the CPU, for a state to resume from."""
        return {
            "history": [asdict(past) for past in self.history],
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "best_loss": self.best_loss,
            "best_weights": dict(self.best_weights),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Selection":
        """What `as_state` gave."""
        return cls(
            history=[EpochRecord(**record) for record in state["history"]],
            best_epoch=state["best_epoch"],
            best_score=state["best_score"],
            best_loss=state["best_loss"],
            best_weights=dict(state["best_weights"]),
        )


def selection_score(metrics: Mapping[str, float]) -> float:
    """Sum of the metrics that select the epoch; one that is not defined counts as 0."""
    return sum(metrics[name] for name in SELECTION_METRICS if not math.isnan(metrics[name]))
