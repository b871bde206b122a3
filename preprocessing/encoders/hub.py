"""Fetching an encoder's weights from the Hugging Face hub, or its cache."""

import logging
from pathlib import Path

from acmil.preprocessing.encoders.facts import EncoderError, EncoderFacts
from acmil.preprocessing.encoders.registry import access_help

logger = logging.getLogger(__name__)


def fetch_weights(facts: EncoderFacts) -> Path:
    """Fetch the file of an encoder's weights, or take it from the cache.

    Args:
        facts: The encoder.

    Returns:
        The file.

    Raises:
        EncoderError: If it is not to be had: the message says how to get access, and how to give a file.
    """
    if facts.hub_id is None:
        raise EncoderError(f"encoder {facts.name!r} must be given its weights, got none. {access_help(facts)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger.info("encoder %s: weights of %s, or from the cache", facts.name, facts.weights_page)
    reason: OSError = FileNotFoundError("none of its files is there")
    for name in facts.hub_files:
        try:
            return Path(hf_hub_download(facts.hub_id, name))
        except OSError as error:
            reason = error
            if not isinstance(error, EntryNotFoundError):  # another file name would be refused as well
                break
    first_line = str(reason).strip().partition("\n")[0]
    raise EncoderError(
        f"encoder {facts.name!r} could not be had from {facts.weights_page}: {first_line} {access_help(facts)}"
    ) from reason
