"""The models against a statement of the method in NumPy, float64, that shares no code with them.

ACMIL-GA's gradients are derived by hand below. Those of ACMIL-MHA are complex-step derivatives of the NumPy forward,
exact to rounding: f'(x) = Im f(x + ih) / h with h = 1e-30, where nothing cancels.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from acmil.checkpoint import WeightsError
from acmil.models import create_model, load_reference_checkpoint
from acmil.training import fit

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
N, D, L, A, K, C, HEADS = 23, 11, 8, 6, 3, 4, 4


# ---- the method in NumPy; everything is analytic in the weights, so that the complex step goes through it


def softmax(scores):
    e = np.exp(scores - scores.real.max())
    return e / e.sum()


def masked_softmax(scores, keep):
    e = np.where(keep, np.exp(scores - scores[keep].real.max()), 0.0)
    return e / e.sum()


def cross_entropy(logits, label):
    return -np.log(softmax(logits)[label])


def cosine(p, q):
    return (p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum())


def mean_over_pairs(rows):
    pairs = [cosine(rows[i], rows[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    return sum(pairs) / len(pairs)


def layer_norm(x, weight, bias):
    centred = x - x.mean()
    return centred / np.sqrt((centred * centred).mean() + 1e-6) * weight + bias


def relu(x):
    return np.where(x.real > 0, x, 0.0)


@dataclass
class Result:
    logits: np.ndarray  # (C,)
    branch_logits: np.ndarray  # (K, C)
    attention: np.ndarray  # (K, N)
    head_attention: np.ndarray | None = None  # (K, heads, N)
    bag: complex = 0.0
    branch: complex = 0.0
    diversity: complex = 0.0

    @property
    def total(self):
        return self.bag + self.branch + self.diversity


def add_losses(result, label):
    n_branches = len(result.branch_logits)
    result.bag = cross_entropy(result.logits, label)
    if n_branches > 1:
        result.branch = sum(cross_entropy(y, label) for y in result.branch_logits) / n_branches
        if result.head_attention is None:
            result.diversity = mean_over_pairs(result.attention)
        else:
            heads = range(result.head_attention.shape[1])
            result.diversity = sum(mean_over_pairs(result.head_attention[:, h]) for h in heads) / len(heads)
    return result


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated(w, x, keep, label):
    hidden = relu(x @ w["reduction.weight"].T)
    gate = np.tanh(hidden @ w["gate_v.weight"].T + w["gate_v.bias"])
    gate = gate * sigmoid(hidden @ w["gate_u.weight"].T + w["gate_u.bias"])
    scores = (gate @ w["score.weight"].T + w["score.bias"]).T  # (K, N)
    attention = np.stack([masked_softmax(s, k) for s, k in zip(scores, keep, strict=True)])
    branches = [p @ hidden for p in attention]
    heads = zip(w["branch_head.weight"], branches, w["branch_head.bias"], strict=True)
    bag = attention.mean(axis=0) @ hidden
    logits = w["bag_head.weight"] @ bag + w["bag_head.bias"]
    return add_losses(Result(logits, np.stack([wc @ z + bc for wc, z, bc in heads]), attention), label)


def multihead(w, x, keep, label):
    """With keys and values formed for every instance, head by head."""
    hidden = relu(x @ w["reduction.weight"].T)
    n_branches, d = len(w["query"]), hidden.shape[1] // HEADS
    cuts = [slice(h * d, (h + 1) * d) for h in range(HEADS)]
    attention, branch_logits = [], []
    for k in range(n_branches):
        query = w["query_projection.weight"][k] @ w["query"][k] + w["query_projection.bias"][k]
        keys = hidden @ w["key_projection.weight"][k].T + w["key_projection.bias"][k]  # (N, L)
        values = hidden @ w["value_projection.weight"][k].T + w["value_projection.bias"][k]
        rows = [masked_softmax(keys[:, c] @ query[c] / np.sqrt(d), keep[k, h]) for h, c in enumerate(cuts)]
        joined = np.concatenate([row @ values[:, c] for row, c in zip(rows, cuts, strict=True)])
        out = w["out_projection.weight"][k] @ joined + w["out_projection.bias"][k]
        z = layer_norm(out, w["branch_norm_weight"][k], w["branch_norm_bias"][k])
        branch_logits.append(w["branch_head.weight"][k] @ z + w["branch_head.bias"][k])
        attention.append(np.stack(rows))
    attention = np.stack(attention)  # (K, heads, N)
    values = hidden @ w["bag_value_projection.weight"].T + w["bag_value_projection.bias"]
    joined = np.concatenate([attention.mean(axis=0)[h] @ values[:, c] for h, c in enumerate(cuts)])
    out = w["bag_out_projection.weight"] @ joined + w["bag_out_projection.bias"]
    bag = layer_norm(out, w["bag_norm.weight"], w["bag_norm.bias"])
    logits = w["bag_head.weight"] @ bag + w["bag_head.bias"]
    return add_losses(Result(logits, np.stack(branch_logits), attention.mean(axis=1), attention), label)


def gated_gradients(w, x, keep, label):
    """Derivatives of the total loss, by hand, from the heads back to the reduction; None for what has no part in it."""
    before = x @ w["reduction.weight"].T
    hidden = relu(before)
    t = np.tanh(hidden @ w["gate_v.weight"].T + w["gate_v.bias"])
    s = sigmoid(hidden @ w["gate_u.weight"].T + w["gate_u.bias"])
    result = gated(w, x, keep, label)
    p, n_branches = result.attention, len(result.attention)
    z = p @ hidden  # (K, L)
    one_hot = np.eye(len(result.logits))[label]
    d_logits = softmax(result.logits) - one_hot  # (C,)
    d_z = np.tile(w["bag_head.weight"].T @ d_logits / n_branches, (n_branches, 1))  # (K, L), through the mean
    grads = {
        "bag_head.weight": np.outer(d_logits, z.mean(axis=0)),
        "bag_head.bias": d_logits,
        "branch_head.weight": None,
        "branch_head.bias": None,
    }
    d_p = np.zeros_like(p)
    if n_branches > 1:
        d_branch = np.stack([softmax(y) - one_hot for y in result.branch_logits]) / n_branches  # (K, C)
        grads["branch_head.weight"] = d_branch[:, :, None] * z[:, None, :]
        grads["branch_head.bias"] = d_branch
        d_z = d_z + np.einsum("kcl,kc->kl", w["branch_head.weight"], d_branch)
        norms = np.sqrt((p * p).sum(axis=1, keepdims=True))
        unit = p / norms
        d_unit = (unit.sum(axis=0) - unit) / (n_branches * (n_branches - 1) / 2)  # each row meets every other once
        d_p = (d_unit - unit * (unit * d_unit).sum(axis=1, keepdims=True)) / norms
    d_p = d_p + d_z @ hidden.T  # (K, N)
    d_scores = p * (d_p - (p * d_p).sum(axis=1, keepdims=True))
    d_gate = d_scores.T @ w["score.weight"]  # (N, A)
    d_v, d_u = d_gate * s * (1 - t * t), d_gate * t * s * (1 - s)
    d_hidden = p.T @ d_z + d_v @ w["gate_v.weight"] + d_u @ w["gate_u.weight"]
    return grads | {
        "score.weight": d_scores @ (t * s),
        "score.bias": d_scores.sum(axis=1),
        "gate_v.weight": d_v.T @ hidden,
        "gate_v.bias": d_v.sum(axis=0),
        "gate_u.weight": d_u.T @ hidden,
        "gate_u.bias": d_u.sum(axis=0),
        "reduction.weight": (d_hidden * (before > 0)).T @ x,
    }


def complex_step_gradients(function, w):
    """Derivatives of `function(w).total` by each weight."""
    grads = {}
    for name, value in w.items():
        grads[name] = np.zeros_like(value)
        shifted = w | {name: value.astype(complex)}
        for index in np.ndindex(value.shape):
            shifted[name][index] += 1e-30j
            grads[name][index] = function(shifted).total.imag / 1e-30
            shifted[name][index] = value[index]
    return grads


def adamw_first_step(w, grads):
    """AdamW from rest: the bias-corrected moments of one gradient are the gradient and its square."""
    after = {}
    for name, value in w.items():
        gradient = grads[name]
        if gradient is None:  # no gradient: neither step nor decay
            after[name] = value
        else:
            decayed = value * (1 - LEARNING_RATE * WEIGHT_DECAY)
            after[name] = decayed - LEARNING_RATE * gradient / (np.sqrt(gradient * gradient) + 1e-8)
    return after


# ---- the comparison


@dataclass
class Bag:
    slide_id: str
    features: np.ndarray
    label: int


def build(name, n_branches, seed=0, **options):
    """A float64 model with weights of order one, so that no gradient is lost in rounding."""
    model = create_model(name, in_features=D, n_classes=C, hidden_features=L, n_branches=n_branches, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def weights_of(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def random_keep(shape, seed=3):
    keep = np.random.default_rng(seed).random(shape) > 0.3
    keep[..., 0] = True
    return keep


def features(seed=1):
    return np.random.default_rng(seed).standard_normal((N, D))


def assert_same_output(out, losses, expected):
    for ours, theirs in (
        (out.logits[0], expected.logits),
        (out.branch_logits[0], expected.branch_logits),
        (out.attention, expected.attention),
        (losses.bag, expected.bag),
        (losses.branch, expected.branch),
        (losses.diversity, expected.diversity),
        (losses.total, expected.total),
    ):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-15)


def assert_same_step(model, grads):
    """Gradients, and the weights after one AdamW step."""
    before = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for name, parameter in model.named_parameters():
        if grads[name] is None:
            assert parameter.grad is None, name
        else:
            np.testing.assert_allclose(parameter.grad.numpy(), grads[name], rtol=1e-9, atol=1e-13, err_msg=name)
    optimizer.step()
    for name, value in adamw_first_step(before, grads).items():
        np.testing.assert_allclose(model.state_dict()[name].numpy(), value, rtol=1e-6, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_branches", [K, 1])
def test_gated_outputs_losses_gradients_and_step(n_branches, masked):
    model = build("acmil_ga", n_branches, attention_features=A, mask_top_k=0)
    keep = random_keep((n_branches, N)) if masked else np.ones((n_branches, N), dtype=bool)
    x, label = features(), 2
    out = model(torch.from_numpy(x), keep=torch.from_numpy(keep))
    losses = model.loss(out, torch.tensor([label]))
    assert_same_output(out, losses, gated(weights_of(model), x, keep, label))
    losses.total.backward()
    assert_same_step(model, gated_gradients(weights_of(model), x, keep, label))


def test_the_derivation_by_hand_agrees_with_the_complex_step():
    w = weights_of(build("acmil_ga", K, attention_features=A))
    keep, x = random_keep((K, N)), features()
    expected = complex_step_gradients(lambda weights: gated(weights, x, keep, 1), w)
    for name, gradient in gated_gradients(w, x, keep, 1).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-10, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_branches", [K, 1])
def test_multihead_outputs_losses_gradients_and_step(n_branches, masked):
    model = build("acmil_mha", n_branches, n_heads=HEADS, dropout=0.0, mask_top_k=0)
    keep = random_keep((n_branches, HEADS, N)) if masked else np.ones((n_branches, HEADS, N), dtype=bool)
    x, label = features(), 2
    out = model(torch.from_numpy(x), keep=torch.from_numpy(keep))
    losses = model.loss(out, torch.tensor([label]))
    expected = multihead(weights_of(model), x, keep, label)
    assert_same_output(out, losses, expected)
    np.testing.assert_allclose(out.head_attention.detach().numpy(), expected.head_attention, rtol=1e-10, atol=1e-15)
    losses.total.backward()
    if masked:  # the complex step costs one forward a weight: once a size is enough
        grads = complex_step_gradients(lambda weights: multihead(weights, x, keep, label), weights_of(model))
        if n_branches == 1:
            grads |= dict.fromkeys(name for name in grads if name.startswith("branch_head"))
            grads |= dict.fromkeys(name for name in grads if name.startswith(("branch_norm", "out_proj", "value_proj")))
        assert_same_step(model, grads)


def test_one_epoch_of_one_bag_is_one_adamw_step():
    model = build("acmil_ga", K, attention_features=A, mask_top_k=0)
    x, keep, before = features(), np.ones((K, N), dtype=bool), weights_of(model)
    bag = Bag("a", x, 2)
    result = fit(
        model, [bag], [bag], epochs=1, learning_rate=LEARNING_RATE, min_learning_rate=0.0, warmup_epochs=0,
        weight_decay=WEIGHT_DECAY, seed=0, device="cpu", score=lambda labels, p: {"f1_macro": 0.0, "auroc": 0.0},
    )  # fmt: skip
    expected = adamw_first_step(before, gated_gradients(before, x, keep, 2))
    for name, value in expected.items():
        np.testing.assert_allclose(result.last_weights[name].numpy(), value, rtol=1e-6, atol=1e-10, err_msg=name)
    losses = gated(before, x, keep, 2)
    assert result.history[0].train_loss == pytest.approx(losses.total.real, rel=1e-6)
    after = gated({name: tensor.numpy() for name, tensor in result.last_weights.items()}, x, keep, 2)
    assert result.history[0].val_loss == pytest.approx(after.bag.real, rel=1e-10)


# ---- checkpoints of the reference


def reference_state(n_branches=K, dtype=np.float64):
    rng = np.random.default_rng(5)
    shapes = {
        "dimreduction.fc1.weight": (L, D),
        "attention.attention_V.0.weight": (A, L),
        "attention.attention_V.0.bias": (A,),
        "attention.attention_U.0.weight": (A, L),
        "attention.attention_U.0.bias": (A,),
        "attention.attention_weights.weight": (n_branches, A),
        "attention.attention_weights.bias": (n_branches,),
        "Slide_classifier.fc.weight": (C, L),
        "Slide_classifier.fc.bias": (C,),
    }
    for k in range(n_branches):
        shapes |= {f"classifier.{k}.fc.weight": (C, L), f"classifier.{k}.fc.bias": (C,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_reference(path, state, **rest):
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    torch.save({"model": tensors, "optimizer": optimizer, "epoch": 7, "config": {"arch": "ga"}} | rest, path)


@pytest.mark.parametrize("n_branches", [1, 5])
def test_a_checkpoint_of_the_reference_predicts_the_same(tmp_path, n_branches):
    state = reference_state(n_branches, np.float32)
    write_reference(tmp_path / "checkpoint-best.pth", state)
    model, options = load_reference_checkpoint(tmp_path / "checkpoint-best.pth")
    sizes = {"in_features": D, "hidden_features": L, "attention_features": A, "n_branches": n_branches, "n_classes": C}
    assert sizes.items() <= options.items()
    assert create_model("acmil_ga", **options).options == options
    state = {name: value.astype(np.float64) for name, value in state.items()}
    w = {
        "reduction.weight": state["dimreduction.fc1.weight"],
        "gate_v.weight": state["attention.attention_V.0.weight"],
        "gate_v.bias": state["attention.attention_V.0.bias"],
        "gate_u.weight": state["attention.attention_U.0.weight"],
        "gate_u.bias": state["attention.attention_U.0.bias"],
        "score.weight": state["attention.attention_weights.weight"],
        "score.bias": state["attention.attention_weights.bias"],
        "branch_head.weight": np.stack([state[f"classifier.{k}.fc.weight"] for k in range(n_branches)]),
        "branch_head.bias": np.stack([state[f"classifier.{k}.fc.bias"] for k in range(n_branches)]),
        "bag_head.weight": state["Slide_classifier.fc.weight"],
        "bag_head.bias": state["Slide_classifier.fc.bias"],
    }
    x = features()
    out = model.double()(torch.from_numpy(x))
    expected = gated(w, x, np.ones((n_branches, N), dtype=bool), 0)
    np.testing.assert_allclose(out.logits[0].detach().numpy(), expected.logits, rtol=1e-10)
    np.testing.assert_allclose(out.branch_logits[0].detach().numpy(), expected.branch_logits, rtol=1e-10)
    np.testing.assert_allclose(out.attention.detach().numpy(), expected.attention, rtol=1e-10)


def test_missing_unknown_and_misshapen_tensors_of_a_checkpoint_are_named(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = reference_state()
    extra = state.pop("classifier.1.fc.bias")
    write_reference(path, state | {"surplus": extra})
    with pytest.raises(WeightsError, match=r"missing \['classifier.1.fc.bias'\], unknown \['surplus'\]"):
        load_reference_checkpoint(path)
    state = reference_state()
    write_reference(path, state | {"attention.attention_U.0.bias": np.zeros(A + 1)})
    with pytest.raises(WeightsError, match=r"'attention.attention_U.0.bias' must have shape \(6,\), got \(7,\)"):
        load_reference_checkpoint(path)
    del state["dimreduction.fc1.weight"]
    write_reference(path, state)
    with pytest.raises(WeightsError, match=r"must hold a matrix 'dimreduction\.fc1\.weight'"):
        load_reference_checkpoint(path)


def test_a_checkpoint_with_pickled_objects_is_refused_and_says_why(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_reference(path, reference_state(), config=argparse.Namespace(arch="ga"))
    with pytest.raises(WeightsError) as error:
        load_reference_checkpoint(path)
    assert "objects of 'argparse.Namespace', which can run code when they are read" in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="is not a checkpoint of tensors"):
        load_reference_checkpoint(path)
    torch.save({"model": {"a": 1}}, path)
    with pytest.raises(WeightsError, match="must hold a dict of tensors"):
        load_reference_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_reference_checkpoint(tmp_path / "none.pth")
