"""Loss terms against numbers worked out by hand."""

import math

import pytest
import torch

from acmil.losses import acmil_losses, attention_similarity
from acmil.models import MILOutput


def make_output(logits, branch_logits, attention, offsets, head_attention=None):
    return MILOutput(
        torch.tensor(logits),
        torch.tensor(branch_logits),
        torch.tensor(attention),
        torch.tensor(offsets),
        None if head_attention is None else torch.tensor(head_attention),
    )


def test_terms_of_one_bag():
    out = make_output(
        [[0.0, math.log(3)]], [[[0.0, 0.0], [math.log(4), 0.0]]], [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]], [0, 3]
    )
    losses = acmil_losses(out, torch.tensor([1]))
    assert losses.bag.item() == pytest.approx(-math.log(3 / 4))
    assert losses.branch.item() == pytest.approx((math.log(2) + math.log(5)) / 2)
    assert losses.diversity.item() == pytest.approx(0.6)
    assert losses.total.item() == pytest.approx(-math.log(3 / 4) + (math.log(2) + math.log(5)) / 2 + 0.6)


def test_terms_are_averaged_over_bags_whatever_their_size():
    out = make_output(
        [[0.0, 0.0], [0.0, math.log(3)]],
        [[[0.0, 0.0]] * 2, [[0.0, math.log(3)]] * 2],
        [[1.0, 0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.5, 0.5, 0.0]],
        [0, 2, 5],
    )
    losses = acmil_losses(out, torch.tensor([0, 0]))
    assert losses.bag.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses.branch.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses.diversity.item() == pytest.approx(0.5)  # 0 in the first bag, 1 in the second


def test_one_branch_leaves_the_bag_loss_alone():
    out = make_output([[0.0, 0.0]], [[[5.0, 0.0]]], [[0.5, 0.5]], [0, 2])
    losses = acmil_losses(out, torch.tensor([1]))
    assert (losses.branch.item(), losses.diversity.item()) == (0.0, 0.0)
    assert losses.total.item() == pytest.approx(math.log(2))


def test_similarity_is_the_mean_over_pairs():
    attention = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)).double()
    pairs = [
        torch.nn.functional.cosine_similarity(attention[i], attention[j], dim=0) for i in range(4) for j in range(i)
    ]
    assert attention_similarity(attention).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)


def test_similarity_with_heads_is_averaged_over_heads():
    heads = [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]  # (K, heads, N): head 0 shared, head 1 apart
    out = make_output([[0.0, 0.0]], [[[0.0, 0.0]] * 2], [[1.0, 0.0], [0.5, 0.5]], [0, 2], heads)
    assert acmil_losses(out, torch.tensor([0])).diversity.item() == pytest.approx((1.0 + 0.0) / 2)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([0.0]), torch.tensor(0)])
def test_labels_of_another_shape_or_type_are_refused(labels):
    out = make_output([[0.0, 0.0]], [[[0.0, 0.0]]], [[1.0]], [0, 1])
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(1,\)"):
        acmil_losses(out, labels)
