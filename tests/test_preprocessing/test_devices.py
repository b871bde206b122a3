"""The choice of a device."""

import pytest
import torch

from acmil.preprocessing.devices import DeviceError, choose_device


def test_devices_that_are_there():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_devices_that_are_not():
    with pytest.raises(DeviceError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        choose_device("gpu")
    with pytest.raises(DeviceError, match=r"device 'cuda:99' must be there, found \d+ GPUs"):
        choose_device("cuda:99")
