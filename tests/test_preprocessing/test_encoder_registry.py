"""The registry of encoders: the facts against the networks that timm builds, and what is said where there is none.

Every network that timm builds is built on the meta device, which holds shapes alone; the small ones of `RUN_FOR_REAL`
are also run on numbers.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import save_file

from acmil.cli import run_command_line
from acmil.config_file import load_config
from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.encoders import Encoder, EncoderError, create_encoder, find_encoder, hub, list_encoders
from acmil.preprocessing.encoders.features import token_feature
from acmil.preprocessing.encoders.pathology import GIGAPATH, UNI, VIRCHOW2
from acmil.preprocessing.encoders.registry import REGISTRY, encoder_facts, tile_advice
from acmil.preprocessing.encoders.tables import encoder_page, encoder_table
from acmil.preprocessing.encoders.timm_encoder import build_network
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.encoders.weight_names import timm_names
from acmil.preprocessing.job import _warn_of_unusual_tiles

SEED = 0
BUILT_HERE = [facts for facts in REGISTRY if facts.is_built_here]
FOREIGN = [facts for facts in REGISTRY if not facts.is_built_here]
NATURAL = [facts for facts in REGISTRY if facts.source.startswith("https://huggingface.co/timm/")]
RUN_FOR_REAL = (
    *("resnet18", "tf_efficientnet_lite0", "convnext_tiny", "vit_small_patch16_224", "kaiko_vits16", "lunit_vits16"),
    *("dinov2_vits14", "dinov3_vits16"),
)
# As their authors or LazySlide's list state them: an argument of a network that is wrong moves its count.
PUBLISHED_PARAMETERS = {
    "uni": "303.4M",
    "uni2_h": "681.4M",
    "virchow": "631.2M",
    "virchow2": "631.2M",
    "gigapath": "1.13B",
    "h_optimus_0": "1.13B",
    "h_optimus_1": "1.13B",
    "h0_mini": "85.7M",
    "phikon": "85.8M",
    "phikon_v2": "303.4M",
    "gpfm": "303M",
}
# What the requirement asks for by name.
ASKED_FOR = (
    *("uni", "uni2_h", "conch_v1", "conch_v15", "virchow", "virchow2", "gigapath", "h_optimus_0", "h_optimus_1"),
    *("h0_mini", "phikon", "phikon_v2", "hibou_b", "hibou_l", "kaiko_vits16", "kaiko_vitb16", "kaiko_vitl14"),
    *("lunit_vits16", "midnight_12k", "gpfm", "ctranspath", "retccl", "plip", "musk", "resnet18", "resnet50"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "tf_efficientnet_lite0"),
    *("convnext_tiny", "dinov2_vits14", "dinov3_vits16"),
)


def names(encoders):
    return [facts.name for facts in encoders]


@cache
def meta_network(name):
    with torch.device("meta"):
        return build_network(encoder_facts(name))


def encoder_of(model, facts, device="cpu"):
    return Encoder(
        model,
        name=facts.name,
        input_px=facts.input_px,
        mean=facts.mean,
        std=facts.std,
        is_fixed_size=facts.is_fixed_size,
        device=torch.device(device),
        precision="fp32",
        feature=facts.feature,
        resize_px=facts.resize_px,
        interpolation=facts.interpolation,
        facts=facts,
    )


def random_tiles(n_tiles, side_px):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (n_tiles, side_px, side_px, 3), dtype=torch.uint8, generator=generator)


def tiny_transformer(**options):
    torch.manual_seed(SEED)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = import_timm().create_model("vit_small_patch16_224", **sizes, **options).eval()
    for parameter in model.parameters():  # timm starts biases and register tokens at zero: nothing to tell them by
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_registry_holds_what_was_asked_for():
    assert list_encoders() == REGISTRY
    assert len(REGISTRY) >= 25
    assert set(ASKED_FOR) <= set(names(REGISTRY))
    every_name = [name for facts in REGISTRY for name in (facts.name, *facts.aliases)]
    assert len(every_name) == len(set(every_name))


@pytest.mark.parametrize("facts", REGISTRY, ids=names(REGISTRY))
def test_every_entry_says_where_its_facts_are_from(facts):
    assert facts.source.startswith("https://")
    assert facts.confirmed
    assert facts.licence
    assert facts.is_built_here == (facts.timm_name is not None)
    assert (facts.tile_px is None) == (facts.tile_mpp is None)
    assert all(0 < value < 1 for value in (*facts.mean, *facts.std))
    assert (facts.resize_px or facts.input_px) >= facts.input_px


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("UNI", "uni"),
        ("UNI2-h", "uni2_h"),
        ("H-optimus-0", "h_optimus_0"),
        ("conch_v1.5", "conch_v15"),
        ("hf-hub:paige-ai/Virchow2", "virchow2"),
        ("hf_hub:prov-gigapath/prov-gigapath", "gigapath"),
        ("resnet50", "resnet50"),
        ("resnet50.tv_in1k", None),
        ("hf-hub:timm/resnet50.tv_in1k", None),
        ("resnet50_trunc", "resnet50_layer3"),
        ("MahmoodLab/UNI", None),
    ],
)
def test_names_are_found_as_people_write_them(name, found):
    facts = find_encoder(name)
    assert (facts.name if facts else None) == found


def test_the_nearest_name_is_offered():
    with pytest.raises(EncoderError, match=r"got 'Virchow 3'\. Did you mean virchow"):
        encoder_facts("Virchow 3")
    with pytest.raises(EncoderError, match=r"Did you mean .*gigapath"):
        create_encoder("gigapaths", device="cpu")


@pytest.mark.parametrize("facts", BUILT_HERE, ids=names(BUILT_HERE))
def test_the_network_gives_features_of_the_stated_size(facts):
    model = meta_network(facts.name)
    encoder = encoder_of(model, facts, device="meta")
    side_px = facts.tile_px or 224
    with torch.inference_mode():
        images = encoder.normalise(torch.zeros(2, side_px, side_px, 3, dtype=torch.uint8, device="meta"))
        features = encoder._features(images)
    seen_px = facts.input_px if facts.is_fixed_size else side_px
    assert images.shape == (2, 3, seen_px, seen_px)
    assert features.shape == (2, facts.n_features)
    assert encoder.n_features == facts.n_features


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_the_network_has_as_many_parameters_as_published(name):
    published = PUBLISHED_PARAMETERS[name]
    unit = {"M": 1e6, "B": 1e9}[published[-1]]
    digits = len(published[:-1].partition(".")[2])
    n_parameters = sum(parameter.numel() for parameter in meta_network(name).parameters())
    assert abs(n_parameters / unit - float(published[:-1])) <= 0.51 * 10**-digits


@pytest.mark.parametrize("facts", NATURAL, ids=names(NATURAL))
def test_facts_of_natural_images_are_timms(facts):
    tag = facts.hub_id.rpartition(".")[2]
    assert facts.hub_id == f"timm/{facts.timm_name}.{tag}"
    config = import_timm().get_pretrained_cfg(f"{facts.timm_name}.{tag}")
    assert (facts.mean, facts.std, facts.interpolation) == (config.mean, config.std, config.interpolation)
    assert facts.is_fixed_size == config.fixed_input_size
    if not facts.timm_kwargs:  # otherwise the input is made smaller than timm's
        assert facts.input_px == config.input_size[-1]
    if not facts.timm_kwargs and facts.feature != "layer3_pooled":
        assert import_timm().get_pretrained_cfg(facts.timm_name).tag == tag, "the weights timm takes by default"


@pytest.mark.parametrize("name", RUN_FOR_REAL)
def test_small_encoders_run_from_a_local_file_without_a_network(tmp_path, monkeypatch, name):
    def no_network(*arguments, **options):
        raise AssertionError("weights were given")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    facts = encoder_facts(name)
    torch.manual_seed(SEED)
    model = build_network(facts).eval()
    file = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    encoder = create_encoder(name.upper(), weights=file, device="cpu", precision="fp32")
    assert (encoder.name, encoder.facts, encoder.feature) == (name, facts, facts.feature)
    assert (encoder.mean, encoder.std, encoder.input_px) == (facts.mean, facts.std, facts.input_px)

    tiles = random_tiles(1, facts.input_px)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (facts.mean, facts.std))
    expected = (tiles[0].permute(2, 0, 1).numpy() / 255 - mean) / std
    np.testing.assert_allclose(encoder.normalise(tiles)[0], expected, atol=1e-5)

    features = encoder(tiles)
    assert features.shape == (1, facts.n_features)
    with torch.inference_mode():
        tokens = model.forward_features(encoder.normalise(tiles))
        expected = tokens[:, 0] if facts.feature == "class_token" else model(encoder.normalise(tiles))
    assert expected.std() > 0
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-5)


def test_the_feature_is_taken_out_of_tokens():
    # One image of a class token, two registers and three patches, with two channels.
    tokens = torch.tensor([[[1.0, 2.0], [90.0, 90.0], [-7.0, 80.0], [1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]])
    assert token_feature(tokens, "class_token", n_prefix_tokens=3).tolist() == [[1.0, 2.0]]
    assert token_feature(tokens, "class_and_mean_patch", n_prefix_tokens=3).tolist() == [[1.0, 2.0, 3.0, 1.0]]
    assert token_feature(tokens[:, [0, 3, 4, 5]], "class_and_mean_patch", n_prefix_tokens=1).tolist() == [
        [1.0, 2.0, 3.0, 1.0]
    ]
    with pytest.raises(ValueError, match="got 'pooled'"):
        token_feature(tokens, "pooled", n_prefix_tokens=1)


def test_virchow2s_recipe_on_a_tiny_network_leaves_its_registers_out():
    facts = replace(VIRCHOW2, input_px=32)
    model = tiny_transformer(reg_tokens=4)
    encoder = encoder_of(model, facts)
    assert encoder.n_features == 96
    tiles = random_tiles(3, 32)
    with torch.inference_mode():
        tokens = model.forward_features(encoder.normalise(tiles)).numpy()  # (3, 1 + 4 + 4, 48)
    assert tokens.shape == (3, 9, 48)
    expected = np.concatenate([tokens[:, 0], tokens[:, 5:].mean(axis=1)], axis=1)
    np.testing.assert_allclose(encoder(tiles), expected, rtol=1e-4, atol=1e-5)
    with_registers = tokens[:, 1:].mean(axis=1)
    assert np.abs(expected[:, 48:] - with_registers).max() > 0.01, "the registers would be seen"


def test_gigapath_cuts_the_centre_out_of_its_tiles():
    encoder = encoder_of(tiny_transformer(), GIGAPATH)
    tiles = random_tiles(1, 256)
    mean, std = torch.tensor(GIGAPATH.mean), torch.tensor(GIGAPATH.std)
    centre = ((tiles[0, 16:240, 16:240] / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(encoder.normalise(tiles)[0], centre, rtol=0, atol=1e-5)


def test_bicubic_resizing_stays_within_a_tiles_values():
    tiles = (torch.arange(300)[:, None, None] // 60 % 2 * 255).expand(1, 300, 300, 3).to(torch.uint8)
    images = encoder_of(tiny_transformer(), replace(VIRCHOW2, mean=(0.5,) * 3, std=(0.5,) * 3)).normalise(tiles)
    assert images.shape == (1, 3, 224, 224)
    assert (images.min().item(), images.max().item()) == pytest.approx((-1.0, 1.0))


def transformers_names(model, *, dinov2):
    """The weights of a timm model under the names that the package transformers saves them by."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        part = name.partition(".")[2].partition(".")[2]
        layer = f"encoder.layer.{name.split('.')[1]}" if name.startswith("blocks.") else ""
        if part.startswith("attn.qkv"):
            for which, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{which}.{part.rpartition('.')[2]}"] = values
            continue
        table = {
            "attn.proj": "attention.output.dense",
            "norm1": "norm1" if dinov2 else "layernorm_before",
            "norm2": "norm2" if dinov2 else "layernorm_after",
            "mlp.fc1": "mlp.fc1" if dinov2 else "intermediate.dense",
            "mlp.fc2": "mlp.fc2" if dinov2 else "output.dense",
        }
        stem = {
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
            "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
            "norm.weight": "layernorm.weight",
            "norm.bias": "layernorm.bias",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
        }
        module, _, kind = part.rpartition(".")
        inner = f"{table[module]}.{kind}" if module in table else stem.get(part)
        renamed[f"{layer}.{inner}" if layer else stem[name]] = tensor
    extra = {"embeddings.mask_token": torch.ones(1, 48)} if dinov2 else {"pooler.dense.weight": torch.ones(48, 48)}
    return renamed | extra


