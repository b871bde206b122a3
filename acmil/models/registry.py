"""The models by name."""

import difflib
import inspect
from typing import Any

from acmil.models.acmil_gated import ACMILGated
from acmil.models.acmil_multihead import ACMILMultiHead

_MODELS = {model.name: model for model in (ACMILGated, ACMILMultiHead)}


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted.

    Examples:
        >>> list_models()
        ['acmil_ga', 'acmil_mha']
    """
    return sorted(_MODELS)


def create_model(name: str, *, in_features: int, n_classes: int, **options: Any) -> ACMILGated | ACMILMultiHead:
    """Build a model with fresh weights, drawn from torch's global generator.

    `create_model(model.name, **model.options)` builds the same architecture again.

    Args:
        name: One of `list_models()`.
        in_features: D, size of an instance's features.
        n_classes: C.
        **options: Options of that model, such as `n_branches`, `mask_top_k`, `mask_ratio`, `hidden_features`.

    Returns:
        The model, in training mode, on the CPU.

    Raises:
        ValueError: If the name or an option is unknown, or an option is out of range.
    """
    if name not in _MODELS:
        raise ValueError(f"model must be one of {list_models()}, got {name!r}.{_nearest(name, list_models())}")
    model = _MODELS[name]
    allowed = list(inspect.signature(model.__init__).parameters)[1:]
    for option in options:
        if option not in allowed:
            raise ValueError(f"option of {name} must be one of {allowed}, got {option!r}.{_nearest(option, allowed)}")
    return model(in_features=in_features, n_classes=n_classes, **options)


def _nearest(given: str, known: list[str]) -> str:
    """A hint at the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
