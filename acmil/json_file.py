"""JSON files that any reader takes: no NaN, written whole."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acmil.preprocessing.atomic import write_text


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; numbers that are not defined (NaN) and infinities become null."""
    write_text(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(item) for item in value]
    return value
