"""The fused training step against the reference in float64: losses, gradients, AdamW, the order of bags."""

import pytest
import torch

from acmil.kernels.training_step import GatedParameters, loss_terms
from acmil.kernels.training_step.parameters import Sizes, sizes_of, views_of

SCRATCH = (
    "hidden", "gate", "d_gate", "d_reduced", "scores", "projections", "sums", "maxima", "inverses", "d_logits",
    "d_pairs", "correction", "small", "large", "losses",
)  # fmt: skip
RATE, DECAY = 1e-3, 1e-2


def make_parameters(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GatedParameters(
        *(torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) > 1 else 4.0) for s in sizes.shapes())
    )


def make_step(sizes, lengths, device, *, top_k=10, dtype=torch.float32, seeds=(7,), positions=None, batch_size=1):
    """A step and its bags, (len(lengths), 3); the model of a seed is always the same."""
    from acmil.kernels.training_step.fused import TrainingStep

    generator = torch.Generator().manual_seed(3)
    features = torch.randn((sum(lengths), sizes.features), generator=generator).to(device, dtype)
    labels = torch.randint(sizes.classes, (len(lengths),), generator=generator)
    n_rows = torch.tensor(lengths)
    step = TrainingStep(
        [make_parameters(sizes, seed) for seed in seeds], features=features, longest=max(lengths),
        positions=positions or len(lengths), top_k=top_k, ratio=0.6, weight_decay=DECAY, seeds=seeds,
        batch_size=batch_size,
    )  # fmt: skip
    return step, torch.stack([n_rows.cumsum(0) - n_rows, n_rows, labels], dim=1).to(device)


def schedule(step, bags, *orders):
    """Order of bags of each model, or of the bags of each of its steps; rates fall."""
    rates = torch.linspace(RATE, RATE / 2, len(orders[0]), dtype=torch.float64, device=bags.device)
    scheduled = bags.new_zeros((len(orders), len(orders[0]), step.batch_size, 3))
    for model, order in enumerate(orders):
        for t, of_step in enumerate(order):
            numbers = of_step if isinstance(of_step, list) else [of_step]
            scheduled[model, t, : len(numbers)] = bags[numbers]
    step.schedule(scheduled, rates.expand(len(orders), -1))
    return rates.tolist()


def poison(step):
    for name in SCRATCH:
        getattr(step, name).fill_(float("nan"))


def as_multiplied(parameters, dtype):
    """The parameters as the step multiplies them, rounded to its type, with the gradients of the unrounded ones."""
    names = ("reduction_weight", "v_weight", "u_weight", "score_weight", "branch_head_weight", "bag_head_weight")
    exact = parameters._asdict()
    rounded = {name: exact[name] + (exact[name].to(dtype).double() - exact[name]).detach() for name in names}
    return parameters._replace(**rounded)


def check_steps(step, bags, order, relative_error, tolerance, expected_dropped):
    """Steps of a single model against the reference; an entry of `order` is a bag, or a list of bags."""
    rates = schedule(step, bags, order)
    parameters = step.parameters_of(0)
    exact = GatedParameters(*(p.detach().double().clone().requires_grad_() for p in parameters))
    optimizer = torch.optim.AdamW(exact, lr=RATE, weight_decay=DECAY)
    for t, (of_step, rate) in enumerate(zip(order, rates, strict=True)):
        numbers = of_step if isinstance(of_step, list) else [of_step]
        poison(step)
        step.launch()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for place, bag in enumerate(numbers):
            start, n, label = bags[bag].tolist()
            keep = ~torch.isinf(step.scores.unflatten(0, (-1, step.sizes.branches))[place, :, :n])
            assert (~keep).sum(dim=1).tolist() == [expected_dropped[bag]] * step.sizes.branches
            x = step.features[start : start + n].double()
            rounded = as_multiplied(exact, step.features.dtype)
            terms = loss_terms(rounded, x, torch.tensor(label, device=x.device), keep)
            (terms.total / len(numbers)).backward()
            assert step.losses[place, t].tolist() == pytest.approx(
                [term.item() for term in terms], rel=tolerance, abs=tolerance
            )
        optimizer.step()
        moments = (views_of(moment[0, : step.sizes.n_all], step.sizes) for moment in step.moments)
        for name, first, second, value, parameter in zip(
            GatedParameters._fields, *moments, parameters, exact, strict=True
        ):
            if parameter.grad is None:
                assert torch.equal(value.double(), parameter.detach()), name
            elif name != "score_bias":  # its gradient is nothing but rounding
                state = optimizer.state[parameter]
                assert relative_error(first, state["exp_avg"]) < tolerance, (t, name)
                assert relative_error(second, state["exp_avg_sq"]) < 2 * tolerance, (t, name)
                assert relative_error(value, parameter) < tolerance, (t, name)


