"""The branch pool: definition, gradients, packing, masks, refusals, and the fused kernels against the reference."""

from itertools import pairwise

import pytest
import torch

from acmil.kernels import bag_lengths, masked_attention_pool
from acmil.kernels.branch_pool import reference

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MANY_BAGS = [1, 1, 130, 3, 64, 65, 2, 17]


def make_inputs(n, l, k, *, dtype=torch.float64, device="cpu", seed=1):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((n, l), generator=generator).relu()
    scores = 2.0 * torch.randn((k, n), generator=generator)
    scores_dtype = torch.promote_types(dtype, torch.float32)
    return hidden.to(device, dtype).requires_grad_(), scores.to(device, scores_dtype).requires_grad_()


def make_offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def make_keep(k, offsets, *, seed=2):
    keep = torch.rand((k, int(offsets[-1])), generator=torch.Generator().manual_seed(seed)) > 0.3
    keep[:, offsets[:-1].cpu()] = True
    return keep.to(offsets.device)


@pytest.mark.parametrize("lengths", [[9], [1, 3, 5]])
def test_gradients_of_the_reference(lengths):
    offsets = make_offsets(lengths)
    keep = make_keep(3, offsets)
    assert torch.autograd.gradcheck(
        lambda h, s: tuple(masked_attention_pool(h, s, offsets, keep)), make_inputs(9, 4, 3)
    )


def test_packed_bags_equal_the_bags_one_by_one():
    hidden, scores = make_inputs(70, 6, 3)
    edges = [0, 1, 8, 70]
    keep = make_keep(3, torch.tensor(edges))
    pooled, attention, gram = masked_attention_pool(hidden, scores, torch.tensor(edges), keep)
    for bag, (start, end) in enumerate(pairwise(edges)):
        one = masked_attention_pool(hidden[start:end], scores[:, start:end], keep=keep[:, start:end])
        torch.testing.assert_close(pooled[bag], one.pooled[0])
        torch.testing.assert_close(attention[:, start:end], one.attention)
        torch.testing.assert_close(gram[bag], one.attention @ one.attention.T)


def test_a_row_that_keeps_nothing_gives_zeros_and_finite_gradients():
    hidden, scores = make_inputs(6, 4, 2)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :3] = False  # branch 0 keeps nothing of the first bag
    pooled, attention, gram = masked_attention_pool(hidden, scores, torch.tensor([0, 3, 6]), keep)
    assert (attention[0, :3] == 0).all()
    assert (pooled[0, 0] == 0).all()
    torch.testing.assert_close(attention[1, :3].sum(), torch.tensor(1.0, dtype=torch.float64))
    (pooled.sum() + gram.sum()).backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[0, :3] == 0).all()
    assert torch.isfinite(hidden.grad).all()


def test_large_scores_do_not_overflow():
    pooled, attention, gram = masked_attention_pool(torch.eye(3), torch.tensor([[1e4, 0.0, -1e4]]))
    assert attention.tolist() == [[1.0, 0.0, 0.0]]
    assert pooled.tolist() == [[[1.0, 0.0, 0.0]]]
    assert gram.tolist() == [[[1.0]]]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "from 0 to 5"),
        ([0, 4], "from 0 to 5"),
        ([0, 2, 2, 5], "got 2 to 2 for bag 1"),
        ([0, 3, 2, 5], "got 3 to 2 for bag 1"),
        ([0], "shape"),
    ],
)
def test_offsets_that_do_not_cut_the_instances_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(1, 5), torch.tensor(offsets))


def test_offsets_of_another_type_are_refused():
    with pytest.raises(ValueError, match="int64"):
        bag_lengths(torch.tensor([0, 5], dtype=torch.int32), 5)


def test_bag_lengths():
    assert bag_lengths(torch.tensor([0, 1, 4]), 4) == [1, 3]
    assert bag_lengths(None, 4) == [4]
    with pytest.raises(ValueError, match="at least 1 instance"):
        bag_lengths(None, 0)


def test_shapes_and_types_that_disagree_are_refused():
    with pytest.raises(ValueError, match="scores must have shape"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="keep must have shape"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(2, 5), keep=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be a bool"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(1, 5), keep=torch.ones(1, 5))


def run_both(inputs, offsets, keep, parts=(0, 1, 2)):
    """Outputs and gradients of the fused kernels and of the reference in float64, of a weighted sum of some outputs."""
    from acmil.kernels.branch_pool import fused

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs = fused.masked_attention_pool(*inputs, offsets, keep)
    expected = reference.masked_attention_pool(*exact, offsets, keep)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(e.shape, generator=generator).to(e.device) for e in expected]
    sum((outputs[i] * weights[i]).sum() for i in parts).backward()
    sum((expected[i] * weights[i].double()).sum() for i in parts).backward()
    return outputs, expected, [t.grad for t in inputs], [t.grad for t in exact]


