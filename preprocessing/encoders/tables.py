"""The registry as text: a row an encoder, and a page on one."""

from collections.abc import Sequence

from acmil.preprocessing.encoders.facts import EncoderFacts
from acmil.preprocessing.encoders.registry import access_help

_COLUMNS = ("name", "network", "features", "tile", "built by", "access", "licence")
_FEATURES = {
    "pooled": "the network's own pooling",
    "layer3_pooled": "mean over the third stage, the fourth is left out",
    "class_token": "class token",
    "class_and_mean_patch": "class token, then the mean of the patch tokens",
}


def encoder_table(encoders: Sequence[EncoderFacts]) -> str:
    """Write a table of encoders, one a line, columns aligned."""
    rows = [_COLUMNS, *(_row(facts) for facts in encoders)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def encoder_page(facts: EncoderFacts) -> str:
    """Write all that is known of one encoder, a fact a line."""
    lines = {
        "published by": facts.organisation,
        "network": facts.architecture,
        "built by": facts.package if facts.timm_name is None else f"timm, {facts.timm_name}",
        "arguments": ", ".join(f"{name}={value}" for name, value in facts.timm_kwargs.items()),
        "input": _input(facts),
        "mean, std": f"{_channels(facts.mean)}, {_channels(facts.std)}",
        "feature": f"{_FEATURES[facts.feature]}, {facts.n_features} numbers",
        "tile": _tile(facts),
        "licence": facts.licence,
        "weights": facts.weights_page,
        "access": access_help(facts) if facts.is_built_here else f"gated: {'yes' if facts.is_gated else 'no'}",
        "source": facts.source,
        "confirmed": facts.confirmed,
        "unconfirmed": "; ".join(facts.unconfirmed),
        "notes": facts.notes,
    }
    return "\n".join([facts.name, *(f"  {name + ':':<14} {text}" for name, text in lines.items() if text)])


def _row(facts: EncoderFacts) -> tuple[str, ...]:
    access = "gated" if facts.is_gated else "open"
    return (
        *(facts.name, facts.architecture, str(facts.n_features), _tile(facts), facts.package, access),
        facts.licence,
    )


def _tile(facts: EncoderFacts) -> str:
    if facts.tile_px is None:
        return "any"
    return f"{facts.tile_px} px at {facts.tile_mpp:g} µm/px"


def _input(facts: EncoderFacts) -> str:
    if not facts.is_fixed_size:
        return f"{facts.input_px} px, takes any size"
    if facts.resize_px not in (None, facts.input_px):
        return f"the centre {facts.input_px} px of tiles resized to {facts.resize_px} px ({facts.interpolation})"
    return f"tiles resized to {facts.input_px} px ({facts.interpolation})"


def _channels(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
