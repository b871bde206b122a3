"""The resident engine against the eager one, alone and together, resumed and streamed."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch

from acmil.engine import TrainingJob, choose_engine, fit_jobs
from acmil.models import create_model
from acmil.training import fit

# NumPy's, in the interpreter, of what lies behind a bag's last row.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

N_FEATURES, N_CLASSES = 32, 2
LENGTHS = (40, 1, 7, 30, 23, 64, 12, 5)
VAL_LENGTHS = (17, 1, 5, 33)


class SyntheticBag(NamedTuple):
    slide_id: str
    features: np.ndarray
    label: int


def make_bags(name, lengths, seed=0):
    generator = np.random.default_rng(seed)
    bags = []
    for i, n in enumerate(lengths):
        features = generator.standard_normal((n, N_FEATURES)) + 0.3 * (i % N_CLASSES)
        bags.append(SyntheticBag(f"{name}_{i}", features.astype(np.float16), i % N_CLASSES))
    return bags


def make_job(*, seed=0, epochs=3, mask_top_k=10, train=None, val=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            "acmil_ga", in_features=N_FEATURES, n_classes=N_CLASSES, n_branches=3, mask_top_k=mask_top_k,
            mask_ratio=0.6, hidden_features=16, attention_features=16,
        )  # fmt: skip
    return TrainingJob(
        model, train or make_bags("train", LENGTHS), val or make_bags("val", VAL_LENGTHS, 1), epochs=epochs,
        learning_rate=3e-3, min_learning_rate=0.0, warmup_epochs=0.5, weight_decay=1e-2, seed=seed, **options,
    )  # fmt: skip


def score(labels, probabilities):
    right = float(((probabilities[:, 1] > 0.5) == labels).mean())
    return {"f1_macro": right, "auroc": float(probabilities[:, 1].std())}


def train(jobs, device, *, precision="fp32", may_fail=False, **options):
    from acmil.resident import fit_resident

    results = fit_resident(jobs, device=device, score=score, precision=precision, **options)
    for result in results:
        if isinstance(result, Exception) and not may_fail:
            raise result
    return results


def rows(result):
    return [{k: v for k, v in record.as_row().items() if k != "seconds"} for record in result.history]


def check_same(result, expected):
    assert rows(result) == rows(expected)
    assert result.best_epoch == expected.best_epoch
    for weights, others in ((result.best_weights, expected.best_weights), (result.last_weights, expected.last_weights)):
        assert list(weights) == list(others)
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def check_close(result, expected, tolerance):
    for row, other in zip(rows(result), rows(expected), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


def use_the_kernels_masks(monkeypatch, seed, device, batch_size=1):
    """The eager model draws the masks that the resident step draws, by the number of the step and the bag's place."""
    import acmil.models.acmil_gated
    from acmil.kernels.top_k_masking.fused import drop_table, launch_mask, new_picks
    from acmil.training import another_seed

    drawn = [0]

    def draw(scores, *, top_k, ratio, generator, offsets):
        n_lines, n_rows = scores.shape
        offsets = torch.tensor([0, n_rows], device=device) if offsets is None else offsets
        offsets = torch.cat([offsets, offsets[-1:].expand(batch_size + 1 - len(offsets))])  # a step may have fewer
        keep = torch.empty(scores.shape, dtype=torch.bool, device=device)
        launch_mask(
            scores.detach().contiguous(), keep, new_picks(n_lines, n_rows, batch_size, top_k, device),
            torch.zeros(n_lines * batch_size, dtype=torch.int32, device=device), drop_table(top_k, ratio, device),
            torch.tensor([another_seed(seed)], device=device), torch.tensor(drawn, device=device), top_k,
            offsets, n_find=top_k,
        )  # fmt: skip
        drawn[0] += 1
        return keep

    monkeypatch.setattr(acmil.models.acmil_gated, "stochastic_top_k_mask", draw)
    return drawn


