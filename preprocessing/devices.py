"""The choice of a device, one for preprocessing and training."""

from pathlib import Path

import torch

_CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


class DeviceError(ValueError):
    """A device that this machine, or this build of torch, does not have."""


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is there.

    Args:
        name: `auto` takes a GPU if there is one.

    Raises:
        DeviceError: If the name is none of these, or a GPU is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} must be there, found {torch.cuda.device_count()} GPUs. Use --device cpu, or auto."
        )
    return device


def cpu_flags() -> frozenset[str]:
    """The instruction sets that the CPU names; empty where the system does not say (only Linux on x86 does)."""
    if not _CPU_INFO.is_file():
        return frozenset()
    flags = next((line for line in _CPU_INFO.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(flags.split())


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself: emulated, bf16 is slower than fp32."""
    return not _CPU_BF16_FLAGS.isdisjoint(cpu_flags())
