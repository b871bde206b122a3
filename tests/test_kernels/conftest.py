"""Where the fused kernels run: on a GPU that they fit into, otherwise in Triton's interpreter on the CPU."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

CAPABILITIES = (9, 10)  # as acmil.kernels.launch has it, which imports Triton
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in CAPABILITIES
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is imported


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU that the kernels fit into."""
    if not HAS_GPU:
        reason = f"needs a GPU of compute capability {' or '.join(map(str, CAPABILITIES))}: `make test-gpu` on one"
        for item in items:
            if "gpu" in item.keywords and item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the fused kernels run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is made for Linux only")
    from acmil.kernels.launch import FUSED_CAPABILITIES

    assert FUSED_CAPABILITIES == CAPABILITIES
    if HAS_GPU:
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "something imported Triton before these tests could set it up"
    return torch.device("cpu")


@pytest.fixture(autouse=not HAS_GPU)
def poisoned(monkeypatch):
    """New memory holds NaN: what a kernel leaves unwritten shows.

    In the interpreter always: of rows that nobody uses kernels work out garbage, and NumPy warns when it meets an
    infinity in them, which depends on what the memory held before. It is quiet about NaN.
    """

    def fill(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(1)

    def poison(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: fill(plain(*args, **options)))

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(torch.Tensor, "new_empty")


@pytest.fixture(scope="session")
def relative_error():
    """Error by norm; NaN never passes a comparison with it."""

    def error(value, expected, least_norm=1e-30):
        expected = expected.detach().double().cpu()
        return ((value.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(least_norm)).item()

    return error


@pytest.fixture(scope="session")
def fused_path():
    """A context in which the public functions run the fused kernels on any device."""
    import acmil.kernels.branch_pool
    import acmil.kernels.gated_scores
    import acmil.kernels.top_k_masking

    class Context:
        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            for package in (acmil.kernels.branch_pool, acmil.kernels.gated_scores, acmil.kernels.top_k_masking):
                self.patch.setattr(package, "takes_fused_path", lambda *_, **__: True)

        def __exit__(self, *_):
            self.patch.undo()

    return Context
