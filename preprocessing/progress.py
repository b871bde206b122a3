"""How long work tells its caller how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Told of the steps of a long task; a terminal draws bars with it, a notebook widgets, a log lines."""

    def begin(self, title: str, total: int | None) -> None:
        """Start a task of `total` steps, or of a number that is not known yet."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more steps as done; `note` says in a few words what the last one was."""

    def end(self) -> None:
        """Finish the task that was begun last."""


class SilentProgress:
    """A `Progress` that says nothing."""

    def begin(self, title: str, total: int | None) -> None:
        """Do nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