@pytest.mark.parametrize("dinov2", [False, True])
def test_weights_under_the_names_of_transformers_become_timms(dinov2):
    model = tiny_transformer(init_values=1e-5 if dinov2 else None)
    renamed = timm_names(transformers_names(model, dinov2=dinov2))
    expected = model.state_dict()
    assert sorted(renamed) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(renamed[name], tensor), name
    assert timm_names(expected).keys() == expected.keys(), "timm's own names stay"


@pytest.mark.parametrize("n_registers", [0, 4])
def test_dinov2s_own_weights_become_timms(n_registers):
    options = {"reg_tokens": n_registers, "no_embed_class": True} if n_registers else {}
    model = tiny_transformer(init_values=1e-5, **options)
    stored = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in model.state_dict().items()}
    stored["mask_token"] = torch.ones(1, 48)
    if n_registers:
        position = torch.full((1, 1, 48), 0.25)
        stored["register_tokens"] = stored.pop("reg_token")
        stored["pos_embed"] = torch.cat([position, stored["pos_embed"]], dim=1)
        stored["cls_token"] = stored["cls_token"] - position
    renamed = timm_names(stored)
    assert sorted(renamed) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(renamed[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("facts", FOREIGN, ids=names(FOREIGN))
def test_encoders_of_other_packages_say_which(tmp_path, facts):
    assert facts.package != "timm"
    message = rf"encoder '{facts.name}' needs the package '{facts.package}', got timm alone.*{facts.weights_page}"
    for weights in (None, tmp_path / "weights.pth"):
        with pytest.raises(EncoderError, match=message):
            create_encoder(facts.name, weights=weights, device="cpu")


def refuse(error):
    def download(repository, name):
        raise error

    return download


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lunit_vits16",
            r"huggingface\.co/1aurent/vit_small_patch16_224\.lunit_dino: no such file in the cache\. Where there is a "
            r"network, fetch model\.safetensors or pytorch_model\.bin from .* --weights FILE",
        ),
        ("kaiko_vits16", r"could not be had from .*kaiko_ai.*--weights FILE"),
    ],
)
def test_offline_the_error_says_how_to_fetch_by_hand(monkeypatch, name, message):
    error = LocalEntryNotFoundError("no such file in the cache.\nmore")
    monkeypatch.setattr(hub, "_obstacle", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse(error))
    with pytest.raises(EncoderError, match=message):
        create_encoder(name, device="cpu")


