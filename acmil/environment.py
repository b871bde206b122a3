"""What a result depends on beside its options: versions, git commit, machine."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "timm", "numpy", "scikit-learn", "umap-learn", "openslide-python", "openslide-bin")


def describe() -> dict[str, Any]:
    """Versions of the packages that results depend on, the commit of the source tree if any, and the machine."""
    from acmil import __version__

    return {
        "versions": {
            "acmil": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "git_commit": _commit(),
        "machine": describe_machine(),
    }


def describe_machine() -> str:
    """The processor, and the GPU if there is one, in one line."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{processor_name()}, {torch.get_num_threads()} threads{gpu}"


def processor_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the tree that this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
