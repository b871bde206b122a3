"""Slides to features: reading, tissue, tiles, encoders and the feature-file format."""

from importlib import import_module
from typing import Any

# Imported when first asked for, so that a part (the feature-file format, say) can be used without OpenSlide or timm.
_HOMES = {
    "Slide": "slide",
    "SlideError": "slide",
    "find_tissue": "tissue",
    "tile_grid": "tiling",
    "create_encoder": "encoders",
    "preprocess": "job",
}

__all__ = ["Slide", "SlideError", "create_encoder", "find_tissue", "preprocess", "tile_grid"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
