"""Where the fused kernels run: on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is imported


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the fused kernels run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is made for Linux only")
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "something imported Triton before these tests could set it up"
    return torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN: what a kernel leaves unwritten shows."""

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
