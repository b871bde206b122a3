"""What this machine has, which path each stage will take on it, and what will be slow and why."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

Level = Literal["ok", "note", "slow", "broken"]

_PACKAGES = ("torch", "timm", "numpy", "h5py", "opencv-python-headless", "scikit-learn", "umap-learn")
_FEWEST_OPEN_FILES = 1024
_LEAST_FREE_GB = 5.0
_NVIDIA_DEVICE = Path("/dev/nvidia0")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, what it means, and how bad that is."""

    what: str
    found: str
    meaning: str
    level: Level = "ok"


@dataclass(frozen=True)
class Diagnosis:
    """The rows of `acmil doctor`."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> int:
        """Number of rows on which something does not work."""
        return sum(finding.level == "broken" for finding in self.findings)

    def __str__(self) -> str:
        marks = {"ok": "", "note": "note: ", "slow": "SLOW: ", "broken": "BROKEN: "}
        width = max(len(row.what) for row in self.findings)
        lines = []
        for row in self.findings:
            lines.append(f"{row.what:<{width}}  {row.found}")
            if row.meaning:
                lines.append(f"{'':<{width}}  {marks[row.level]}{row.meaning}")
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Look at the machine: nothing is changed, nothing is fetched."""
    looks: tuple[Callable[[], Finding], ...] = (
        *(_python, _packages, _cores, _memory, _processor, _gpu, _training),
        *(_openslide, _jpeg, _cucim, _allocator, _open_files, _cache),
    )
    return Diagnosis(tuple(look() for look in looks))


def _python() -> Finding:
    return Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", "")


def _packages() -> Finding:
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, found in versions.items() if found is None]
    found = ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None)
    if missing:
        return Finding("packages", found, f"missing: {', '.join(missing)}. pip install acmil anew", "broken")
    return Finding("packages", found, "")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there, limit = os.cpu_count() or 1, _cpu_limit()
    found = f"{usable} of {there}" if usable < there else f"{there}"
    if limit is not None and limit < usable:
        meaning = f"the container may use {limit:g} at a time: give --workers {max(1, round(limit))}"
        return Finding("cores", found, meaning, "slow")
    return Finding("cores", found, f"preprocessing reads with {usable} {'processes' if usable > 4 else 'threads'}")


def _memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", "not known", "")
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return Finding("memory", f"{gigabytes:.0f} GB", "training keeps all bags of a cohort in it")


