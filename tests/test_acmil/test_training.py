"""The training loop: it learns, follows the recipe, repeats itself, resumes exactly, and says which bag was broken."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from acmil.checkpoint import load_state, save_state
from acmil.engine import TrainingJob
from acmil.models import create_model
from acmil.selection import EpochRecord, selection_score
from acmil.training import fit, learning_rate_at, run_settings

NAMES = ["acmil_ga", "acmil_mha"]
D = 17


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and threads that wait for a busy core cost seconds."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@dataclass
class Bag:
    slide_id: str
    features: np.ndarray  # (N, D)
    label: int | None


def make_bags(n_bags, *, seed, witness=0.0, n_tiles=(20, 40), dtype=np.float32):
    """Bags of noise; those of class 1 hold one tile that lies `witness` along the first axis: it is tile 3."""
    rng = np.random.default_rng(seed)
    bags = []
    for index in range(n_bags):
        features = rng.standard_normal((rng.integers(*n_tiles), D))
        label = index % 2
        if label:
            features[3, 0] += witness
        bags.append(Bag(f"slide_{index}", features.astype(dtype), label))
    return bags


def auroc(labels, scores):
    positive, negative = scores[labels == 1], scores[labels == 0]
    return ((positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()).item()


def score(labels, probabilities):
    predicted = probabilities.argmax(axis=1)
    f1 = [
        2 * ((predicted == c) & (labels == c)).sum() / max((predicted == c).sum() + (labels == c).sum(), 1)
        for c in range(probabilities.shape[1])
    ]
    return {"f1_macro": float(np.mean(f1)), "auroc": auroc(labels, probabilities[:, 1])}


def build(name, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"hidden_features": 16} | options
        return create_model(name, in_features=D, n_classes=2, **options)


def run(model, train, val, **options):
    settings = {
        "epochs": 3,
        "learning_rate": 1e-3,
        "min_learning_rate": 0.0,
        "warmup_epochs": 0,
        "weight_decay": 1e-5,
        "seed": 0,
        "device": "cpu",
        "score": score,
    }
    return fit(model, train, val, **settings | options)


def scripted(values):
    """A score function that returns these (f1_macro, auroc), one pair an epoch."""
    pairs = iter(values)
    return lambda labels, probabilities: dict(zip(("f1_macro", "auroc"), next(pairs), strict=True))


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def without_time(history):
    return [{name: value for name, value in record.as_row().items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gated_model_finds_the_witness(seed):
    train, val = make_bags(40, seed=2 * seed, witness=15.0), make_bags(30, seed=2 * seed + 1, witness=15.0)
    # One tile carries all of the evidence: hiding it in 60 % of the draws, the default, makes this a matter of luck.
    model = build("acmil_ga", seed=seed, hidden_features=64, mask_ratio=0.3)
    result = run(model, train, val, epochs=20, seed=seed)
    assert result.history[result.best_epoch].val["auroc"] == 1.0
    assert result.history[-1].train_loss_bag < 0.5 * result.history[0].train_loss_bag
    model.load_state_dict(result.best_weights)
    model.eval()
    first = [int(model(torch.from_numpy(bag.features)).attention.mean(dim=0).argmax()) for bag in val if bag.label]
    assert first == [3] * 15


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_run_and_the_global_generator_is_left_alone(name):
    train, val = make_bags(6, seed=0), make_bags(4, seed=1)
    before = torch.random.get_rng_state()
    first, second = (run(build(name), train, val) for _ in range(2))
    torch.manual_seed(99)
    third = run(build(name), train, val)
    torch.random.set_rng_state(before)
    assert same_weights(first.last_weights, second.last_weights)
    assert same_weights(first.last_weights, third.last_weights)
    assert without_time(first.history) == without_time(third.history)
    assert not same_weights(first.last_weights, run(build(name), train, val, seed=1).last_weights)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path, name, stop_after):
    train, val = make_bags(7, seed=0), make_bags(4, seed=1)
    whole = run(build(name), train, val, epochs=5, warmup_epochs=1)

    def stop(record):
        if record.epoch == stop_after - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            build(name), train, val, epochs=5, warmup_epochs=1, on_epoch=stop,
            checkpoint=lambda state: save_state(tmp_path / "state.pt", state),
        )  # fmt: skip
    seen = []
    resumed = run(
        build(name, seed=5), train, val, epochs=5, warmup_epochs=1, on_epoch=seen.append,
        state=load_state(tmp_path / "state.pt"),
    )  # fmt: skip
    assert [record.epoch for record in seen] == list(range(stop_after, 5))
    assert same_weights(whole.last_weights, resumed.last_weights)
    assert same_weights(whole.best_weights, resumed.best_weights)
    assert whole.best_epoch == resumed.best_epoch
    assert without_time(whole.history) == without_time(resumed.history)


def test_a_state_is_the_caller_s_to_keep_and_a_finished_one_runs_no_more():
    states = []
    train, val = make_bags(5, seed=0), make_bags(4, seed=1)
    result = run(build("acmil_ga"), train, val, checkpoint=states.append)
    kept = copy.deepcopy(states[0])
    resumed = run(build("acmil_ga", seed=5), train, val, state=states[0])
    assert same_weights(kept["model"], states[0]["model"])
    assert same_weights(resumed.last_weights, result.last_weights)
    again = run(build("acmil_ga", seed=5), train, val, state=states[-1])
    assert same_weights(again.last_weights, result.last_weights)
    assert without_time(again.history) == without_time(result.history)


def test_a_state_of_other_settings_is_refused():
    states = []
    train, val = make_bags(5, seed=0), make_bags(4, seed=1)
    run(build("acmil_ga"), train, val, checkpoint=states.append)
    with pytest.raises(ValueError, match=r"must keep its settings, changed: epochs 3 → 4\."):
        run(build("acmil_ga"), train, val, epochs=4, state=states[0])
    with pytest.raises(ValueError, match="train_bags 5 → 4"):
        run(build("acmil_ga"), train[:4], val, state=states[0])
    with pytest.raises(ValueError, match="'n_branches': 2"):
        run(build("acmil_ga", n_branches=2), train, val, state=states[0])


def test_learning_rate_is_set_before_every_step(monkeypatch):
    used = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: (used.append(self.param_groups[0]["lr"]), step(self, *args))[1],
    )
    result = run(build("acmil_ga"), make_bags(4, seed=0), make_bags(4, seed=1), epochs=2)
    expected = [0.5e-3 * (1 + math.cos(math.pi * e / 2)) for e in np.arange(0, 2, 0.25)]
    assert used == pytest.approx(expected, rel=1e-12)
    assert [record.learning_rate for record in result.history] == pytest.approx([expected[3], expected[7]])


def test_schedule():
    options = {"epochs": 10, "learning_rate": 1.0, "min_learning_rate": 0.2, "warmup_epochs": 2}
    rates = [learning_rate_at(e, **options) for e in (0.0, 0.5, 1.0, 2.0, 6.0, 10.0)]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 1.0, 0.6, 0.2])


@pytest.mark.parametrize("name", NAMES)
def test_every_bag_is_seen_once_an_epoch_in_another_order(name, monkeypatch):
    train = make_bags(6, seed=0)
    sizes = []
    model = build(name)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, *a, **k: (sizes.append(len(x)) if model.training else None, forward(x, *a, **k))[1]
    )
    run(model, train, make_bags(4, seed=1), epochs=2)
    expected = sorted(len(bag.features) for bag in train)
    assert sorted(sizes[:6]) == sorted(sizes[6:]) == expected
    assert sizes[:6] != sizes[6:]


def test_the_best_epoch_has_the_highest_sum_and_ties_go_to_the_lower_loss():
    train, val = make_bags(6, seed=0), make_bags(4, seed=1)
    result = run(build("acmil_ga"), train, val, epochs=3, score=scripted([(0.1, 0.5), (0.9, 0.6), (0.5, 0.9)]))
    assert result.best_epoch == 1
    tied = run(build("acmil_ga"), train, val, epochs=5, score=scripted([(0.5, 0.5)] * 5))
    losses = [record.val_loss for record in tied.history]
    assert len(set(losses)) == 5
    assert tied.best_epoch == int(np.argmin(losses))


def test_best_weights_are_those_of_the_best_epoch():
    train, val = make_bags(6, seed=0), make_bags(4, seed=1)
    states = []
    result = run(build("acmil_ga"), train, val, score=scripted([(0, 0), (1, 1), (0, 0)]), checkpoint=states.append)
    assert same_weights(result.best_weights, states[1]["model"])
    assert same_weights(result.last_weights, states[2]["model"])
    assert not same_weights(result.best_weights, result.last_weights)


def test_a_metric_that_is_not_defined_counts_as_nothing():
    assert selection_score({"f1_macro": 0.75, "auroc": math.nan, "other": 5.0}) == 0.75
    result = run(build("acmil_ga"), make_bags(4, seed=0), make_bags(4, seed=1), score=scripted([(0.2, math.nan)] * 3))
    assert result.best_weights


def test_record_of_even_attention():
    model = build("acmil_ga", mask_top_k=0)
    with torch.no_grad():
        model.score.weight.zero_()
    val = [Bag("a", np.ones((40, D), np.float32), 0), Bag("b", np.ones((20, D), np.float32), 1)]
    record = run(model, val, val, epochs=1, learning_rate=0.0).history[0]
    assert record.attention_entropy == pytest.approx(1.0)
    assert record.attention_top10_mass == pytest.approx((10 / 40 + 10 / 20) / 2)
    assert record.train_loss_diversity == pytest.approx(1.0)
    assert record.train_loss == pytest.approx(
        record.train_loss_bag + record.train_loss_branch + record.train_loss_diversity
    )
    assert record.seconds > 0
    assert record.val["f1_macro"] == pytest.approx(1 / 3)


def test_record_of_attention_on_one_tile_and_of_bags_of_one_tile():
    model = build("acmil_ga", mask_top_k=0)
    with torch.no_grad():
        model.score.weight.mul_(1e5)
    record = run(model, make_bags(2, seed=0), make_bags(2, seed=0), epochs=1, learning_rate=0.0).history[0]
    assert record.attention_top10_mass == pytest.approx(1.0)
    one = [Bag("a", np.ones((1, D), np.float32), 0), Bag("b", np.ones((1, D), np.float32), 1)]
    record = run(model, one, one, epochs=1).history[0]
    assert (record.attention_entropy, record.attention_top10_mass) == (1.0, 1.0)


def test_a_record_as_a_row():
    row = EpochRecord(2, 1e-4, 4.0, 1.0, 2.0, 1.0, 0.7, 0.5, 0.3, 9.0, {"auroc": 0.8, "loss": 0.71}).as_row()
    assert row["val_auroc"] == 0.8
    assert row["val_loss"] == 0.7
    assert list(row)[:3] == ["epoch", "learning_rate", "train_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_memory_mapped_half_precision_bags_train_like_their_values(tmp_path, name):
    bags = make_bags(4, seed=0, dtype=np.float16)
    mapped = []
    for bag in bags:
        np.save(tmp_path / f"{bag.slide_id}.npy", bag.features)
        mapped.append(Bag(bag.slide_id, np.load(tmp_path / f"{bag.slide_id}.npy", mmap_mode="r"), bag.label))
    whole = [Bag(bag.slide_id, bag.features.astype(np.float32), bag.label) for bag in bags]
    first, second = run(build(name), mapped, mapped), run(build(name), whole, whole)
    assert same_weights(first.last_weights, second.last_weights)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_has_the_losses_of_float32(name, batch_size):
    options = {"mask_top_k": 0} | ({"dropout": 0.0} if name == "acmil_mha" else {})
    bags = make_bags(3, seed=0, n_tiles=(250, 260))
    exact, found = (
        run(build(name, **options), bags, bags, batch_size=batch_size, precision=precision).history
        for precision in ("fp32", "bf16")
    )
    for one, two in zip(exact, found, strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, rel=1e-2)
        assert two.val_loss == pytest.approx(one.val_loss, rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_two_bags_is_that_of_their_mean_loss(name, monkeypatch):
    """AdamW's first step keeps the signs of a gradient alone, so the gradients themselves are compared."""
    options = {"mask_top_k": 0} | ({"dropout": 0.0} if name == "acmil_mha" else {})
    bags = make_bags(2, seed=0)
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda optimizer: (
            taken.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]]),
            step(optimizer),
        )[1],
    )
    record = run(build(name, **options), bags, bags, epochs=1, batch_size=2).history[0]
    assert len(taken) == 1
    model = build(name, **options).train()
    losses = [model.loss(model(torch.from_numpy(bag.features)), torch.tensor([bag.label])).total for bag in bags]
    (sum(losses) / 2).backward()
    assert record.train_loss == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    for found, parameter in zip(taken[0], model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_steps_of_an_epoch_and_what_is_left_for_the_last(monkeypatch):
    train = make_bags(7, seed=0)
    model = build("acmil_ga")
    sizes, rates = [], []
    loss, step = model.loss, torch.optim.AdamW.step
    monkeypatch.setattr(model, "loss", lambda out, labels: (sizes.append(len(labels)), loss(out, labels))[1])
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda optimizer: (rates.append(optimizer.param_groups[0]["lr"]), step(optimizer))[1]
    )
    run(model, train, make_bags(4, seed=1), epochs=2, batch_size=3)
    assert sizes == [3, 3, 1, 3, 3, 1]
    schedule = {"epochs": 2, "learning_rate": 1e-3, "min_learning_rate": 0.0, "warmup_epochs": 0}
    assert rates == pytest.approx([learning_rate_at(number / 3, **schedule) for number in range(6)])