def test_200_steps_agree_with_the_eager_engine_by_the_same_masks(device, monkeypatch):
    (result,) = train([make_job(epochs=25)], device)
    drawn = use_the_kernels_masks(monkeypatch, 0, device)
    expected = fit(**vars(make_job(epochs=25)), device=device, score=score, precision="fp32")
    assert drawn == [200]
    check_close(result, expected, 2e-3)  # rounding grows from step to step
    check_close(result._replace(history=result.history[:2]), expected._replace(history=expected.history[:2]), 1e-5)
    assert result.history[-1].train_loss < 0.8 * result.history[0].train_loss
    for name, weight in result.last_weights.items():
        if name == "score.bias":
            continue  # softmax is blind to it: its gradient is rounding alone, which AdamW scales up to a step
        torch.testing.assert_close(weight, expected.last_weights[name], rtol=5e-3, atol=5e-3)


def test_several_bags_a_step_agree_with_the_eager_engine_by_the_same_masks(device, monkeypatch):
    """Steps of 3, 3 and 2 bags."""
    jobs = [make_job(epochs=6, batch_size=3) for _ in range(2)]
    (result,) = train(jobs[:1], device)
    drawn = use_the_kernels_masks(monkeypatch, 0, device, batch_size=3)
    expected = fit(**vars(jobs[1]), device=device, score=score, precision="fp32")
    assert drawn == [18]
    check_close(result, expected, 1e-3)
    check_close(result._replace(history=result.history[:3]), expected._replace(history=expected.history[:3]), 1e-5)
    assert result.history[-1].train_loss < result.history[0].train_loss


@pytest.mark.gpu  # the interpreter gets products of bf16 wrong
def test_bf16_agrees_with_the_eager_engine_to_its_rounding(device):
    (result,) = train([make_job(mask_top_k=0, epochs=25)], device, precision="bf16")
    expected = fit(**vars(make_job(mask_top_k=0, epochs=25)), device=device, score=score, precision="bf16")
    losses = [[row[name] for name in row if "loss" in name] for row in rows(result)]
    others = [[row[name] for name in row if "loss" in name] for row in rows(expected)]
    np.testing.assert_allclose(losses, others, rtol=2e-2, atol=2e-2)


def test_runs_together_give_what_each_gives_alone(device):
    bags, val = make_bags("train", LENGTHS), make_bags("val", VAL_LENGTHS, 1)
    grid = [
        {"seed": 0},
        {"seed": 1, "epochs": 2},
        {"seed": 2, "train": bags[3:] + val[:2], "val": [*val[2:], *bags[:3]], "mask_top_k": 4},
        {"seed": 3, "epochs": 2, "batch_size": 3},
        {"seed": 4, "epochs": 2, "batch_size": 3, "train": bags[1:]},
    ]
    ended = []
    together = train([make_job(**one) for one in grid], device, group=2, on_result=lambda n, _: ended.append(n))
    assert ended[0] == 1
    assert sorted(ended) == [0, 1, 2, 3, 4]
    for one, result in zip(grid, together, strict=True):
        check_same(result, train([make_job(**one)], device)[0])


@pytest.mark.parametrize(("on_device", "batch_size"), [(0, 1), (45, 1), (0, 2), (45, 2)])
def test_streamed_features_give_the_same_bits(device, monkeypatch, on_device, batch_size):
    from acmil import resident

    lengths, val_lengths = (20, 1, 7, 24, 24, 19, 12, 5), (17, 1, 5, 11)
    bags, val = make_bags("train", lengths), make_bags("val", val_lengths, 1)

    def job():
        return make_job(epochs=2, batch_size=batch_size, train=bags, val=val)

    (expected,) = train([job()], device)
    ring = (3 if batch_size == 1 else 2 * batch_size) * max(lengths)
    room = (on_device + ring) * N_FEATURES * 4
    assert on_device + ring < sum(lengths) + sum(val_lengths)
    stores, plain = [], resident.Store

    def store(*arguments):
        stores.append(plain(*arguments))
        return stores[-1]

    monkeypatch.setattr(resident, "Store", store)
    (result,) = train([job()], device, feature_bytes=room)
    check_same(result, expected)
    (placed,) = stores
    assert placed.features.nbytes <= room
    assert len(placed.features) - placed.ring_start == ring
    assert placed.ring_start == (0 if on_device == 0 else 17 + 1 + 5 + 11 + 1 + 7)  # those that still fit, in order