def test_a_gated_encoder_says_how_to_get_access(monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse(GatedRepoError("403: gated.", response=response)))
    expected = (
        r"encoder 'uni' could not be had from https://huggingface\.co/MahmoodLab/UNI: 403: gated\. Access is gated: "
        r"log in at https://huggingface\.co/MahmoodLab/UNI, accept the terms \(CC-BY-NC-ND-4\.0\), then run "
        r"`hf auth login` here; or fetch .* give it with --weights FILE"
    )
    for name in ("uni", "hf-hub:MahmoodLab/UNI"):
        with pytest.raises(EncoderError, match=expected):
            create_encoder(name, device="cpu")


def test_weights_that_are_on_no_hub_are_asked_for():
    with pytest.raises(
        EncoderError, match=r"'retccl' must be given its weights.*github\.com/Xiyue-Wang/RetCCL.*--weights"
    ):
        create_encoder("retccl", device="cpu")


def test_the_hubs_files_are_tried_in_turn(tmp_path, monkeypatch):
    file = tmp_path / "pytorch_model.bin"
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name == "model.safetensors":
            raise LocalEntryNotFoundError("no such file")
        return str(file)

    model = build_network(encoder_facts("resnet18"))
    weights = {**model.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(weights, file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    encoder = create_encoder("resnet18", device="cpu")
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors"), ("timm/resnet18.a1_in1k", "pytorch_model.bin")]
    assert encoder.n_features == 512


def test_a_timm_without_the_network_is_named(monkeypatch):
    timm = import_timm()
    monkeypatch.setattr(timm, "is_model", lambda name: False)
    with pytest.raises(EncoderError, match=rf"dinov3.*got timm {timm.__version__} without it. Install a newer timm"):
        create_encoder("dinov3_vits16", device="cpu")


@pytest.mark.parametrize(
    ("name", "tile_px", "tile_mpp", "advice"),
    [
        ("uni", 256, 0.5, []),
        ("uni", 224, 0.54, []),
        (
            "uni",
            512,
            0.25,
            [
                "encoder uni is recommended at 0.5 µm/px, tile_mpp is 0.25.",
                "encoder uni is recommended on tiles of 256 px, tile_px is 512: they are resized to 224 px.",
            ],
        ),
        (
            "gigapath",
            224,
            0.5,
            ["encoder gigapath is recommended on tiles of 256 px, tile_px is 224: they are resized to 256 px."],
        ),
        ("retccl", 512, 1.0, []),
        ("retccl", 512, 0.5, ["encoder retccl is recommended at 1 µm/px, tile_mpp is 0.5."]),
        ("resnet50", 300, 2.0, []),
        (
            "vit_small_patch16_224",
            256,
            0.5,
            [
                "encoder vit_small_patch16_224 is recommended on tiles of 224 px, tile_px is 256: "
                "they are resized to 224 px."
            ],
        ),
    ],
)
def test_tiles_that_are_not_the_encoders_are_advised_against(name, tile_px, tile_mpp, advice):
    assert tile_advice(encoder_facts(name), tile_px=tile_px, tile_mpp=tile_mpp) == advice


def test_a_job_warns_of_unusual_tiles_and_keeps_them(caplog):
    config = PreprocessConfig(slides=["s"], out="o", encoder="uni", tile_px=512, tile_mpp=0.25)
    _warn_of_unusual_tiles(config, SimpleNamespace(facts=UNI))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert (config.tile_px, config.tile_mpp) == (512, 0.25)
    caplog.clear()
    _warn_of_unusual_tiles(config, SimpleNamespace(facts=None))
    assert not caplog.records


@pytest.mark.parametrize("name", ["uni", "uni2_h", "virchow2", "gigapath", "h_optimus_1", "phikon_v2", "resnet50"])
def test_presets_are_what_the_registry_recommends(name):
    config = load_config(PreprocessConfig, f"preprocess/{name}.yaml", slides=["s"], out="o")
    facts = encoder_facts(config.encoder)
    assert facts.name == name
    assert facts.is_built_here
    assert (config.tile_px, config.tile_mpp) == (facts.tile_px or 256, facts.tile_mpp or 0.5)
    assert tile_advice(facts, tile_px=config.tile_px, tile_mpp=config.tile_mpp) == []


def test_the_table_has_a_line_an_encoder():
    lines = encoder_table(REGISTRY).splitlines()
    assert len(lines) == 1 + len(REGISTRY)
    uni = next(line for line in lines if line.startswith("uni "))
    assert " ".join(uni.split()) == "uni ViT-L/16 1024 256 px at 0.5 µm/px timm gated CC-BY-NC-ND-4.0"


def test_the_page_tells_everything():
    page = encoder_page(encoder_facts("virchow2"))
    for text in ("vit_huge_patch14_224", "reg_tokens=4", "mean of the patch tokens, 2560 numbers", "hf auth login"):
        assert text in page
    for facts in REGISTRY:
        assert all(doubt in encoder_page(facts) for doubt in facts.unconfirmed)


def test_the_commands_list_and_show(capsys):
    assert run_command_line(["encoders", "list"]) == 0
    assert "h_optimus_1" in capsys.readouterr().out
    assert run_command_line(["encoders", "show", "Prov-GigaPath"]) == 0
    assert "the centre 224 px of tiles resized to 256 px (bicubic)" in capsys.readouterr().out
    assert run_command_line(["encoders", "show", "unii"]) == 1
    assert "Did you mean uni" in capsys.readouterr().err


def test_listing_needs_no_torch():
    code = (
        "import sys; from acmil.cli import run_command_line; status = run_command_line(['encoders', 'list']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_resnet_to_its_third_stage_is_the_mean_over_that_stage(tmp_path):
    torch.manual_seed(0)
    whole = import_timm().create_model("resnet50", num_classes=7).eval()
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    encoder = create_encoder("resnet50_layer3", weights=tmp_path / "whole.safetensors", device="cpu", precision="fp32")
    tiles = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        images = encoder.normalise(tiles)
        stem = whole.maxpool(whole.act1(whole.bn1(whole.conv1(images))))
        expected = whole.layer3(whole.layer2(whole.layer1(stem))).mean(dim=(2, 3))
    assert encoder.n_features == 1024
    torch.testing.assert_close(encoder(tiles), expected)