LENGTHS = [100, 1, 37, 200]
DROPPED = [6, 0, 6, 6]


def test_several_steps(device, relative_error):
    step, bags = make_step(Sizes(48, 80, 48, 5, 3), LENGTHS, device)
    check_steps(step, bags, [3, 0, 1, 2], relative_error, 2e-5, DROPPED)


def test_most_branches_and_several_classes(device, relative_error):
    step, bags = make_step(Sizes(16, 32, 16, 16, 4), [60, 3], device)
    check_steps(step, bags, [0, 1], relative_error, 2e-5, [6, 1])


def test_one_branch_without_masking(device, relative_error):
    step, bags = make_step(Sizes(32, 16, 16, 1, 2), [70, 5], device, top_k=0)
    check_steps(step, bags, [1, 0], relative_error, 2e-5, [0, 0])


def test_several_bags_a_step(device, relative_error):
    """The loss is their mean; bags of very different lengths, and a step that has fewer."""
    step, bags = make_step(Sizes(48, 80, 48, 5, 3), [*LENGTHS, 600], device, batch_size=3)
    check_steps(step, bags, [[3, 0, 1], [4, 2], [1, 4, 4], [0]], relative_error, 2e-5, [*DROPPED, 6])
    assert step.cursor[:, 5].tolist() == [4, 4, 4]  # masks drawn: steps, for every place


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bags_in_several_shares(device, relative_error, monkeypatch, batch_size):
    """Bags of one, two and three shares of the rows, whose partial sums stand side by side."""
    from acmil.kernels.gated_scores.launches import Shares
    from acmil.kernels.training_step import fused

    monkeypatch.setattr(fused, "choose_shares", lambda *_, **__: Shares(2, 3, 550, 256))
    step, bags = make_step(Sizes(32, 32, 16, 2, 2), [300, 100, 600], device, batch_size=batch_size)
    assert [step.shares.of(n) for n in (300, 100, 600)] == [2, 1, 3]
    order = [0, 1, 2] if batch_size == 1 else [[0, 1, 2], [2, 0]]
    check_steps(step, bags, order, relative_error, 2e-5, [6, 6, 6])


@pytest.mark.parametrize(
    ("n_features", "n_hidden", "n_bags", "shares"),
    [(1024, 512, 1, (3, 6)), (1024, 512, 2, (3, 3)), (1024, 512, 4, (1, 3)), (1024, 512, 16, (1, 1)),
     (384, 128, 1, (22, 26)), (384, 128, 4, (6, 6)), (384, 128, 16, (1, 3))],
)  # fmt: skip
def test_shares_fill_132_processors_once_and_no_more_than_pays(monkeypatch, n_features, n_hidden, n_bags, shares):
    """Where measured, those that whole steps on an H100 are fastest with, or within 3 % (docs/experiments.md)."""
    from acmil.kernels.gated_scores import launches

    monkeypatch.setattr(launches, "n_processors", lambda _: 132)
    chosen = launches.choose_shares(
        n_features, n_hidden, 128, torch.bfloat16, torch.device("cpu"), heads=True, bags_a_model=n_bags
    )
    assert chosen[:2] == shares
    assert chosen.of(1_000) == (4 if (n_features, n_bags) == (384, 1) else 1)


def test_several_bags_a_step_of_one_branch(device, relative_error):
    step, bags = make_step(Sizes(32, 16, 16, 1, 2), [70, 5], device, top_k=0, batch_size=2)
    check_steps(step, bags, [[1, 0], [0]], relative_error, 2e-5, [0, 0])


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_equal_and_large_scores(device, relative_error, scale):
    step, bags = make_step(Sizes(48, 80, 48, 5, 3), LENGTHS, device)
    step.parameters_of(0).score_weight.mul_(scale)  # all the same, or far apart: one tile has it all
    check_steps(step, bags, [3, 0, 1], relative_error, 1e-4, DROPPED)


