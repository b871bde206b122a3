"""What the composed slides are and what they were composed with, so that a second demo does not compose them again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acmil import __version__
from acmil.preprocessing.atomic import write_text

FILE_NAME = "composed.json"


@dataclass(frozen=True)
class Manifest:
    """The files of one cohort.

    Attributes:
        options: All that decides their content.
        files: Path in the folder → sha256 (hex).
    """

    options: Mapping[str, Any]
    files: Mapping[str, str]

    def whole(self, folder: Path) -> set[str]:
        """The files that are in the folder as they were written."""
        return {name for name, digest in self.files.items() if _digest(folder / name) == digest}


def composing_options(source_slide: Path, *, n_slides: int, difficulty: float, seed: int) -> dict[str, Any]:
    """All that decides the content of the slides: options, the source, and the code, by version and by content."""
    code = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        code.update(module.read_bytes())
    return {
        "n_slides": n_slides,
        "difficulty": difficulty,
        "seed": seed,
        "source": _digest(source_slide),
        "version": __version__,
        "code": code.hexdigest(),
    }


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None where there is none that can be read."""
    try:
        return Manifest(**json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(folder: Path, options: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write the manifest of files that are whole, in one step."""
    digests = {name: digest for name in files if (digest := _digest(folder / name)) is not None}
    write_text(folder / FILE_NAME, json.dumps(asdict(Manifest(dict(options), digests)), indent=1) + "\n")


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
