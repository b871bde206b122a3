"""The composition of scores and pool, against its formulas in NumPy, and compiled."""

import importlib.util

import numpy as np
import pytest
import torch

from acmil.kernels import gated_attention_pool, stochastic_top_k_mask


def make_weights(in_features, hidden, gate, branches, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(hidden, in_features), (gate, hidden), (gate,), (gate, hidden), (gate,), (branches, gate), (branches,)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def make_features(n, in_features, *, seed=1, dtype=torch.float64):
    return torch.randn(n, in_features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy_pool(x, weights, keep):
    """One bag by the formulas, branch by branch."""
    w1, v, bv, u, bu, w, b = (weight.numpy() for weight in weights)
    hidden = np.maximum(x @ w1.T, 0)
    gate = np.tanh(hidden @ v.T + bv) / (1 + np.exp(-(hidden @ u.T + bu)))
    pooled, attention = [], []
    for k in range(len(b)):
        e = np.where(keep[k], np.exp(gate @ w[k] + b[k]), 0.0)
        attention.append(e / e.sum())
        pooled.append(sum(p * h for p, h in zip(attention[-1], hidden, strict=True)))
    return np.stack(pooled), np.stack(attention)


@pytest.mark.parametrize("n", [1, 63, 1000])
def test_equals_its_formulas_at_odd_sizes(n):
    x, weights = make_features(n, 37), make_weights(37, 13, 7, 5)
    keep = torch.rand(5, n, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[:, 0] = True
    pooled, attention, gram = gated_attention_pool(x, *weights, keep=keep)
    expected_pooled, expected_attention = numpy_pool(x.numpy(), weights, keep.numpy())
    np.testing.assert_allclose(pooled[0].numpy(), expected_pooled, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(attention.numpy(), expected_attention, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gram[0].numpy(), expected_attention @ expected_attention.T, rtol=1e-10)


@pytest.mark.parametrize("offsets", [None, [0, 1, 4, 9]])
def test_gradients(offsets):
    x, weights = make_features(9, 5), make_weights(5, 4, 3, 2)
    offsets = None if offsets is None else torch.tensor(offsets)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, 2], keep[1, 7] = False, False
    inputs = [tensor.requires_grad_() for tensor in [x, *weights]]
    assert torch.autograd.gradcheck(lambda *tensors: tuple(gated_attention_pool(*tensors, offsets, keep)), inputs)


def test_compiles_without_a_graph_break(device, fused_path, relative_error):
    x = make_features(100, 32, dtype=torch.float32).to(device)
    weights = [weight.to(device) / 4 for weight in make_weights(32, 16, 16, 3, dtype=torch.float32)]
    offsets = torch.tensor([0, 30, 100], device=device)
    inputs = [tensor.requires_grad_() for tensor in [x, *weights]]

    def loss(*tensors):
        pooled, attention, gram = gated_attention_pool(*tensors, offsets)
        return pooled.pow(2).sum() + (attention * gram[0, 0, 1]).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    with fused_path():
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
        grads = torch.autograd.grad(value, inputs)
    assert value.item() == pytest.approx(loss(*inputs).item(), rel=1e-5)
    for index in (0, 1, 2, 4, 6):
        assert relative_error(grads[index], expected[index]) < 1e-3


def test_masking_compiles_without_a_graph_break(device, fused_path):
    scores = make_features(3, 50, dtype=torch.float32).to(device)
    with fused_path():
        mask = torch.compile(
            lambda s: stochastic_top_k_mask(s, top_k=10, ratio=0.6), fullgraph=True, backend="aot_eager"
        )
        keep = mask(scores)
    assert (~keep).sum(dim=1).tolist() == [6, 6, 6]


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), True), ((8, 0), False)])
def test_the_path_is_chosen_by_the_gpu_and_compiled_without_breaks(monkeypatch, capability, expected):
    from acmil.kernels import launch

    torch.compiler.reset()
    launch._look_at.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    def choose(x):
        return x + launch.runs_fused_kernels(torch.device("cuda", 0))

    expected = expected and importlib.util.find_spec("triton") is not None
    assert torch.compile(choose, fullgraph=True, backend="aot_eager")(torch.zeros(1)).item() == expected
    launch._look_at.cache_clear()
