"""Jobs that are killed, and jobs that several processes share: each slide once, the same bytes as in one quiet run."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.job import preprocess
from acmil.preprocessing.job_folder import JobError

ENCODER = "test_efficientnet"
ELSEWHERE = b"0123456789ab-77-5-ffff 3\n"  # a process of another machine
BEAT_SECONDS = 0.1

# Runs a job in a process of its own. It may kill itself: at the n-th word of progress, or as the n-th file (or folder)
# is about to be flushed to the disk, which is when a temporary name is not the real one yet.
WORKER = """
import json, logging, os, signal, sys
from acmil.preprocessing import atomic, job
from acmil.preprocessing.config import PreprocessConfig

where, at = sys.argv[2], int(sys.argv[3])
counts = {"word": 0, "flush": 0}

def count(kind):
    counts[kind] += 1
    if kind == where and counts[kind] == at:
        os.kill(os.getpid(), signal.SIGKILL)

class Words:
    def begin(self, title, total): pass
    def advance(self, steps=1, note=""): count("word")
    def end(self): pass

flush = atomic._flush_to_disk
atomic._flush_to_disk = lambda path: (count("flush"), flush(path))
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
job.preprocess(PreprocessConfig(**json.loads(sys.argv[1])), progress=Words(), _beat_seconds=0.1)
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory, write_slide, make_tissue_picture) -> dict:
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    save_file(import_timm().create_model(ENCODER).state_dict(), folder / "random.safetensors")
    for i, (width, height) in enumerate([(512, 384), (400, 500), (300, 600), (600, 300), (450, 450), (350, 520)]):
        ellipses = [(width // 2, height // 2, width // 3, height // 3)]
        picture = make_tissue_picture(width, height, ellipses=ellipses, seed=i)
        (folder / "slides").mkdir(exist_ok=True)
        write_slide(folder / "slides" / f"s{i}.tiff", picture)
    common = {"encoder": ENCODER, "weights": str(folder / "random.safetensors"), "tile_px": 32, "batch_size": 20}
    return common | {"slides": [str(folder / "slides")], "device": "cpu", "precision": "fp32", "workers": 2}


@pytest.fixture(scope="module")
def quiet(options, tmp_path_factory) -> Path:
    """The job of one run that nothing disturbed."""
    out = tmp_path_factory.mktemp("quiet") / "job"
    assert preprocess(PreprocessConfig(**options, out=out)).done == 6
    return out


def start(options: dict, out: Path, where: str = "", at: int = 0) -> subprocess.Popen:
    arguments = [sys.executable, "-c", WORKER, json.dumps(options | {"out": str(out)}), where, str(at)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table(job: Path) -> dict[str, tuple[str, int]]:
    with (job / "slides.csv").open(newline="") as file:
        return {row["slide_id"]: (row["status"], int(row["tiles"])) for row in csv.DictReader(file)}


def check_same(job: Path, quiet: Path) -> None:
    """The job holds what the undisturbed one does, to the byte, and nothing besides."""
    for folder in ("features", "tissue", "previews"):
        names = sorted(path.name for path in (quiet / folder).iterdir())
        assert sorted(path.name for path in (job / folder).iterdir()) == names
        for name in names:
            assert (job / folder / name).read_bytes() == (quiet / folder / name).read_bytes(), name
    assert table(job) == table(quiet)
    assert list((job / "leases").iterdir()) == []
    assert [path.name for path in job.rglob("*.tmp")] == []


def test_a_job_killed_at_any_instant_ends_with_the_bytes_of_a_quiet_one(options, quiet, tmp_path):
    job = tmp_path / "job"
    # In this order on one folder: at the options, in a batch, and as the files of a slide are written one by one.
    points = [("flush", 1), ("word", 2), ("flush", 9), ("flush", 11), ("flush", 13), ("word", 7)]
    n_temporary = n_leases = 0
    for where, at in points:
        process = start(options, job, where, at)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, output
        n_temporary += len(list(job.rglob("*.tmp")))
        n_leases += len(list(job.glob("leases/*")))
    assert n_temporary >= 2  # it was killed while it wrote
    assert n_leases >= 2
    summary = preprocess(PreprocessConfig(**options, out=job), _beat_seconds=1000.0)  # no beat is waited for
    assert summary.done + summary.skipped == 6
    assert summary.done >= 2
    check_same(job, quiet)


def test_two_processes_do_each_slide_once_and_a_third_that_is_killed_is_no_loss(options, quiet, tmp_path):
    job = tmp_path / "job"
    killed = start(options, job, "word", 1)
    while killed.poll() is None and not list(job.glob("leases/*")):
        time.sleep(0.01)
    workers = [killed, start(options, job), start(options, job)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0], outputs
    done = Counter(line.partition(":")[0] for output in outputs for line in output.splitlines() if ": done," in line)
    assert done == {f"s{i}": 1 for i in range(6)}, outputs
    check_same(job, quiet)


def test_the_slides_of_a_dead_machine_are_taken_over(options, quiet, tmp_path, caplog):
    job = tmp_path / "job"
    (job / "leases").mkdir(parents=True)
    (job / "leases/s2.0.lease").write_bytes(ELSEWHERE)
    (job / "features").mkdir()
    (job / "features/.s2.h5.0123456789ab-77-5-ffff.tmp").write_bytes(b"half a file")
    assert preprocess(PreprocessConfig(**options, out=job), _beat_seconds=BEAT_SECONDS).done == 6
    assert "s2: taken over" in caplog.text
    check_same(job, quiet)


def test_a_process_that_was_thought_dead_leaves_its_slide_to_the_other(options, quiet, tmp_path, caplog):
    job = tmp_path / "job"

    class Other:
        """Takes s1 over while it is being embedded, and then dies itself."""

        def begin(self, title, total):
            self.has_taken = False

        def advance(self, steps=1, note=""):
            if note.startswith("s1: 20 of") and not self.has_taken:
                self.has_taken = True
                (job / "leases/s1.1.lease").write_bytes(ELSEWHERE)
                (job / "leases/s1.0.lease").unlink()

        def end(self):
            assert self.has_taken

    summary = preprocess(PreprocessConfig(**options, out=job), progress=Other(), _beat_seconds=BEAT_SECONDS)
    assert summary.done == 6
    assert "s1: taken over by another process" in caplog.text
    check_same(job, quiet)


def test_a_slide_that_fails_is_tried_by_one_process_of_those_that_share_a_job(options, tmp_path, monkeypatch):
    slides = tmp_path / "slides"
    shutil.copytree(options["slides"][0], slides)
    (slides / "s3.tiff").write_text("no slide")
    config = PreprocessConfig(**options | {"slides": [slides], "out": tmp_path / "job"})

    class Nested:
        """Another run of the job begins, and ends, within the first one, which has not come to the last slides yet."""

        inner = None

        def begin(self, title, total):
            if Nested.inner is None:
                Nested.inner = "running"
                Nested.inner = preprocess(config, progress=self, _beat_seconds=BEAT_SECONDS)

        def advance(self, steps=1, note=""):
            pass

        def end(self):
            pass

    outer = preprocess(config, progress=Nested(), _beat_seconds=BEAT_SECONDS)
    assert (Nested.inner.done, Nested.inner.failed, Nested.inner.skipped) == (5, 1, 0)
    assert (outer.done, outer.failed, outer.skipped, outer.new_tiles) == (0, 1, 5, 0)
    assert outer.tiles == Nested.inner.tiles > 0
    assert table(tmp_path / "job")["s3"] == ("failed", 0)


def test_other_options_are_refused_while_others_work_on_the_job(options, tmp_path):
    job = tmp_path / "job"
    preprocess(PreprocessConfig(**options, out=job))
    for path in (*job.glob("features/*"), *job.glob("rows/*"), job / "slides.csv"):
        path.unlink()
    (job / "leases/s0.0.lease").write_bytes(ELSEWHERE)
    with pytest.raises(JobError, match=r"got tile_mpp: 0\.5 → 1\.0; feature_dtype: float16 → float32 \("):
        preprocess(PreprocessConfig(**options | {"tile_mpp": 1.0, "feature_dtype": "float32"}, out=job))
    (job / "leases/s0.0.lease").unlink()
    assert preprocess(PreprocessConfig(**options | {"tile_mpp": 1.0}, out=job)).done == 6
