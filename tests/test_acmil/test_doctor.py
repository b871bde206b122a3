"""What `acmil doctor` says of machines: this one, and others as they would look."""

import builtins
import os

import pytest
import torch

from acmil import doctor
from acmil.cli import run_command_line
from acmil.preprocessing import devices
from acmil.preprocessing.readers import tiff


def finding(what: str) -> doctor.Finding:
    (found,) = [row for row in doctor.examine().findings if row.what == what]
    return found


def test_the_command_shows_every_row_of_this_machine(capsys):
    assert run_command_line(["doctor"]) == 0
    text = capsys.readouterr().out
    for what in (
        *("Python", "packages", "cores", "memory", "processor", "GPU", "training", "OpenSlide", "JPEG tiles"),
        *("cuCIM", "allocator", "open files", "cache"),
    ):
        assert sum(line.startswith(f"{what} ") for line in text.splitlines()) == 1, what
    assert torch.__version__ in text
    assert "BROKEN" not in text


@pytest.mark.parametrize(
    ("flags", "precision", "level"), [("avx2 avx512_bf16", "bf16", "ok"), ("avx2", "fp32", "slow")]
)
def test_the_precision_is_the_one_that_encoders_take(tmp_path, monkeypatch, flags, precision, level):
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(devices, "_CPU_INFO", info)
    row = finding("processor")
    assert row.level == level
    assert f"compute in {precision}" in row.meaning


@pytest.mark.parametrize(
    ("cuda", "has_device", "visible", "found"),
    [
        (None, False, None, "none"),
        (None, True, None, "not used"),
        ("13.0", True, "", "hidden"),
        ("13.0", True, None, "not usable"),
    ],
)
def test_why_there_is_no_gpu(tmp_path, monkeypatch, cuda, has_device, visible, found):
    device = tmp_path / "nvidia0"
    if has_device:
        device.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_NVIDIA_DEVICE", device)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    row = finding("GPU")
    assert (row.found, row.level) == (found, "slow")


def test_a_container_that_may_use_fewer_cores_than_it_sees(tmp_path, monkeypatch):
    limit = tmp_path / "cpu.max"
    limit.write_text("150000 100000\n")
    monkeypatch.setattr(doctor, "_CPU_LIMIT", limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    row = finding("cores")
    assert row.level == "slow"
    assert "1.5" in row.meaning
    assert "--workers 2" in row.meaning
    limit.write_text("max 100000\n")
    assert finding("cores").level == "ok"


def test_tiles_that_are_not_decoded_directly_are_slow(monkeypatch):
    monkeypatch.setattr(tiff, "VENDORS", ())
    row = finding("JPEG tiles")
    assert (row.found, row.level) == ("OpenSlideReader", "slow")


def test_without_openslide_the_status_is_1(monkeypatch, capsys):
    import_module = builtins.__import__

    def without(name, *arguments, **options):
        if name == "openslide":
            raise ImportError("no OpenSlide library")
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run_command_line(["doctor"]) == 1
    assert "BROKEN: slides cannot be opened: no OpenSlide library. pip install openslide-bin" in capsys.readouterr().out