def test_half_types(device, relative_error):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter gets products of bf16 wrong
    step, bags = make_step(Sizes(64, 32, 32, 3, 2), [150], device, dtype=dtype)
    check_steps(step, bags, [0], relative_error, 3e-2, [6])
    parameters, weights = step.parameters_of(0), step.weights_of(0)
    torch.testing.assert_close(weights.reduction, parameters.reduction_weight.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(weights.u, parameters.u_weight.to(dtype), rtol=0, atol=0)


def test_half_types_in_wide_tiles(device, relative_error):
    """Signs of 320 columns in tiles of 256, the last of which reaches beyond the matrix."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    step, bags = make_step(Sizes(32, 320, 16, 2, 2), [400], device, dtype=dtype)
    check_steps(step, bags, [0], relative_error, 3e-2, [6])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "l"), [(10_000, 1024, 512), (65_537, 384, 128), (777, 1536, 768)])
def test_full_size(relative_error, n, d, l, dtype):  # noqa: E741
    step, bags = make_step(Sizes(d, l, 128, 5, 2), [n, 130], torch.device("cuda"), dtype=dtype)
    check_steps(step, bags, [0], relative_error, 3e-2 if dtype == torch.bfloat16 else 1e-3, [6, 6])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_bags_a_step_at_full_size(relative_error, dtype):
    lengths = [10_000, 130, 40_000, 1, 17_000]
    step, bags = make_step(Sizes(1024, 512, 128, 5, 2), lengths, torch.device("cuda"), dtype=dtype, batch_size=4)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-3
    check_steps(step, bags, [[0, 1, 2, 3]], relative_error, tolerance, [6, 6, 6, 0, 6])
    step, _ = make_step(Sizes(1024, 512, 128, 5, 2), lengths, torch.device("cuda"), dtype=dtype, batch_size=4)
    check_steps(step, bags, [[4, 3]], relative_error, tolerance, [6, 6, 6, 0, 6])


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("order", "batch_size"), [([2, 0, 3, 1, 2, 0], 1), ([[2, 0, 3], [1, 2], [0], [3, 1], [2], [1]], 3)]
)
def test_a_captured_graph_does_every_bag_and_capture_changes_nothing(order, batch_size, steps):
    lengths, sizes, device = [900, 1, 3000, 64], Sizes(128, 64, 64, 5, 2), torch.device("cuda")
    (one, bags), (two, _) = (
        make_step(sizes, lengths, device, dtype=torch.bfloat16, positions=6, batch_size=batch_size) for _ in range(2)
    )
    for step in (one, two):
        schedule(step, bags, order)
    graphs = two.capture([max(lengths)], steps)
    assert torch.equal(one.master, two.master)
    for number in range(6):
        one.launch()
        if number % steps == 0:
            graphs[0].replay()
    assert torch.equal(one.master, two.master)
    assert torch.equal(one.losses[:, :6], two.losses[:, :6])
    assert torch.isfinite(two.losses[0, :6]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_that_overlap_give_the_bits_of_those_that_do_not(dtype, monkeypatch):
    """Hundreds of steps of short bags, two a graph: what is read before a wait is what was written last."""
    from acmil.kernels.gated_scores import launches
    from acmil.kernels.top_k_masking import fused as top_k_masking
    from acmil.kernels.training_step import fused

    lengths, n_steps, results = [1, 1000, 37, 300], 400, []
    for is_chained in (True, False):
        if not is_chained:
            for module in (launches, top_k_masking, fused):
                monkeypatch.setattr(module, "chained", lambda _: {"CHAINED": False})
        step, bags = make_step(
            Sizes(1024, 512, 128, 5, 2), lengths, torch.device("cuda"), dtype=dtype, positions=n_steps
        )
        schedule(step, bags, [number * 7 % 4 for number in range(n_steps)])
        graph = step.capture([max(lengths)], 2)[0]
        poison(step)
        for _ in range(n_steps // 2):
            graph.replay()
        results.append((step.master, step.moments, step.losses[:, :n_steps]))
    for overlapped, apart in zip(*results, strict=True):
        assert torch.isfinite(apart).all()
        assert torch.equal(overlapped, apart)


BITS = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in the interpreter, of NaN
@pytest.mark.parametrize("dtype", BITS)
def test_models_together_give_the_bits_of_each_alone(device, dtype, monkeypatch):
    """Bags of very different sizes and up to four shares, a model without one at two steps, and one that became NaN."""
    from acmil.kernels.gated_scores.launches import Shares
    from acmil.kernels.training_step import fused

    monkeypatch.setattr(fused, "choose_shares", lambda *_, **__: Shares(3, 4, 500, 128))
    lengths = [100, 1, 37, 520, 390]
    sizes, orders = Sizes(48, 80, 48, 3, 3), [[3, 0, 1, 4], [2, 2, 3, 1], [4, 3, 0, 2], [1, 0, 2, 3]]
    seeds = (7, 8, 9, 10)
    together, bags = make_step(sizes, lengths, device, dtype=dtype, seeds=seeds)
    idle = torch.cat([bags, torch.zeros_like(bags[:1])])
    orders[1] = [2, 5, 3, 5]
    together.parameters_of(3).branch_head_weight.fill_(float("nan"))
    together.below[3].fill_(float("nan"))
    schedule(together, idle, *orders)
    poison(together)
    for _ in range(4):
        together.launch()
    for model, (seed, order) in enumerate(zip(seeds[:3], orders, strict=False)):
        alone, _ = make_step(sizes, lengths, device, dtype=dtype, seeds=(seed,))
        rates = torch.linspace(RATE, RATE / 2, 4, dtype=torch.float64, device=device)
        has_bag = [place for place, bag in enumerate(order) if bag < 5]
        alone.schedule(bags[[order[place] for place in has_bag]][None, :, None], rates[has_bag][None])
        for place in has_bag:
            alone.launch(lengths[order[place]])  # as a graph for bags of this size would
        assert torch.equal(together.losses[model, has_bag], alone.losses[0, : len(has_bag)])
        assert torch.isfinite(alone.losses[0, : len(has_bag)]).all()
        parameters = zip(GatedParameters._fields, together.parameters_of(model), alone.parameters_of(0), strict=True)
        assert [name for name, one, other in parameters if not torch.equal(one, other)] == [], model
        assert torch.equal(together.moments[:, model], alone.moments[:, 0])
        assert together.cursor[model, 5] == len(has_bag)  # masks drawn
    assert torch.isnan(together.losses[3, 0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_together_give_the_bits_of_each_alone_at_full_size(dtype):
    device, lengths = torch.device("cuda"), [10_000, 700, 40_000, 5_000, 17_000, 70_000]
    sizes, seeds = Sizes(256, 512, 128, 5, 2), (7, 8, 9, 10, 11)
    orders = [[0, 1, 2], [2, 0, 5], [3, 4, 1], [5, 2, 0], [1, 3, 4]]
    together, bags = make_step(sizes, lengths, device, dtype=dtype, seeds=seeds)
    schedule(together, bags, *orders)
    for _ in range(3):
        together.launch()
    for model, (seed, order) in enumerate(zip(seeds, orders, strict=True)):
        alone, _ = make_step(sizes, lengths, device, dtype=dtype, seeds=(seed,))
        schedule(alone, bags, order)
        for bag in order:
            alone.launch(lengths[bag])
        assert torch.equal(together.losses[model, :3], alone.losses[0, :3])
        assert torch.equal(together.master[model], alone.master[0])


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in the interpreter, of NaN
@pytest.mark.parametrize("dtype", BITS)
def test_models_of_several_bags_a_step_give_the_bits_of_each_alone(device, dtype):
    """Whatever size a launch is for, also where a model has fewer bags, or has ended."""
    lengths, sizes, seeds = [100, 1, 37, 520, 390], Sizes(48, 80, 48, 3, 3), (7, 8, 9)
    orders = [[[3, 0, 1], [4, 2, 0]], [[2, 1, 2], [3]], [[4, 3], []]]
    together, bags = make_step(sizes, lengths, device, dtype=dtype, seeds=seeds, batch_size=3)
    schedule(together, bags, *orders)
    poison(together)
    for _ in range(2):
        together.launch()
    for model, (seed, order) in enumerate(zip(seeds, orders, strict=True)):
        alone, _ = make_step(sizes, lengths, device, dtype=dtype, seeds=(seed,), batch_size=3)
        schedule(alone, bags, order)
        for step, numbers in enumerate(order):
            alone.launch(max((lengths[bag] for bag in numbers), default=1))
            losses = together.losses[3 * model : 3 * model + len(numbers), step]
            assert torch.equal(losses, alone.losses[: len(numbers), step])
            assert torch.isfinite(losses).all()
        assert torch.equal(together.master[model], alone.master[0])
        assert torch.equal(together.moments[:, model], alone.moments[:, 0])


def test_two_models_of_one_branch(device):
    """The branch's own head stays as it is; matrices of 32 x 8 numbers end within a block of the update."""
    sizes, seeds = Sizes(16, 16, 16, 1, 2), (7, 8)
    together, bags = make_step(sizes, [70, 5], device, seeds=seeds)
    schedule(together, bags, [0, 1], [1, 0])
    initial = together.master.clone()
    for _ in range(2):
        together.launch()
    for model, (seed, order) in enumerate(zip(seeds, [[0, 1], [1, 0]], strict=True)):
        alone, _ = make_step(sizes, [70, 5], device, seeds=(seed,))
        schedule(alone, bags, order)
        for _ in range(2):
            alone.launch()
        assert torch.equal(together.master[model], alone.master[0])
        before = views_of(initial[model, : sizes.n_all], sizes)
        assert torch.equal(together.parameters_of(model).branch_head_weight, before.branch_head_weight)
        assert not torch.equal(together.parameters_of(model).bag_head_weight, before.bag_head_weight)


def test_a_step_without_any_bag_changes_nothing(device):
    step, bags = make_step(Sizes(16, 16, 16, 2, 2), [60, 40], device, seeds=(7, 8))
    schedule(step, torch.zeros_like(bags), [0, 1], [1, 0])
    kept = [getattr(step, name).clone() for name in ("master", "moments", "work", "powers")]
    step.launch()
    for name, before in zip(("master", "moments", "work", "powers"), kept, strict=True):
        assert torch.equal(getattr(step, name), before), name
    assert step.cursor[:, 0].tolist() == [1, 1]  # the next position
    assert step.cursor[:, 5].tolist() == [0, 0]  # no masks drawn


def test_the_same_seed_gives_the_same_bits_and_another_one_other_masks(device):
    masters = []
    for seed in (7, 7, 8):
        step, bags = make_step(Sizes(16, 16, 16, 2, 2), [60], device)
        step.seeds.fill_(seed)
        schedule(step, bags, [0])
        step.launch()
        masters.append(step.master)
    assert torch.equal(masters[0], masters[1])
    assert not torch.equal(masters[0], masters[2])


def test_masks_of_one_bag_differ_from_step_to_step(device):
    step, bags = make_step(Sizes(16, 16, 16, 2, 2), [60], device, positions=3)
    schedule(step, bags, [0, 0, 0])
    step.rates.zero_()  # the parameters stay: only the draw changes
    masks = []
    for _ in range(3):
        step.launch()
        masks.append(torch.isinf(step.scores[:, :60]).clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_what_is_refused(device):
    sizes = Sizes(16, 16, 16, 2, 2)
    step, bags = make_step(sizes, [60], device)
    with pytest.raises(ValueError, match=r"1 to 1 steps and 1 bags a step, got \(1, 2, 1, 3\) and \(1, 2\)"):
        schedule(step, bags, [0, 0])
    for batch_size in (0, 17):
        with pytest.raises(ValueError, match=f"batch_size must be 1 to 16 for 2 models, got {batch_size}"):
            make_step(sizes, [60], device, seeds=(7, 8), batch_size=batch_size)
    with pytest.raises(ValueError, match="models must be 1 to 32, with a seed each, got 33 and 33 seeds"):
        make_step(sizes, [60], device, seeds=tuple(range(33)))
    with pytest.raises(ValueError, match="got 0 and 0 seeds"):
        make_step(sizes, [60], device, seeds=())
    wrong = make_parameters(sizes)._replace(v_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"v_bias must have shape \(16,\), got \(3,\)"):
        sizes_of(wrong)
