"""What training, evaluation and figures ask of a model."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from acmil.losses import Losses
from acmil.models.output import MILOutput


class MILModel(Protocol):
    """A `torch.nn.Module` that takes packed bags.

    Attributes:
        name: What `create_model` knows it by.
        options: Plain values; `create_model(name, **options)` builds the same architecture.
    """

    name: str
    options: dict[str, Any]

    def __call__(
        self, features: Tensor, offsets: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> MILOutput:
        """Predict packed bags."""

    def hidden(self, features: Tensor) -> Tensor:
        """Instance features (N, L) that the attention works on."""

    def loss(self, out: MILOutput, labels: Tensor) -> Losses:
        """Named loss terms."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As in `torch.nn.Module`, like all that follow."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102
    def to(self, device: torch.device) -> Any: ...  # noqa: D102
    def train(self) -> Any: ...  # noqa: D102
    def eval(self) -> Any: ...  # noqa: D102
