"""Stochastic top-k masking: what is drawn, how often, and what always stays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acmil.kernels import n_masked, stochastic_top_k_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_of_the_top_is_masked_equally_often_and_nothing_else_ever():
    n_rows, n_instances, top_k, n_drop = 20_000, 25, 10, 6
    scores = torch.stack([torch.randperm(n_instances, generator=generator(1)).float()] * n_rows)
    dropped = ~stochastic_top_k_mask(scores, top_k=top_k, ratio=0.6, generator=generator(2))
    assert (dropped.sum(dim=1) == n_drop).all()
    top = scores[0] >= n_instances - top_k
    assert dropped[:, ~top].sum() == 0
    counts = dropped[:, top].sum(dim=0).double()
    p = n_drop / top_k
    # Draws without replacement are negatively correlated, which the factor (n - 1) / n accounts for.
    chi_square = ((counts - n_rows * p) ** 2 / (n_rows * p * (1 - p))).sum().item() * (top_k - 1) / top_k
    assert chi_square < 27.88  # the 99.9 % point with 9 degrees of freedom
    together = dropped[:, top].double().T @ dropped[:, top].double() / n_rows
    pairs = together[~torch.eye(top_k, dtype=torch.bool)]
    assert (pairs - n_drop * (n_drop - 1) / (top_k * (top_k - 1))).abs().max() < 5 * (1 / 3 * 2 / 3 / n_rows) ** 0.5


def test_rows_are_drawn_on_their_own():
    scores = torch.arange(30.0).repeat(50, 1)
    keep = stochastic_top_k_mask(scores, top_k=10, ratio=0.5, generator=generator())
    assert len({tuple(row) for row in keep.tolist()}) > 40


def test_packed_bags_are_masked_each_on_its_own():
    scores = torch.cat([torch.full((2, 20), 100.0), torch.zeros(2, 1), torch.zeros(2, 4)], dim=1)
    keep = stochastic_top_k_mask(
        scores, top_k=10, ratio=0.6, generator=generator(), offsets=torch.tensor([0, 20, 21, 25])
    )
    dropped = [part.sum(dim=1).tolist() for part in (~keep).split([20, 1, 4], dim=1)]
    assert dropped == [[6, 6], [0, 0], [2, 2]]


def test_the_same_generator_state_gives_the_same_mask_and_the_global_one_is_left_alone():
    scores = torch.randn(3, 40, generator=generator())
    before = torch.random.get_rng_state()
    first, second = (stochastic_top_k_mask(scores, top_k=10, ratio=0.6, generator=generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0, 1))
def test_at_least_one_instance_always_stays(n_instances, top_k, ratio):
    scores = torch.randn(3, n_instances, generator=generator())
    keep = stochastic_top_k_mask(scores, top_k=top_k, ratio=ratio, generator=generator())
    assert keep.any(dim=1).all()
    assert ((~keep).sum(dim=1) == n_masked(n_instances, top_k, ratio)).all()


@pytest.mark.parametrize(
    ("n_instances", "top_k", "ratio", "expected"),
    [
        (100, 10, 0.6, 6),
        (500, 100, 0.29, 29),
        (500, 10, 0.7, 7),
        (7, 10, 0.6, 4),
        (1, 10, 0.6, 0),
        (2, 10, 1.0, 1),
        (50, 0, 0.6, 0),
        (50, 10, 0.0, 0),
        (50, 10, 1.0, 10),
        (10, 10, 1.0, 9),
        (500, 10, 0.69999, 6),
    ],
)
def test_number_masked(n_instances, top_k, ratio, expected):
    assert n_masked(n_instances, top_k, ratio) == expected


@pytest.mark.parametrize(("top_k", "ratio"), [(-1, 0.5), (10, -0.1), (10, 1.1), (10, float("nan"))])
def test_options_out_of_range_are_refused(top_k, ratio):
    with pytest.raises(ValueError, match="top_k >= 0 and ratio in"):
        stochastic_top_k_mask(torch.zeros(1, 5), top_k=top_k, ratio=ratio)


def fused_mask(scores, *, seed=0, top_k=10, ratio=0.6, offsets=None):
    from acmil.kernels.top_k_masking import fused

    draw = torch.Generator(scores.device).manual_seed(seed)
    return fused.stochastic_top_k_mask(scores, top_k=top_k, ratio=ratio, generator=draw, offsets=offsets)


def test_fused_masks_each_of_the_top_equally_often_and_nothing_else_ever(device):
    n_rows, n_instances, top_k, n_drop = 500, 25, 10, 6
    row = torch.randperm(n_instances, generator=generator(1)).float().to(device)
    dropped = ~fused_mask(row.repeat(n_rows, 1), seed=2)
    assert (dropped.sum(dim=1) == n_drop).all()
    top = row >= n_instances - top_k
    assert dropped[:, ~top].sum() == 0
    counts = dropped[:, top].sum(dim=0).double()
    p = n_drop / top_k
    chi_square = ((counts - n_rows * p) ** 2 / (n_rows * p * (1 - p))).sum().item() * (top_k - 1) / top_k
    assert chi_square < 27.88  # the 99.9 % point with 9 degrees of freedom
    together = dropped[:, top].double().T @ dropped[:, top].double() / n_rows
    pairs = together[~torch.eye(top_k, dtype=torch.bool, device=device)]
    assert (pairs - n_drop * (n_drop - 1) / (top_k * (top_k - 1))).abs().max() < 5 * (1 / 3 * 2 / 3 / n_rows) ** 0.5


@pytest.mark.parametrize("block", [16, 64, 2048])
@pytest.mark.parametrize("top_k", [3, 10, 40])
def test_fused_draws_from_the_highest_of_each_bag_however_it_is_cut(device, monkeypatch, block, top_k):
    from acmil.kernels.top_k_masking import fused

    monkeypatch.setattr(fused, "BLOCK", block)
    lengths = [1, 19, 4, 176]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    scores = torch.randn(2, 200, generator=generator(5)).round(decimals=1).to(device)  # with ties
    keep = fused_mask(scores, top_k=top_k, ratio=0.7, offsets=offsets)
    for bag, kept in zip(scores.split(lengths, dim=1), keep.split(lengths, dim=1), strict=True):
        n = bag.shape[1]
        assert ((~kept).sum(dim=1) == n_masked(n, top_k, 0.7)).all()
        least = bag.topk(min(top_k, n), dim=1).values[:, -1:].expand_as(bag)
        assert (bag[~kept] >= least[~kept]).all()


@pytest.mark.parametrize("n", [1, 7, 256, 300, 512, 513, 1000, 1024])
def test_a_bag_searched_in_one_piece_is_masked_as_one_cut_into_many(device, monkeypatch, n):
    from acmil.kernels.top_k_masking import fused

    scores = torch.randn(3, n, generator=generator(6)).round(decimals=1).to(device)  # with ties
    whole = fused_mask(scores, top_k=10, ratio=0.6)
    in_place, maxima = scores.clone(), torch.empty(3, 1, device=device)

    def mask_in_place():
        fused.launch_mask(
            in_place, None, fused.new_picks(3, n, 1, 10, scores.device),
            torch.zeros(3, dtype=torch.int32, device=device), fused.drop_table(10, 0.6, scores.device),
            torch.ones(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device), 10,
            torch.tensor([0, n], device=device), n_find=10, maxima=maxima,
        )  # fmt: skip

    mask_in_place()
    kept = ~torch.isinf(in_place)
    assert torch.equal(maxima[:, 0], in_place.max(dim=1).values)
    monkeypatch.setattr(fused, "BLOCK", 64)
    assert torch.equal(whole, fused_mask(scores, top_k=10, ratio=0.6))
    whole_in_place, whole_maxima = in_place, maxima.clone()
    in_place = scores.clone()
    mask_in_place()
    assert torch.equal(whole_in_place, in_place)
    assert torch.equal(whole_maxima, maxima)
    assert ((~kept).sum(dim=1) == n_masked(n, 10, 0.6)).all()


def test_fused_masks_of_equal_scores_and_of_both_signs(device):
    for scores in (torch.zeros(2, 50), torch.full((2, 50), -1e30), torch.tensor([[-1.0, -2.0, 3.0, 0.0, -0.0]] * 2)):
        n = scores.shape[1]
        keep = fused_mask(scores.to(device), top_k=3, ratio=1.0)
        assert (~keep).sum(dim=1).tolist() == [3, 3]
        if n == 5:
            assert keep.tolist() == [[False, True, False, False, False]] * 2 or keep[:, 2].sum() == 0
    keep = fused_mask(torch.tensor([[-1.0, -2.0, 3.0, 0.5, -7.0]], device=device), top_k=3, ratio=1.0)
    assert keep.tolist() == [[False, True, False, False, True]]


def test_fused_draw_depends_on_the_seed_and_the_row_alone(device):
    scores = torch.arange(30.0, device=device).repeat(20, 1)
    first, second, other = (fused_mask(scores, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) > 15


@pytest.mark.parametrize(("top_k", "ratio"), [(10, 0.6), (10, 1.0), (0, 0.0), (3, 0.0)])
@pytest.mark.parametrize("n_rows", [1, 7, 1500])
def test_fused_maxima_are_of_what_is_left(device, top_k, ratio, n_rows):
    from acmil.kernels.top_k_masking.fused import drop_table, launch_mask, n_to_find, new_picks

    scores = (1e3 * torch.randn(3, n_rows, generator=generator(6))).round().to(device)
    scores[2] = -5.0
    maxima, n_find = torch.empty(3, device=device), n_to_find(top_k, ratio)
    launch_mask(
        scores, None, new_picks(3, n_rows, 1, n_find, device), torch.zeros(3, dtype=torch.int32, device=device),
        drop_table(top_k, ratio, device), torch.tensor([4], device=device), torch.tensor([0], device=device), top_k,
        torch.tensor([0, n_rows], device=device), n_find=n_find, maxima=maxima,
    )  # fmt: skip
    assert torch.isinf(scores).sum(dim=1).tolist() == [n_masked(n_rows, top_k, ratio)] * 3
    assert torch.equal(maxima, scores.max(dim=1).values)


@pytest.mark.gpu
def test_fused_on_a_long_bag():
    scores = torch.randn(5, 200_001, device="cuda")
    keep = fused_mask(scores)
    assert (~keep).sum(dim=1).tolist() == [6] * 5
    least = scores.topk(10, dim=1).values[:, -1:].expand_as(scores)
    assert (scores[~keep] >= least[~keep]).all()