def test_a_batch_of_one_is_the_default():
    train, val = make_bags(6, seed=0), make_bags(4, seed=1)
    first, second = run(build("acmil_ga"), train, val), run(build("acmil_ga"), train, val, batch_size=1)
    assert same_weights(first.last_weights, second.last_weights)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(build("acmil_ga"), train, val, batch_size=0)


def test_batches_resume_exactly_and_only_as_they_were():
    train, val = make_bags(7, seed=0), make_bags(4, seed=1)
    states = []
    whole = run(build("acmil_ga"), train, val, batch_size=2, checkpoint=states.append)
    resumed = run(build("acmil_ga"), train, val, batch_size=2, state=states[0])
    assert same_weights(whole.last_weights, resumed.last_weights)
    with pytest.raises(ValueError, match="batch_size 2 → 3"):
        run(build("acmil_ga"), train, val, batch_size=3, state=states[0])


def test_a_state_says_which_engine_wrote_it():
    train, val = make_bags(4, seed=0), make_bags(4, seed=1)
    states = []
    run(build("acmil_ga"), train, val, checkpoint=states.append)
    settings = {"learning_rate": 1e-3, "min_learning_rate": 0.0, "warmup_epochs": 0, "weight_decay": 1e-5, "seed": 0}
    job = TrainingJob(build("acmil_ga"), train, val, epochs=3, **settings)
    assert states[0]["run"] == run_settings(job, device=torch.device("cpu"), precision="fp32", engine="eager")
    with pytest.raises(ValueError, match="engine 'resident' → 'eager'"):
        run(build("acmil_ga"), train, val, state=states[0] | {"run": states[0]["run"] | {"engine": "resident"}})


