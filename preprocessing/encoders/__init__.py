"""Encoders: networks that turn tiles into features, and the registry of what is known of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acmil.preprocessing.encoders.facts import EncoderError, EncoderFacts
    from acmil.preprocessing.encoders.registry import find_encoder, list_encoders
    from acmil.preprocessing.encoders.timm_encoder import Encoder, create_encoder

# Imported when first asked for: the registry can be read without torch.
_HOMES = {
    "Encoder": "timm_encoder",
    "EncoderError": "facts",
    "EncoderFacts": "facts",
    "create_encoder": "timm_encoder",
    "find_encoder": "registry",
    "list_encoders": "registry",
}

__all__ = ["Encoder", "EncoderError", "EncoderFacts", "create_encoder", "find_encoder", "list_encoders"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
