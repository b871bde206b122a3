"""The forward pass of validation against PyTorch in float64, several bags of several models at a time."""

import math

import pytest
import torch

from acmil.kernels.gated_scores.reference import gated_attention_scores
from acmil.kernels.training_step.parameters import GatedParameters, Sizes

SIZES = Sizes(16, 32, 16, 3, 2)
LENGTHS = [1, 2500, 129, 1025, 9]  # a tile, one slot of the logits' sums and the next, one block of attention and more
OF_MODELS = [[0, 1, 2], [3], [4, 0]]


def make_model(seed):
    generator = torch.Generator().manual_seed(seed)
    return GatedParameters(*(0.3 * torch.randn(shape, generator=generator) for shape in SIZES.shapes()))


def make_pass(device, *, seeds=(0, 1, 2), lengths=LENGTHS, longest_trained=50, at_once=2, n_bags=3):
    from acmil.kernels.training_step.fused import TrainingStep
    from acmil.kernels.training_step.validation import ValidationPass

    generator = torch.Generator().manual_seed(3)
    features = torch.randn((sum(LENGTHS), SIZES.features), generator=generator).to(device)
    step = TrainingStep(
        [make_model(seed) for seed in seeds], features=features, longest=longest_trained, positions=1,
        top_k=10, ratio=0.6, weight_decay=0.0, seeds=seeds,
    )  # fmt: skip
    validation = ValidationPass(step, longest=max(lengths), n_bags=n_bags, n_top=10, at_once=at_once)
    for name in (
        "hidden",
        "scores",
        "projections",
        "sums",
        "maxima",
        "inverses",
        "entropies",
        "all_logits",
        "all_spread",
    ):
        getattr(validation, name).fill_(float("nan"))
    return validation


def look_at(validation, of_models):
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    bags = torch.zeros((len(of_models), validation.positions, validation.at_once, 3), dtype=torch.int64)
    for model, numbers in enumerate(of_models):
        for place, number in enumerate(numbers):
            at = divmod(place, validation.at_once)
            bags[model, at[0], at[1]] = torch.tensor([starts[number], LENGTHS[number], 0])
    validation.schedule(bags.to(validation.cursor.device))
    for _ in range(validation.positions):
        validation.launch()
    return [[part[: len(numbers)] for part in validation.results_of(m)] for m, numbers in enumerate(of_models)]


def expected_of(step, model, number):
    p = GatedParameters(*(t.double() for t in step.parameters_of(model)))
    start = sum(LENGTHS[:number])
    x = step.features[start : start + LENGTHS[number]].double()
    hidden, scores = gated_attention_scores(
        x, p.reduction_weight, p.v_weight, p.v_bias, p.u_weight, p.u_bias, p.score_weight, p.score_bias
    )
    mean = scores.softmax(dim=1).mean(dim=0)
    n = LENGTHS[number]
    entropy = torch.special.entr(mean).sum().item() / math.log(n) if n > 1 else 1.0
    return p.bag_head_weight @ (mean @ hidden) + p.bag_head_bias, [entropy, mean.topk(min(10, n)).values.sum().item()]


@pytest.mark.parametrize("longest_trained", [50, 9000])  # H of its own, or the step's
def test_logits_and_spread_agree_with_pytorch(device, longest_trained):
    validation = make_pass(device, longest_trained=longest_trained)
    for model, (logits, spread) in enumerate(look_at(validation, OF_MODELS)):
        for place, number in enumerate(OF_MODELS[model]):
            expected_logits, expected_spread = expected_of(validation.step, model, number)
            torch.testing.assert_close(logits[place].double(), expected_logits, rtol=1e-5, atol=1e-5)
            assert spread[place].tolist() == pytest.approx(expected_spread, rel=1e-5)


def test_a_bag_gives_the_same_bits_whatever_is_looked_at_beside_it(device):
    together = look_at(make_pass(device), OF_MODELS)
    for number, place in ((2, 2), (0, 0)):
        alone = make_pass(device, seeds=(0,), lengths=[LENGTHS[number]], at_once=1, n_bags=1)
        for of_all, of_one in zip(together[0], look_at(alone, [[number]])[0], strict=True):
            assert torch.equal(of_all[place], of_one[0])


def test_more_bags_than_a_launch_takes_are_refused(device):
    with pytest.raises(ValueError, match="bags at once must be 1 to 32 for all models, got 11 of each of 3"):
        make_pass(device, at_once=11)
