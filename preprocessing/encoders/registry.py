"""The registry of encoders: looking one up, telling about it, and what its tiles should be like. Needs no torch."""

import difflib
import re

from acmil.preprocessing.encoders.facts import EncoderError, EncoderFacts
from acmil.preprocessing.encoders.foreign import FOREIGN
from acmil.preprocessing.encoders.natural import NATURAL
from acmil.preprocessing.encoders.pathology import PATHOLOGY

REGISTRY: tuple[EncoderFacts, ...] = (*PATHOLOGY, *FOREIGN, *NATURAL)
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_MPP_TOLERANCE = 0.1  # relative; scanners' pixels of one nominal magnification differ by about that


def list_encoders() -> tuple[EncoderFacts, ...]:
    """Every encoder that is known: pathology's first, then those that need another package, then natural images'."""
    return REGISTRY


def find_encoder(name: str) -> EncoderFacts | None:
    """Look an encoder up.

    Args:
        name: Its name or an alias, in any case, with hyphens, dots or spaces for underscores; or its Hugging Face id
            after "hf-hub:".

    Returns:
        What is known of it, None if it is not in the registry.
    """
    if name.startswith(HUB_PREFIXES):
        hub_id = name[len(HUB_PREFIXES[0]) :].lower()
        whole = (facts for facts in REGISTRY if facts.feature != "layer3_pooled")  # asked for by its id it is not cut
        return next((facts for facts in whole if (facts.hub_id or "").lower() == hub_id), None)
    wanted = _plain(name)
    return next((facts for facts in REGISTRY if wanted in (facts.name, *facts.aliases)), None)


def encoder_facts(name: str) -> EncoderFacts:
    """Look an encoder up as `find_encoder` does, and refuse a name that is not in the registry.

    Raises:
        EncoderError: If it is not there; the message names the nearest.
    """
    facts = find_encoder(name)
    if facts is None:
        known = [facts.name for facts in REGISTRY]
        close = difflib.get_close_matches(_plain(name), known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`acmil encoders list` shows them."
        raise EncoderError(
            f"encoder must be one of the registry's {len(known)}, got {name!r}. {hint} "
            "`acmil preprocess --encoder` takes any other timm model as well."
        )
    return facts


def tile_advice(facts: EncoderFacts, *, tile_px: int, tile_mpp: float) -> list[str]:
    """Say where tiles differ from what an encoder was made for.

    Args:
        facts: The encoder.
        tile_px: Side of the tiles in px.
        tile_mpp: Resolution of the tiles in µm/px.

    Returns:
        One sentence a difference: a resolution more than 10 % off, or a size that is resized and not recommended.
    """
    advice = []
    if facts.tile_mpp is not None and abs(tile_mpp - facts.tile_mpp) > _MPP_TOLERANCE * facts.tile_mpp:
        advice.append(f"encoder {facts.name} is recommended at {facts.tile_mpp:g} µm/px, tile_mpp is {tile_mpp:g}.")
    side_px = facts.resize_px or facts.input_px
    if facts.is_fixed_size and tile_px not in (side_px, facts.tile_px):
        recommended = facts.tile_px or side_px
        advice.append(
            f"encoder {facts.name} is recommended on tiles of {recommended} px, tile_px is {tile_px}: "
            f"they are resized to {side_px} px."
        )
    return advice


def access_help(facts: EncoderFacts) -> str:
    """Say how to get an encoder's weights, and how to give them from a file."""
    by_file = "give it with --weights FILE"
    if facts.hub_id is None:
        return f"Its weights are not on the Hugging Face hub: fetch them from {facts.weights_page} and {by_file}."
    files = " or ".join(facts.hub_files)
    if facts.is_gated:
        return (
            f"Access is gated: log in at {facts.weights_page}, accept the terms ({facts.licence}), then run "
            f"`hf auth login` here; or fetch {files} there and {by_file}."
        )
    return f"Where there is a network, fetch {files} from {facts.weights_page} and {by_file}."


def foreign_help(facts: EncoderFacts) -> str:
    """Say what an encoder needs that is not built here, and what to do instead."""
    return (
        f"encoder {facts.name!r} needs the package {facts.package!r}, got timm alone. {facts.notes} "
        f"Weights: {facts.weights_page} ({facts.licence}{', gated' if facts.is_gated else ''}). "
        "Extract its features with a tool that has that package, and bring them with `acmil features convert`."
    )


def _plain(name: str) -> str:
    return re.sub(r"[-. ]+", "_", name.strip().lower())