def test_a_run_without_room_for_the_bags_of_its_steps_says_so(device):
    room = (3 * max(LENGTHS) - 1) * N_FEATURES * 4
    (result,) = train([make_job()], device, may_fail=True, feature_bytes=room)
    with pytest.raises(ValueError, match=r"room on the device for 0\.0 GB .* Lower batch_size, or give engine eager"):
        raise result


def test_runs_of_many_bags_a_step_form_groups_that_a_launch_takes(device, monkeypatch):
    from acmil import resident

    groups, plain = [], resident._Group

    def group(runs, *arguments):
        groups.append(sorted(runs))
        return plain(runs, *arguments)

    monkeypatch.setattr(resident, "_Group", group)
    bags = make_bags("train", [3] * 12)
    train([make_job(seed=seed, epochs=1, batch_size=12, train=bags) for seed in range(3)], device)
    assert sorted(groups) == [[0, 2], [1]]  # 36 bags would be more than 32


def test_streamed_runs_together_give_the_same_bits(device):
    """Bags of two runs take turns in the ring; with room for that of one alone, the runs train one after the other."""
    jobs = [{"seed": 0, "epochs": 2}, {"seed": 1, "epochs": 2, "train": make_bags("train", LENGTHS)[2:]}]
    expected = [train([make_job(**one)], device)[0] for one in jobs]
    for n_rings in (2, 1):
        room = n_rings * 3 * max(LENGTHS) * N_FEATURES * 4
        for result, alone in zip(
            train([make_job(**one) for one in jobs], device, feature_bytes=room), expected, strict=True
        ):
            check_same(result, alone)


def test_a_resumed_run_gives_the_bits_of_an_undisturbed_one(device):
    states = []
    (expected,) = train([make_job(checkpoint=states.append)], device)
    assert [len(state["history"]) for state in states] == [1, 2, 3]
    (result,) = train([make_job(seed=0, state=states[0])], device)
    check_same(result, expected)
    together = train([make_job(state=states[1]), make_job(), make_job(state=states[2])], device)
    for result in together:
        check_same(result, expected)


def test_a_resumed_run_of_several_bags_a_step_gives_the_bits_of_an_undisturbed_one(device):
    states, options = [], {"epochs": 2, "batch_size": 3}
    (expected,) = train([make_job(checkpoint=states.append, **options)], device)
    (result,) = train([make_job(state=states[0], **options)], device)
    check_same(result, expected)
    (other,) = train([make_job(state=states[0], epochs=2, batch_size=2)], device, may_fail=True)
    with pytest.raises(ValueError, match="batch_size 3 → 2"):
        raise other


def test_a_state_of_the_eager_engine_is_refused(device):
    states = []
    fit(**vars(make_job(epochs=2, checkpoint=states.append)), device=device, score=score)
    (result,) = train([make_job(epochs=2, state=states[0])], device, may_fail=True)
    with pytest.raises(ValueError, match="engine 'eager' → 'resident'"):
        raise result


def test_a_run_that_fails_leaves_the_others(device):
    bags = make_bags("train", LENGTHS)
    features = bags[2].features.copy()
    features[3, 5] = np.nan
    bad = [*bags[:2], bags[2]._replace(slide_id="damaged", features=features), *bags[3:]]
    jobs = [make_job(train=bad), make_job(epochs=2), make_job(train=[bags[0]._replace(label=7)])]
    results = train(jobs, device, may_fail=True)
    assert "NaN or Inf in bag 'damaged'" in str(results[0])
    assert "label of a train bag must be 0 to 1, got 7" in str(results[2])
    check_same(results[1], train([make_job(epochs=2)], device)[0])


def test_runs_that_cannot_begin_leave_the_others(device):
    states = []
    (expected,) = train([make_job(epochs=2, checkpoint=states.append)], device)
    damaged = {**states[0], "optimizer": {name: t for name, t in states[0]["optimizer"].items() if name != "powers"}}
    wide = make_job()
    wide.model.options["in_features"] = 48
    ended = []
    jobs = [wide, make_job(epochs=2, state=damaged), make_job(epochs=2)]
    results = train(jobs, device, may_fail=True, on_result=lambda number, _: ended.append(number))
    assert "features must have in_features 48 columns, got 32" in str(results[0])
    assert "the optimizer's state must have shapes" in str(results[1])
    check_same(results[2], expected)
    assert sorted(ended) == [0, 1, 2]


