"""Fetching an encoder's weights from the Hugging Face hub, or its cache."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
    logger.info("encoder %s: weights of %s, or from the cache", facts.name, facts.weights_page)
    try:
        with hub_or_cache():
            return _first_file(facts.hub_id, facts.hub_files)
    except OSError as error:
        reason = error
    first_line = str(reason).strip().partition("\n")[0]
    raise EncoderError(
        f"encoder {facts.name!r} could not be had from {facts.weights_page}: {first_line} {access_help(facts)}"
    ) from reason


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within the block, have the hub's library use its cache alone if the hub cannot be reached.

    By itself it tries six times for each file name a model may have, most of a minute in all, and then looks into its
    cache. Whether the hub can be reached is asked once, by a connection to it, with the library's own limit for an
    answer (HF_HUB_ETAG_TIMEOUT, 10 s): a slow network is given as long as by the library. Through a proxy it is not
    asked. HF_HUB_OFFLINE holds as it does without this.

    Raises:
        ConnectionError: If the hub cannot be reached, and what the block asks for is not in the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    obstacle = None if constants.HF_HUB_OFFLINE else _obstacle(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    if obstacle is None:
        yield
        return
    logger.info("%s cannot be reached (%s): looking into the cache alone", constants.ENDPOINT, obstacle)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"it cannot be reached ({obstacle}), and is not in the cache.") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _first_file(hub_id: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    reason: OSError = FileNotFoundError("none of its files is there")
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name))
        except OSError as error:
            reason = error
            if not isinstance(error, EntryNotFoundError):  # another file name would be refused as well
                break
    raise reason


def _obstacle(address: str, timeout_seconds: float) -> OSError | None:
    """Why no connection to a web address can be made; None if it can, or if a proxy is asked to make it."""
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    proxies = getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not proxy_bypass(host):
        return None
    try:
        socket.create_connection((host, port), timeout_seconds).close()
    except OSError as error:
        return error
    return None
