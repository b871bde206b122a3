"""Scores on a CPU: the reference's function, whatever rows follow the bags."""

import pytest
import torch

from acmil.kernels import gated_attention_scores, pad_rows
from acmil.kernels.gated_scores import reference

N, PADDING, D, L, A, K = 37, 11, 12, 8, 6, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(N + PADDING, D), (L, D), (A, L), (A,), (A, L), (A,), (K, A), (K,)]
    x, *weights = (torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for s in shapes)
    exact = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype).requires_grad_(), *(weight.to(exact).requires_grad_() for weight in weights)]


def test_gradients():
    inputs = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x, *weights: gated_attention_scores(x, *weights, n_rows=N), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_reference(relative_error, dtype):
    inputs = make_inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        gated_attention_scores(*inputs, n_rows=N),
        reference.gated_attention_scores(exact[0][:N], *exact[1:]),
    )
    for outputs in (found, expected):
        sum(
            (output.double() * torch.arange(output.numel()).view(output.shape).cos()).sum() for output in outputs
        ).backward()
    pairs = [*zip(found, expected, strict=True), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    errors = [relative_error(one, two) for one, two in pairs]
    assert max(errors) < TOLERANCE[dtype], errors


def test_rows_are_padded_where_sizes_are_compiled_for():
    padded = pad_rows(torch.ones(300, 2, dtype=torch.bfloat16))
    assert padded.shape == (512, 2)
    assert padded.sum() == 600
    assert len(pad_rows(torch.ones(300, 2))) == 300


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(relative_error, dtype):
    def loss(*inputs):
        hidden, scores = gated_attention_scores(*inputs, n_rows=N)
        return hidden.float().sum() + scores.square().sum()

    plain, compiled = make_inputs(dtype), make_inputs(dtype)
    loss(*plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    errors = [relative_error(one.grad, two.grad) for one, two in zip(compiled, plain, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
