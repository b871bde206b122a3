"""The operator against its definition, its gradients, packing, masks and refusals."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from acmil.kernels import bag_lengths, gated_attention_pool, gated_attention_scores, masked_attention_pool


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
    pooled, attention = gated_attention_pool(x, *weights, keep=keep)
    expected_pooled, expected_attention = numpy_pool(x.numpy(), weights, keep.numpy())
    np.testing.assert_allclose(pooled[0].numpy(), expected_pooled, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(attention.numpy(), expected_attention, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("offsets", [None, [0, 1, 4, 9]])
def test_gradients(offsets):
    x, weights = make_features(9, 5), make_weights(5, 4, 3, 2)
    offsets = None if offsets is None else torch.tensor(offsets)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, 2], keep[1, 7] = False, False
    inputs = [tensor.requires_grad_() for tensor in [x, *weights]]
    assert torch.autograd.gradcheck(lambda *tensors: tuple(gated_attention_pool(*tensors, offsets, keep)), inputs)


def test_packed_bags_equal_the_bags_one_by_one():
    x, weights = make_features(70, 11, dtype=torch.float32), make_weights(11, 6, 4, 3, dtype=torch.float32)
    edges = [0, 1, 8, 70]
    keep = torch.rand(3, 70, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[:, [0, 1, 8]] = True
    pooled, attention = gated_attention_pool(x, *weights, torch.tensor(edges), keep)
    for bag, (start, end) in enumerate(pairwise(edges)):
        one_pooled, one_attention = gated_attention_pool(x[start:end], *weights, keep=keep[:, start:end])
        torch.testing.assert_close(pooled[bag], one_pooled[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(attention[:, start:end], one_attention, rtol=1e-6, atol=1e-7)


def test_masked_instances_have_exactly_no_weight_and_no_gradient():
    hidden, scores = make_features(20, 4).requires_grad_(), make_features(3, 20).requires_grad_()
    keep = torch.ones(3, 20, dtype=torch.bool)
    keep[:, 5] = False
    keep[1, 9] = False
    pooled, attention = masked_attention_pool(hidden, scores, keep=keep)
    assert (attention[~keep] == 0).all()
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3, dtype=torch.float64))
    pooled.pow(3).sum().backward()
    assert (scores.grad[~keep] == 0).all()
    assert (hidden.grad[5] == 0).all()
    assert (hidden.grad[9] != 0).all()


def test_a_row_that_keeps_nothing_gives_zeros_and_finite_gradients():
    hidden, scores = make_features(6, 4).requires_grad_(), make_features(2, 6).requires_grad_()
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :3] = False  # branch 0 keeps nothing of the first bag
    pooled, attention = masked_attention_pool(hidden, scores, torch.tensor([0, 3, 6]), keep)
    assert (attention[0, :3] == 0).all()
    assert (pooled[0, 0] == 0).all()
    torch.testing.assert_close(attention[1, :3].sum(), torch.tensor(1.0, dtype=torch.float64))
    pooled.sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[0, :3] == 0).all()
    assert torch.isfinite(hidden.grad).all()


def test_large_scores_do_not_overflow():
    scores = torch.tensor([[1e4, 0.0, -1e4]])
    pooled, attention = masked_attention_pool(torch.eye(3), scores)
    assert attention.tolist() == [[1.0, 0.0, 0.0]]
    assert pooled.tolist() == [[[1.0, 0.0, 0.0]]]


def test_scores_do_not_depend_on_other_instances():
    x, weights = make_features(10, 5), make_weights(5, 4, 3, 2)
    hidden, scores = gated_attention_scores(x, *weights)
    one_hidden, one_scores = gated_attention_scores(x[3:4], *weights)
    torch.testing.assert_close(hidden[3:4], one_hidden)
    torch.testing.assert_close(scores[:, 3:4], one_scores)


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
    x, weights = make_features(10, 5), make_weights(5, 4, 3, 2)
    with pytest.raises(ValueError, match=r"features must have shape \(any, 5\), got \(10, 4\)"):
        gated_attention_scores(x[:, :4], *weights)
    for index, name in enumerate(["v_bias", "u_weight", "u_bias", "score_weight", "score_bias"], start=2):
        wrong = list(weights)
        wrong[index] = torch.zeros(9, 9, 9)[..., : index + 1]
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            gated_attention_scores(x, *wrong)
    with pytest.raises(ValueError, match="scores must have shape"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="keep must have shape"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(2, 5), keep=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be a bool"):
        masked_attention_pool(torch.zeros(5, 2), torch.zeros(1, 5), keep=torch.ones(1, 5))
