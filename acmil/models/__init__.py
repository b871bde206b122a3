"""Multiple instance learning models: `create_model(name, in_features=…, n_classes=…)`.

The names below load on first use, so that `acmil.models.defaults` can be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acmil.models.output import MILOutput
    from acmil.models.protocol import MILModel
    from acmil.models.reference_checkpoint import load_reference_checkpoint
    from acmil.models.registry import create_model, list_models

__all__ = ["MILModel", "MILOutput", "create_model", "list_models", "load_reference_checkpoint"]

_HOMES = {
    "MILModel": "acmil.models.protocol",
    "MILOutput": "acmil.models.output",
    "create_model": "acmil.models.registry",
    "list_models": "acmil.models.registry",
    "load_reference_checkpoint": "acmil.models.reference_checkpoint",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