def check_fused(inputs, offsets, keep, relative_error, tolerance, parts=(0, 1, 2)):
    outputs, expected, grads, exact_grads = run_both(inputs, offsets, keep, parts)
    # Where a bag of one tile leaves a gradient of 0, there is only the rounding of numbers of the size of 1.
    pairs = zip((*outputs, *grads), (*expected, *exact_grads), strict=True)
    errors = [relative_error(one, two, least_norm=1.0) for one, two in pairs]
    assert all(error < tolerance for error in errors), errors
    if keep is not None:
        assert (outputs[1][~keep] == 0).all()
        assert (grads[1][~keep] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("lengths", "l", "k"), [([1], 16, 1), ([300], 48, 5), (MANY_BAGS, 80, 16)])
def test_fused_equals_the_reference(device, relative_error, lengths, l, k, dtype):  # noqa: E741
    offsets = make_offsets(lengths, device)
    inputs = make_inputs(sum(lengths), l, k, dtype=dtype, device=device)
    one_bag = len(lengths) == 1
    check_fused(inputs, None if one_bag else offsets, make_keep(k, offsets), relative_error, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[65_537], [200_000], [1, 5000, 63, 40_001, 2, 1000]])
def test_fused_equals_the_reference_at_full_size(relative_error, lengths, dtype):
    offsets = make_offsets(lengths, "cuda")
    inputs = make_inputs(sum(lengths), 512, 5, dtype=dtype, device="cuda")
    check_fused(inputs, offsets, make_keep(5, offsets), relative_error, TOLERANCE[dtype])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_gradient_alone(device, relative_error, part):
    offsets = make_offsets([5, 70], device)
    inputs = make_inputs(75, 32, 3, dtype=torch.float32, device=device)
    _, _, grads, exact = run_both(inputs, offsets, None, (part,))
    assert relative_error(grads[1], exact[1]) < 2e-5
    if part == 0:
        assert relative_error(grads[0], exact[0]) < 2e-5
    else:
        assert (grads[0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_fused_equal_scores_attend_evenly(device, value):
    from acmil.kernels.branch_pool import fused

    hidden, _ = make_inputs(150, 16, 2, dtype=torch.float32, device=device)
    pooled, attention, gram = fused.masked_attention_pool(
        hidden, torch.full((2, 150), value, device=device), None, None
    )
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 150))
    torch.testing.assert_close(pooled[0], hidden.mean(dim=0).expand(2, -1))
    torch.testing.assert_close(gram, torch.full_like(gram, 1 / 150))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of exponentials in the interpreter
def test_fused_scores_far_apart(device, relative_error):
    inputs = make_inputs(150, 16, 2, dtype=torch.float32, device=device)
    with torch.no_grad():
        inputs[1].mul_(5000.0)
    check_fused(inputs, None, None, relative_error, 2e-5)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_fused_row_that_keeps_nothing(device):
    offsets = make_offsets([70, 80], device)
    inputs = make_inputs(150, 16, 3, dtype=torch.float32, device=device)
    keep = torch.ones((3, 150), dtype=torch.bool, device=device)
    keep[1, :70] = False
    outputs, expected, grads, exact = run_both(inputs, offsets, keep)
    for one, two in zip((*outputs, *grads), (*expected, *exact), strict=True):
        torch.testing.assert_close(one, two.float(), rtol=1e-4, atol=1e-5)
    assert (outputs[1][1, :70] == 0).all()
    assert (grads[1][1, :70] == 0).all()


def test_the_same_bits_every_time(device):
    offsets = make_offsets(MANY_BAGS, device)
    runs = []
    for _ in range(2):
        outputs, _, grads, _ = run_both(
            make_inputs(sum(MANY_BAGS), 16, 3, dtype=torch.float32, device=device), offsets, None
        )
        runs.append([*outputs, *grads])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_registration(device):
    from acmil.kernels.branch_pool.fused import branch_pool_op

    hidden, scores = make_inputs(20, 16, 2, dtype=torch.float32, device=device)
    offsets = make_offsets([3, 17], device)
    torch.library.opcheck(branch_pool_op, (hidden, scores, offsets, make_keep(2, offsets)), atol=1e-3, rtol=1e-3)
