"""Fixtures shared by all tests."""

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("hypothesis") is not None:  # the kernels' tests do without it
    from hypothesis import settings

    # On a busy machine a case may take ten times as long; what must be fast says so in tests of its own.
    settings.register_profile("any machine", deadline=None)
    settings.load_profile("any machine")

# One thread: the tests' tensors are tiny, and threads that wait for each other on a busy machine cost twentyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    import torch  # after the environment above, which it reads as it is loaded

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: `make test-gpu` where there is one"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides beside the repository; tests that need it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data kit in ../shared/data, which only some machines have")
    return folder
