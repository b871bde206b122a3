"""Instance reduction and gated scores: definition, gradients, and the fused kernels against the reference."""

import pytest
import torch

from acmil.kernels import gated_attention_scores
from acmil.kernels.gated_scores import reference

NAMES = ("x", "w1", "v", "v_bias", "u", "u_bias", "w", "b")
SIZES = [(1, 16, 16, 16, 1), (63, 48, 80, 48, 5), (200, 64, 32, 32, 16)]  # N, D, L, A, K
TOLERANCE = {torch.float32: (2e-6, 2e-5), torch.float16: (2e-3, 3e-2), torch.bfloat16: (1e-2, 1e-1)}


def make_inputs(n, d, l, a, k, *, dtype=torch.float64, device="cpu", seed=0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (l, d), (a, l), (a,), (a, l), (a,), (k, a), (k,)]
    tensors = (torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for s in shapes)
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def test_gradients_of_the_reference():
    inputs = make_inputs(7, 5, 4, 3, 2)
    assert torch.autograd.gradcheck(gated_attention_scores, inputs)


def test_scores_do_not_depend_on_other_instances():
    x, *weights = make_inputs(10, 5, 4, 3, 2)
    hidden, scores = gated_attention_scores(x, *weights)
    one_hidden, one_scores = gated_attention_scores(x[3:4], *weights)
    torch.testing.assert_close(hidden[3:4], one_hidden)
    torch.testing.assert_close(scores[:, 3:4], one_scores)


def test_scores_of_half_types_are_float32():
    hidden, scores = gated_attention_scores(*make_inputs(4, 16, 16, 16, 2, dtype=torch.bfloat16))
    assert (hidden.dtype, scores.dtype) == (torch.bfloat16, torch.float32)


def test_shapes_that_disagree_are_refused():
    x, *weights = make_inputs(10, 5, 4, 3, 2)
    with pytest.raises(ValueError, match=r"features must have shape \(any, 5\), got \(10, 4\)"):
        gated_attention_scores(x[:, :4], *weights)
    for index, name in enumerate(["v_bias", "u_weight", "u_bias", "score_weight", "score_bias"], start=2):
        wrong = list(weights)
        wrong[index] = torch.zeros(9, 9, 9)[..., : index + 1]
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            gated_attention_scores(x, *wrong)


def check_fused(inputs, relative_error, tolerance):
    from acmil.kernels.gated_scores import fused

    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    outputs, expected = fused.gated_attention_scores(*inputs), reference.gated_attention_scores(*exact)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(e.shape, generator=generator, dtype=torch.float64) for e in expected]
    sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    sum(
        (e * w.to(outputs[i].dtype).double()).sum() for i, (e, w) in enumerate(zip(expected, weights, strict=True))
    ).backward()
    errors = {name: relative_error(o, e) for name, o, e in zip(("hidden", "scores"), outputs, expected, strict=True)}
    assert max(errors.values()) < tolerance[0], errors
    errors = {name: relative_error(one.grad, two.grad) for name, one, two in zip(NAMES, inputs, exact, strict=True)}
    assert all(error < tolerance[1] for error in errors.values()), errors


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_equals_the_reference(device, relative_error, sizes, dtype):
    check_fused(make_inputs(*sizes, dtype=dtype, device=device), relative_error, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(1000, 1024, 512, 128, 5), (65_537, 384, 128, 128, 5), (3001, 1536, 768, 256, 16)])
def test_fused_equals_the_reference_at_full_size(relative_error, sizes, dtype):
    check_fused(make_inputs(*sizes, dtype=dtype, device="cuda"), relative_error, TOLERANCE[dtype])


@pytest.mark.gpu
def test_tensor_float_32_follows_the_switch(relative_error):
    errors = {}
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        try:
            inputs = make_inputs(500, 256, 128, 64, 5, dtype=torch.float32, device="cuda")
            check_fused(inputs, relative_error, (5e-3, 5e-2))
            from acmil.kernels.gated_scores import fused

            errors[precision] = relative_error(
                fused.gated_attention_scores(*inputs)[0],
                reference.gated_attention_scores(*(tensor.double() for tensor in inputs))[0],
            )
        finally:
            torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 1e-6 < 1e-5 < errors["high"]


@pytest.mark.parametrize("missing", [0, 1])
def test_one_gradient_alone(device, relative_error, missing):
    from acmil.kernels.gated_scores import fused

    inputs = make_inputs(20, 16, 32, 16, 3, dtype=torch.float32, device=device)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    fused.gated_attention_scores(*inputs)[1 - missing].pow(2).sum().backward()
    reference.gated_attention_scores(*exact)[1 - missing].pow(2).sum().backward()
    for name, one, two in zip(NAMES, inputs, exact, strict=True):
        if two.grad is not None and name in ("x", "w1", "v", "u", "w"):
            assert relative_error(one.grad, two.grad) < 2e-5, name


def test_the_same_bits_every_time(device):
    from acmil.kernels.gated_scores import fused

    runs = []
    for _ in range(2):
        inputs = make_inputs(600, 32, 32, 16, 3, dtype=torch.float32, device=device)
        hidden, scores = fused.gated_attention_scores(*inputs)
        (hidden.sum() + scores.pow(2).sum()).backward()
        runs.append([hidden, scores, *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_operands_of_several_types_are_refused(device):
    from acmil.kernels.gated_scores import fused

    x, *weights = make_inputs(4, 16, 16, 16, 2, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"reduction_weight must be torch.float16 on .* got torch.float32"):
        fused.gated_attention_scores(x.half(), *weights)


def test_registration(device):
    from acmil.kernels.gated_scores.fused import gated_scores_op

    inputs = make_inputs(5, 16, 16, 16, 2, dtype=torch.float32, device=device)
    torch.library.opcheck(gated_scores_op, (*inputs, True), atol=1e-3, rtol=1e-3)
