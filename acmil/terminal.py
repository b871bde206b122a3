"""What a person sees while a command runs: bars on a terminal, plain log lines when piped."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

logger = logging.getLogger(__name__)

_console = Console(stderr=True)
_LINE_INTERVAL_SECONDS = 10.0


def configure_logging(*, quiet: bool) -> None:
    """Send the library's log to stderr: coloured on a terminal, plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=_console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("acmil").setLevel(logging.WARNING if quiet else logging.INFO)


class TerminalProgress:
    """The reporter of the command line; fits `acmil.preprocessing.progress.Progress`."""

    def __init__(self, *, quiet: bool) -> None:
        self._bars = (
            None
            if quiet or not sys.stderr.isatty()
            else Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=_console,
            )
        )
        self._lines = not quiet
        self._task: TaskID | None = None
        self._total: int | None = None
        self._title, self._done, self._shown = "", 0, 0.0

    def __enter__(self) -> "TerminalProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, title: str, total: int | None) -> None:
        """Begin one stage of `total` steps (None: not known)."""
        self._title, self._total, self._done, self._shown = title, total, 0, time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(title, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more as done."""
        self._done += steps
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=steps, note=note)
        elif self._lines and time.monotonic() - self._shown > _LINE_INTERVAL_SECONDS:
            self._shown = time.monotonic()
            logger.info("%s: %d of %s %s", self._title, self._done, self._total or "?", note)

    def end(self) -> None:
        """End the stage."""
        if self._bars is None and self._lines:
            logger.info("%s: %d done", self._title, self._done)
        self._task = None
