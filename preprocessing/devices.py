"""The choice of a device, one for preprocessing and training."""

import torch


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
