"""Models: laws of the output, options, packing, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acmil.models import create_model, list_models
from acmil.models.defaults import default_hidden_features
from acmil.models.layers import sampled_dropout

NAMES = ["acmil_ga", "acmil_mha"]
HEADS = {"acmil_ga": {}, "acmil_mha": {"n_heads": 4}}


def build(name, *, in_features=37, n_classes=3, hidden_features=12, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            name,
            in_features=in_features,
            n_classes=n_classes,
            hidden_features=hidden_features,
            **HEADS[name],
            **options,
        )
        with torch.no_grad():  # queries begin near zero, where every head attends evenly: move away from there
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def bag(n, in_features=37, seed=1):
    return torch.randn(n, in_features, generator=torch.Generator().manual_seed(seed))


def test_list_models():
    assert list_models() == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 63, 301])
def test_attention_sums_to_one_and_the_bag_is_the_mean_of_the_branches(name, n):
    model = build(name).eval()
    out = model(bag(n))
    assert (tuple(out.logits.shape), tuple(out.branch_logits.shape)) == ((1, 3), (1, 5, 3))
    assert out.offsets.tolist() == [0, n]
    torch.testing.assert_close(out.attention.sum(dim=1), torch.ones(5))
    if name == "acmil_ga":
        pooled = out.attention.mean(dim=0) @ model.hidden(bag(n))
        torch.testing.assert_close(out.logits[0], model.bag_head(pooled), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(out.head_attention.sum(dim=2), torch.ones(5, 4))
        torch.testing.assert_close(out.head_attention.mean(dim=1), out.attention)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_a_packed_batch_gives_what_its_bags_give_one_by_one(name, lengths):
    model = build(name).eval()
    features = bag(sum(lengths))
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    labels = torch.arange(len(lengths)) % 3
    out = model(features, offsets)
    ones = [model(part) for part in features.split(lengths)]
    torch.testing.assert_close(out.logits, torch.cat([one.logits for one in ones]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.branch_logits, torch.cat([one.branch_logits for one in ones]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.attention, torch.cat([one.attention for one in ones], dim=1), rtol=1e-5, atol=1e-6)
    total = torch.stack([model.loss(one, label[None]).total for one, label in zip(ones, labels, strict=True)]).mean()
    torch.testing.assert_close(model.loss(out, labels).total, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_tiles_permutes_attention_and_changes_no_prediction(name):
    model = build(name).eval()
    features, order = bag(101), torch.randperm(101, generator=torch.Generator().manual_seed(4))
    out, permuted = model(features), model(features[order])
    torch.testing.assert_close(permuted.logits, out.logits, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(permuted.attention, out.attention[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_masking_is_on_in_training_only(name):
    model = build(name, mask_top_k=10, mask_ratio=0.6)
    features = bag(50)
    out = model(features, generator=torch.Generator().manual_seed(0))
    rows = out.attention if name == "acmil_ga" else out.head_attention.flatten(0, 1)
    assert ((rows == 0).sum(dim=1) == 6).all()
    whole = model.eval()(features)
    rows = whole.attention if name == "acmil_ga" else whole.head_attention.flatten(0, 1)
    assert (rows > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_one_tile_trains(name):
    model = build(name)
    losses = model.loss(model(bag(1)), torch.tensor([2]))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_training_draws_from_the_generator_alone(name):
    model, features = build(name), bag(50)
    before = torch.random.get_rng_state()
    first, second = (model(features, generator=torch.Generator().manual_seed(5)).logits for _ in range(2))
    other = model(features, generator=torch.Generator().manual_seed(6)).logits
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_dropout_is_inverted_and_off_in_evaluation():
    x = torch.ones(100_000)
    dropped = sampled_dropout(x, p=0.1, generator=torch.Generator().manual_seed(0))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    model = build("acmil_mha", mask_top_k=0, dropout=0.5)
    features = bag(9)
    assert not torch.equal(model(features).logits, model(features).logits)
    model.eval()
    assert torch.equal(model(features).logits, model(features).logits)


def test_one_branch_without_masking_is_abmil():
    model = build("acmil_ga", n_branches=1, mask_top_k=0)
    features = bag(40)
    hidden = torch.relu(features @ model.reduction.weight.T)
    gate = torch.tanh(model.gate_v(hidden)) * torch.sigmoid(model.gate_u(hidden))
    attention = torch.softmax(model.score(gate).T, dim=-1)
    out = model(features)
    torch.testing.assert_close(out.logits, model.bag_head(attention @ hidden))
    assert model.loss(out, torch.tensor([0])).total.item() == model.loss(out, torch.tensor([0])).bag.item()


@pytest.mark.parametrize("name", NAMES)
def test_options_rebuild_the_model(name):
    model = build(name, mask_top_k=3, mask_ratio=0.25, n_branches=2)
    again = create_model(model.name, **model.options)
    assert again.options == model.options
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(bag(9)).logits, model.eval()(bag(9)).logits, rtol=0, atol=0)


def test_initial_weights_follow_torch_linear():
    model = create_model("acmil_mha", in_features=256, n_classes=2, hidden_features=128)
    for stack in (model.query_projection, model.key_projection, model.value_projection, model.out_projection):
        bound = 128**-0.5
        assert stack.weight.abs().max() <= bound
        assert stack.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert stack.bias.abs().max() <= bound
    assert model.query.std().item() == pytest.approx(1e-6, rel=0.15)
    assert create_model("acmil_ga", in_features=256, n_classes=2).reduction.bias is None


@pytest.mark.parametrize(
    ("in_features", "hidden"), [(384, 128), (512, 256), (768, 384), (1024, 512), (1536, 768), (1280, 640), (708, 354)]
)
def test_default_hidden_features(in_features, hidden):
    assert default_hidden_features(in_features) == hidden
    assert create_model("acmil_ga", in_features=in_features, n_classes=2).options["hidden_features"] == hidden


def test_default_hidden_features_of_multihead_fit_the_heads():
    assert create_model("acmil_mha", in_features=708, n_classes=2).options["hidden_features"] == 352
    assert create_model("acmil_mha", in_features=5, n_classes=2).options["hidden_features"] == 8


@pytest.mark.parametrize("name", NAMES)
def test_features_of_half_precision_are_taken_in_the_model_s(name):
    model, features = build(name).eval(), bag(20).half()
    assert torch.equal(model(features).logits, model(features.float()).logits)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_gives_the_instance_features(name):
    model = build(name)
    features = bag(20)
    expected = np.maximum(features.numpy() @ model.reduction.weight.detach().numpy().T, 0)
    np.testing.assert_allclose(model.hidden(features).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", [torch.zeros(5, 36), torch.zeros(0, 37), torch.zeros(37), torch.zeros(1, 5, 37)])
def test_features_of_another_shape_are_refused(name, features):
    with pytest.raises(ValueError, match=r"features must have shape \(N, 37\)"):
        build(name)(features)


def test_whole_number_features_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        build("acmil_ga")(torch.zeros(5, 37, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acmil_gaa", {}, "got 'acmil_gaa'. Did you mean 'acmil_ga'?"),
        ("acmil_ga", {"n_brnches": 3}, "got 'n_brnches'. Did you mean 'n_branches'?"),
        ("acmil_ga", {"n_branches": 0}, "n_branches must be a whole number >= 1, got 0"),
        ("acmil_ga", {"hidden_features": 2.5}, "hidden_features must be a whole number"),
        ("acmil_ga", {"mask_top_k": -1}, "mask_top_k must be a whole number >= 0"),
        ("acmil_ga", {"mask_ratio": 1.5}, r"mask_ratio must be in \[0, 1\], got 1.5"),
        ("acmil_mha", {"hidden_features": 20}, r"multiple of n_heads \(8\), got 20. Use 16."),
        ("acmil_mha", {"dropout": 1.0}, "dropout must be in"),
        ("acmil_mha", {"attention_features": 64}, "option of acmil_mha"),
    ],
)
def test_unknown_names_and_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, in_features=64, n_classes=2, **options)


def test_defaults_are_read_without_torch():
    code = "import sys, acmil.models.defaults; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