def test_a_group_that_fails_leaves_the_others(device, monkeypatch):
    """What is wrong in one launch is the end of its runs alone."""
    from acmil.resident import _Group

    plain, calls = _Group.enqueue, []

    def enqueue(group):
        calls.append(1)
        if len(group.members) == 2 and len(calls) > 2:
            raise MemoryError("no room")
        plain(group)

    monkeypatch.setattr(_Group, "enqueue", enqueue)
    jobs = [make_job(), make_job(seed=1), make_job(epochs=2, mask_top_k=4)]
    results = train(jobs, device, may_fail=True)
    assert [str(result) for result in results[:2]] == ["no room", "no room"]
    monkeypatch.undo()
    check_same(results[2], train([make_job(epochs=2, mask_top_k=4)], device)[0])


def test_a_size_of_group_that_no_launch_takes_is_refused(device):
    for size in (0, 33):
        with pytest.raises(ValueError, match=f"group must be 1 to 32, got {size}"):
            train([make_job()], device, group=size)


def test_more_bags_a_step_than_a_launch_takes_are_refused(device):
    results = train([make_job(batch_size=33), make_job(epochs=1)], device, may_fail=True)
    assert str(results[0]) == "batch_size must be 1 to 32, got 33."
    assert len(results[1].history) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_loss_that_is_not_finite_names_the_bag(device, batch_size):
    job = make_job(epochs=2, batch_size=batch_size)
    with torch.no_grad():
        job.model.bag_head.weight.fill_(float("inf"))
    (result,) = train([job], device, may_fail=True)
    names = "', '".join(["train_."] * batch_size)
    with pytest.raises(ValueError, match=f"training loss must be finite, got nan at bag '{names}' in epoch 0"):
        raise result


def test_the_model_is_left_with_the_last_weights(device):
    job = make_job(epochs=2)
    (result,) = train([job], device)
    assert not job.model.training
    for name, weight in job.model.state_dict().items():
        assert torch.equal(weight.cpu(), result.last_weights[name])


def test_engine_is_chosen_by_what_is_there():
    options = make_job().model.options
    cpu = torch.device("cpu")
    choice = choose_engine("auto", device=cpu, model="acmil_ga", options=options)
    assert choice.engine == "eager"
    assert "GPU" in choice.reason or "CPU" in choice.reason
    with pytest.raises(ValueError, match="engine resident cannot be had"):
        choose_engine("resident", device=cpu, model="acmil_ga", options=options)
    with pytest.raises(ValueError, match="engine must be auto, eager or resident, got 'fast'"):
        choose_engine("fast", device=cpu, model="acmil_ga", options=options)


@pytest.mark.gpu
def test_engine_on_a_gpu():
    device, options = torch.device("cuda"), make_job().model.options

    def choose(model="acmil_ga", batch_size=1, **others):
        return choose_engine("auto", device=device, model=model, options=options | others, batch_size=batch_size)

    assert choose().engine == "resident"
    assert "acmil_mha" in choose(model="acmil_mha").reason
    assert choose(batch_size=32).engine == "resident"
    assert "at most 32 bags, 33 a step are asked for" in choose(batch_size=33).reason
    assert "hidden_features 20" in choose(hidden_features=20).reason
    assert "at most 256 logits of all branches and the bag, got 480" in choose(n_branches=15, n_classes=30).reason
    assert "fewer than 256 tiles, got mask_top_k 256" in choose(mask_top_k=256).reason
    (result,) = fit_jobs([make_job()], engine="resident", device=device, score=score, precision="bf16")
    assert len(result.history) == 3


@pytest.mark.parametrize("rows_at_once", [1, 2**18])
def test_validation_agrees_with_the_model(device, monkeypatch, rows_at_once):
    """Logits, entropy and top-10 mass, of one bag after the other and of many together."""
    from acmil.kernels.training_step import validation

    monkeypatch.setattr(validation, "ROWS_AT_ONCE", rows_at_once)
    (result,) = train([dataclasses.replace(make_job(), learning_rate=1e-12)], device)
    expected = fit(**vars(dataclasses.replace(make_job(), learning_rate=1e-12)), device=device, score=score)
    for row, other in zip(rows(result), rows(expected), strict=True):
        names = [name for name in row if not name.startswith("train")]
        assert {n: row[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-4)