def _processor() -> Finding:
    from acmil.environment import processor_name
    from acmil.preprocessing.devices import cpu_flags, cpu_multiplies_bf16

    shown = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu_flags()]
    found = f"{processor_name()} ({', '.join(shown) or 'instruction sets not known'})"
    if cpu_multiplies_bf16():
        return Finding("processor", found, "encoders compute in bf16 where there is no GPU")
    meaning = "encoders compute in fp32 where there is no GPU, as it does not multiply bf16 itself"
    return Finding("processor", found, meaning, "slow")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        more = f", {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
        found = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}{more}"
        return Finding("GPU", found, "encoders and training use it (--device cpu turns it off)")
    if torch.version.cuda is None and (_NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi")):
        meaning = "there is an NVIDIA GPU, but this torch is built for the CPU: install torch with CUDA (pytorch.org)"
        return Finding("GPU", "not used", meaning, "slow")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", "hidden", "CUDA_VISIBLE_DEVICES hides it: unset that", "slow")
    if torch.version.cuda is not None and _NVIDIA_DEVICE.exists():
        meaning = f"torch's CUDA {torch.version.cuda} cannot use it: see nvidia-smi for the driver's version"
        return Finding("GPU", "not usable", meaning, "slow")
    return Finding("GPU", "none", "encoders run on the CPU: tens to hundreds of tiles a second", "slow")


def _training() -> Finding:
    from acmil.engine import choose_engine
    from acmil.models import create_model, defaults
    from acmil.precision import choose_precision
    from acmil.preprocessing.devices import choose_device

    device = choose_device("auto")
    precision, reason = choose_precision("auto", device)
    options = create_model(defaults.MODEL, in_features=1024, n_classes=2).options
    engine, why = choose_engine("auto", device=device, model=defaults.MODEL, options=options)
    found = f"engine {engine}, on the {'GPU' if device.type == 'cuda' else 'CPU'}, in {precision}"
    meaning = f"{why}; {reason}"
    return Finding("training", found, meaning, "ok" if precision == "bf16" else "slow")


def _openslide() -> Finding:
    try:
        import openslide
    except (ImportError, OSError) as error:
        mend = f"slides cannot be opened: {_line(error)}. pip install openslide-bin"
        return Finding("OpenSlide", "missing", mend, "broken")
    return Finding("OpenSlide", openslide.__library_version__, "reads the vendors' formats")


def _jpeg() -> Finding:
    try:
        reader = _reader_of_jpeg_tiles()
    except (ImportError, OSError, ValueError) as error:
        return Finding("JPEG tiles", "not tried", f"a slide could not be read: {_line(error)}", "broken")
    if reader != "TiffReader":
        return Finding("JPEG tiles", reader, "decoded by OpenSlide, several times slower", "slow")
    return Finding("JPEG tiles", f"simplejpeg {_version('simplejpeg')}", "decoded directly (Aperio, generic TIFF)")


def _reader_of_jpeg_tiles() -> str:
    """Name of the class that reads a slide of JPEG tiles; a small synthetic one is written, and read with it."""
    import simplejpeg

    from acmil.demo.pyramid import TILE_PX, TiledLevel, write_levels
    from acmil.preprocessing.readers import open_reader

    tile = simplejpeg.encode_jpeg(np.full((TILE_PX, TILE_PX, 3), 200, np.uint8), quality=90)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.tiff"
        write_levels(path, [TiledLevel(2 * TILE_PX, 2 * TILE_PX, 1, [tile] * 4)], mpp=0.5, description="synthetic")
        reader = open_reader(path, slide_id=path.stem)
        reader.read(0, 0, 0, 64, 64)
        reader.close()
    return type(reader).__name__


def _cucim() -> Finding:
    if importlib.util.find_spec("cucim") is None:
        return Finding("cuCIM", "not installed", "not needed: an extra, for --reader cucim")
    return Finding(
        "cuCIM", _version("cucim-cu12") or _version("cucim-cu13") or "there", "used with --reader cucim alone"
    )


def _allocator() -> Finding:
    if platform.libc_ver()[0] == "glibc":
        return Finding("allocator", "glibc", "large buffers are kept between batches on the CPU")
    meaning = "large buffers go back to the system after each batch: encoders on the CPU are slower"
    return Finding("allocator", platform.libc_ver()[0] or "not glibc", meaning, "slow")


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:  # Windows
        return Finding("open files", "no limit known", "")
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < _FEWEST_OPEN_FILES:
        meaning = f"fewer than {_FEWEST_OPEN_FILES}: many readers may fail. ulimit -n {_FEWEST_OPEN_FILES}"
        return Finding("open files", f"{limit}", meaning, "note")
    return Finding("open files", f"{limit}", "")


def _cache() -> Finding:
    from acmil.samples import cache_folder

    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    if not os.access(there, os.W_OK):
        return Finding("cache", f"{folder}", "cannot be written: set ACMIL_CACHE to a folder of yours", "broken")
    if free < _LEAST_FREE_GB:
        return Finding("cache", f"{folder}, {free:.1f} GB free", "little room for backbones: set ACMIL_CACHE", "note")
    return Finding("cache", f"{folder}, {free:.0f} GB free", "samples; backbones go to the Hugging Face cache")


def _cpu_limit() -> float | None:
    """Cores that the container may use at a time; None where there is no limit."""
    if not _CPU_LIMIT.is_file():
        return None
    quota, period = _CPU_LIMIT.read_text().split()[:2]
    return None if quota == "max" else int(quota) / int(period)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