def test_without_room_on_the_device_bags_are_moved_a_step_at_a_time(monkeypatch):
    train, val = make_bags(6, seed=0, dtype=np.float16), make_bags(4, seed=1)
    roomy = run(build("acmil_ga"), train, val, batch_size=2)
    monkeypatch.setattr("acmil.training._have_room", lambda sets, device: False)
    tight = run(build("acmil_ga"), train, val, batch_size=2)
    assert same_weights(roomy.last_weights, tight.last_weights)
    assert without_time(roomy.history) == without_time(tight.history)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_training_bag_is_named_with_its_epoch(value):
    train = make_bags(6, seed=0)
    train[4].features[2, 5] = value
    with pytest.raises(ValueError, match="at bag 'slide_4' in epoch 0"):
        run(build("acmil_ga"), train, make_bags(4, seed=1))


def test_a_broken_validation_bag_is_named():
    val = make_bags(4, seed=1)
    val[2].features[0, 0] = np.nan
    with pytest.raises(ValueError, match="val bag 'slide_2'"):
        run(build("acmil_ga"), make_bags(4, seed=0), val)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([Bag("a", np.ones((3, D), np.float32), None)], [], "label of a train bag must be 0 to 1, got None .'a'."),
        ([Bag("a", np.ones((3, D), np.float32), 2)], [], "label of a train bag must be 0 to 1, got 2"),
        ([Bag("a", np.ones((0, D), np.float32), 1)], [], "bag 'a' holds 0 tiles"),
        ([], [], "train bags must be at least 1"),
        ([Bag("a", np.ones((3, D), np.float32), 1)], [], "val bags must be at least 1"),
    ],
)
def test_bags_that_cannot_be_trained_on_are_refused(train, val, message):
    with pytest.raises(ValueError, match=message):
        run(build("acmil_ga"), train, val)


def test_a_score_without_the_selection_metrics_is_refused():
    with pytest.raises(ValueError, match=r"\['auroc'\] missing"):
        run(build("acmil_ga"), make_bags(2, seed=0), make_bags(2, seed=1), score=lambda labels, p: {"f1_macro": 1.0})


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_training_on_a_gpu_repeats_itself_and_agrees_with_the_cpu(name):
    train, val = make_bags(6, seed=0), make_bags(4, seed=1)
    # Without masks and dropout the two devices differ by rounding alone: their generators are not the same.
    options = {"mask_top_k": 0} | ({"dropout": 0.0} if name == "acmil_mha" else {})
    on_cpu = run(build(name, **options), train, val, learning_rate=1e-4)
    on_gpu, again = (run(build(name, **options), train, val, learning_rate=1e-4, device="cuda") for _ in range(2))
    assert same_weights(on_gpu.last_weights, again.last_weights)
    losses = [[record.train_loss for record in result.history] for result in (on_cpu, on_gpu)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
