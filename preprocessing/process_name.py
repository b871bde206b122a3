"""A name for this process that no other has on any machine, and that tells on the same one whether it has ended."""

import hashlib
import os
import re
import secrets
import socket
from functools import cache
from pathlib import Path

_FORM = re.compile(r"[0-9a-f]{12}-[0-9]+-[0-9]+-[0-9a-f]{8}")
_PROC = Path("/proc")
_ENDED_STATES = "ZX"  # a killed process that its parent has not asked after yet, and one just going


def process_name() -> str:
    """Name this process: machine, process number, when it began, and a few random letters; letters, digits, hyphens."""
    return f"{_machine()}-{os.getpid()}-{_began(os.getpid()) or 0}-{_random_letters(os.getpid())}"


def is_process_name(name: str) -> bool:
    """Whether a name has the form of those that `process_name` gives."""
    return _FORM.fullmatch(name) is not None


def has_ended(name: str) -> bool:
    """Whether the process of that name is known to have ended; False for one of another machine, which cannot be told.

    A process number says nothing beyond its machine and its container, and numbers come again: all three are compared.
    """
    machine, _, rest = name.partition("-")
    number, _, rest = rest.partition("-")
    began = rest.partition("-")[0]
    if machine != _machine() or not number.isdigit() or not _can_tell():
        return False
    return (_began(int(number)) or "") != began


@cache
def _machine() -> str:
    """What tells machines, their starts and the containers on them apart."""
    facts = [socket.gethostname()]
    if _can_tell():
        facts += [(_PROC / "sys/kernel/random/boot_id").read_text(), str((_PROC / "self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


@cache
def _can_tell() -> bool:
    """Whether the system is a Linux that shows its processes."""
    try:
        (_PROC / "self/ns/pid").readlink()
        return (_PROC / "sys/kernel/random/boot_id").is_file() and _began(os.getpid()) is not None
    except OSError:
        return False


@cache
def _random_letters(_number: int) -> str:
    return secrets.token_hex(4)


def _began(number: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is none."""
    try:
        fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()  # a name may hold anything
    except OSError:
        return None
    return None if fields[0] in _ENDED_STATES else fields[19]
