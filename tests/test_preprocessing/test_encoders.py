"""Encoders: what goes into the network, which weights it has, and what is refused."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acmil.preprocessing import devices
from acmil.preprocessing.encoders import EncoderError, create_encoder, timm_encoder, weights
from acmil.preprocessing.encoders.torchvision_schemas import import_timm

SEED = 0


def random_weights(name: str, path: Path, **options) -> nn.Module:
    """Save a randomly initialised model's weights, and return the model."""
    torch.manual_seed(SEED)
    model = import_timm().create_model(name, **options)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model.eval()


def random_tiles(n_tiles: int, side_px: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (n_tiles, side_px, side_px, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    ("name", "n_features", "mean", "std"),
    [
        ("resnet18", 512, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("tf_efficientnet_lite0", 1280, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("test_efficientnet", 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_features_are_the_models_own_on_normalised_tiles(file, name, n_features, mean, std):
    model = random_weights(name, file, num_classes=0)
    encoder = create_encoder(name, weights=file, device="cpu", precision="fp32")
    assert (encoder.name, encoder.n_features, encoder.mean, encoder.std) == (name, n_features, mean, std)
    tiles = random_tiles(3, 64)  # a convolutional network keeps the tile's size
    images = (tiles.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    np.testing.assert_allclose(encoder.normalise(tiles), images.float(), atol=1e-6)
    with torch.inference_mode():
        expected = model(images.float())
    features = encoder(tiles)
    assert features.shape == (3, n_features)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-5)


def test_a_vision_transformer_gets_its_own_size(file):
    model = random_weights("test_vit", file, num_classes=0)
    encoder = create_encoder("test_vit", weights=file, device="cpu", precision="fp32")
    assert (encoder.input_px, encoder.is_fixed_size) == (160, True)
    tiles = random_tiles(2, 256)
    images = encoder.normalise(tiles)
    assert images.shape == (2, 3, 160, 160)
    # Antialiased shrinking keeps a constant a constant, and averages noise: its spread falls by more than half.
    assert images.std() < 0.6 * (tiles.float() / 127.5 - 1).std()
    flat = torch.full((1, 256, 256, 3), 51, dtype=torch.uint8)
    np.testing.assert_allclose(encoder.normalise(flat), 51 / 255 / 0.5 - 1, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tiles), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_close_and_returned_as_float32(file, precision):
    random_weights("test_efficientnet", file)
    tiles = random_tiles(4, 64)
    exact = create_encoder("test_efficientnet", weights=file, device="cpu", precision="fp32")(tiles)
    encoder = create_encoder("test_efficientnet", weights=file, device="cpu", precision=precision)
    features = encoder(tiles)
    assert (encoder.precision, features.dtype) == (precision, torch.float32)
    assert not torch.equal(features, exact)
    assert torch.nn.functional.cosine_similarity(features, exact).min() > 0.999


def test_the_same_features_alone_and_in_a_batch(file):
    random_weights("test_resnet", file)
    encoder = create_encoder("test_resnet", weights=file, device="cpu", precision="fp32")
    tiles = random_tiles(5, 64)
    one_by_one = torch.cat([encoder(tile[None]) for tile in tiles])
    torch.testing.assert_close(encoder(tiles), one_by_one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("cpu_info", "precision"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx2\n", "bf16"),
        ("flags : amx_bf16\n", "bf16"),
        ("flags : avx2\n", "fp32"),
        ("", "fp32"),
        (None, "fp32"),
    ],
)
def test_auto_precision_on_a_cpu_follows_its_instructions(tmp_path, monkeypatch, cpu_info, precision):
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info)
    monkeypatch.setattr(devices, "_CPU_INFO", path)
    assert timm_encoder.resolve_precision("auto", torch.device("cpu")) == precision
    assert timm_encoder.resolve_precision("fp16", torch.device("cpu")) == "fp16"


def test_digest_is_of_the_weights_without_the_classifier(tmp_path, file):
    random_weights("test_resnet", file)
    first = create_encoder("test_resnet", weights=file, device="cpu", precision="fp32")
    again = create_encoder("test_resnet", weights=file, device="cpu", precision="bf16")
    assert len(first.digest) == 64
    assert first.digest == again.digest
    other = tmp_path / "other.pt"
    changed = weights.read_weights(file)
    changed["fc.weight" if "fc.weight" in changed else "head.fc.weight"] += 1.0
    torch.save(changed, other)
    assert create_encoder("test_resnet", weights=other, device="cpu").digest == first.digest
    changed["conv1.0.weight" if "conv1.0.weight" in changed else "conv1.weight"].view(-1)[0] += 1.0
    torch.save(changed, other)
    assert create_encoder("test_resnet", weights=other, device="cpu").digest != first.digest


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "teacher", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_wrapped_weights_are_found(tmp_path, file, wrapper, prefix, suffix):
    random_weights("test_resnet", file)
    expected = create_encoder("test_resnet", weights=file, device="cpu").digest
    stored = {prefix + name: tensor for name, tensor in weights.read_weights(file).items()}
    if prefix == "backbone.":
        stored["dino_head.mlp.weight"] = torch.zeros(2, 2)
    path = tmp_path / f"training{suffix}"
    torch.save(stored if wrapper is None else {wrapper: stored, "epoch": 3}, path)
    assert create_encoder("test_resnet", weights=path, device="cpu").digest == expected


def test_weights_of_another_shape_are_refused_by_name(file):
    random_weights("test_resnet", file)
    stored = weights.read_weights(file)
    name = next(name for name in stored if name.startswith("layer2") and "conv" in name)
    found = (*stored[name].shape, 2)
    save_file(stored | {name: torch.zeros(found)}, file)
    expected = rf"tensor '{name}' must have shape \(.*\), got \({', '.join(map(str, found))}\) .*weights\.safetensors"
    with pytest.raises(EncoderError, match=expected):
        create_encoder("test_resnet", weights=file, device="cpu")


def test_missing_and_unknown_tensors_are_refused(file):
    random_weights("test_resnet", file)
    stored = weights.read_weights(file)
    name = next(name for name in stored if name.startswith("layer2") and "conv" in name)
    save_file({key: tensor for key, tensor in stored.items() if key != name}, file)
    with pytest.raises(EncoderError, match=f"tensor '{name}' must have shape .* found none"):
        create_encoder("test_resnet", weights=file, device="cpu")
    save_file(stored | {"layer9.weight": torch.zeros(1)}, file)
    with pytest.raises(EncoderError, match=r"got 1 more, first 'layer9\.weight'"):
        create_encoder("test_resnet", weights=file, device="cpu")


class Payload:
    """What a hostile file would hold: an object whose unpickling runs code."""

    def __reduce__(self):
        return (sys.exit, (99,))


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(EncoderError, match=r"tensors alone.*hostile\.pth"):
        create_encoder("test_resnet", weights=path, device="cpu")
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(EncoderError, match="tensors alone"):
        create_encoder("test_resnet", weights=path, device="cpu")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 1000, b"\x80\x02" + b"u" * 99]
)
def test_files_that_are_no_weights_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(EncoderError, match=rf"tensors alone and be whole.*broken\{suffix}"):
        create_encoder("test_resnet", weights=path, device="cpu")


def test_a_cut_weights_file_is_refused(tmp_path, file):
    random_weights("test_resnet", file)
    torch.save(weights.read_weights(file), tmp_path / "cut.pth")
    for path in (file, tmp_path / "cut.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(EncoderError, match="be whole"):
            create_encoder("test_resnet", weights=path, device="cpu")


def test_other_wrong_weights_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(EncoderError, match=r"ending in .*\.pth, \.pt, \.bin, \.torch, got 'weights\.npz'"):
        create_encoder("test_resnet", weights=path, device="cpu")
    with pytest.raises(EncoderError, match=r"must exist, found none .*none\.pth"):
        create_encoder("test_resnet", weights=tmp_path / "none.pth", device="cpu")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(EncoderError, match="must hold a dictionary of tensors, got list"):
        create_encoder("test_resnet", weights=tmp_path / "list.pth", device="cpu")
    torch.save({"net": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(EncoderError, match="got dict under 'net'"):
        create_encoder("test_resnet", weights=tmp_path / "nested.pth", device="cpu")


def efficientnet_pytorch_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under other names, as EfficientNet-PyTorch gives them: same order, same last part."""
    state = model.state_dict()
    names = [f"_layers.{i}.{name.rpartition('.')[2]}" for i, name in enumerate(state)]
    names[0], names[-2], names[-1] = "_conv_stem.weight", "_fc.weight", "_fc.bias"
    return dict(zip(names, state.values(), strict=True))


def test_efficientnet_pytorch_weights_are_taken_in_order(tmp_path, file):
    model = random_weights("tf_efficientnet_lite0", file)
    stored = efficientnet_pytorch_names(model)
    assert len(stored) == 296
    path = tmp_path / "efficientnet.pth"
    torch.save(stored, path)
    direct = create_encoder("tf_efficientnet_lite0", weights=file, device="cpu")
    assert create_encoder("tf_efficientnet_lite0", weights=path, device="cpu").digest == direct.digest

    swapped = list(stored.items())
    swapped[2], swapped[3] = swapped[3], swapped[2]
    torch.save(dict(swapped), path)
    with pytest.raises(EncoderError, match=r"in order.*efficientnet\.pth"):
        create_encoder("tf_efficientnet_lite0", weights=path, device="cpu")
    torch.save(stored, path)
    with pytest.raises(EncoderError, match="in order, got 294 tensors"):
        create_encoder("test_efficientnet", weights=path, device="cpu")
    first = next(iter(stored))
    torch.save(stored | {first: torch.zeros(32, 3, 5, 5)}, path)
    with pytest.raises(EncoderError, match=r"'conv_stem.weight' must have shape \(32, 3, 3, 3\), got \(32, 3, 5, 5\)"):
        create_encoder("tf_efficientnet_lite0", weights=path, device="cpu")


def test_names_that_are_none_are_refused_with_the_nearest():
    with pytest.raises(EncoderError, match=r"got 'resnet_18'\. Did you mean .*resnet18"):
        create_encoder("resnet_18", device="cpu")
    with pytest.raises(EncoderError, match="got 'MahmoodLab/UNI'"):
        create_encoder("MahmoodLab/UNI", device="cpu")
    for name in ("resnet18.nosuchtag", "efficientnet_b6"):
        with pytest.raises(EncoderError, match=f"timm has none by the name '{name}'.*--weights FILE"):
            create_encoder(name, device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "test_resnet",
            r"huggingface\.co/timm/test_resnet\.r160_in1k: cannot find .* model\.safetensors .*--weights FILE",
        ),
        ("hf-hub:some/model", r"huggingface\.co/some/model: cannot find .* `hf download some/model`"),
    ],
)
def test_without_a_network_the_error_says_how_to_fetch_by_hand(monkeypatch, name, message):
    def no_network(*args, **options):
        raise FileNotFoundError("cannot find the requested files in the local cache.")

    monkeypatch.setattr(import_timm(), "create_model", no_network)
    with pytest.raises(EncoderError, match=message):
        create_encoder(name, device="cpu")


def test_precision_and_tiles_are_checked(file):
    random_weights("test_resnet", file)
    with pytest.raises(EncoderError, match=r"precision must be auto, fp32, bf16, fp16, got 'fp8'"):
        create_encoder("test_resnet", weights=file, device="cpu", precision="fp8")
    encoder = create_encoder("test_resnet", weights=file, device="cpu")
    with pytest.raises(EncoderError, match=r"got \(1, 3, 64, 64\) torch.uint8"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(EncoderError, match=r"got \(1, 64, 64, 3\) torch.float32"):
        encoder(torch.zeros(1, 64, 64, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "similarity"), [("fp32", 0.99999), ("auto", 0.999), ("fp16", 0.999)])
def test_a_gpu_gives_the_cpus_features(file, precision, similarity):
    random_weights("test_efficientnet", file)
    tiles = random_tiles(4, 64)
    exact = create_encoder("test_efficientnet", weights=file, device="cpu", precision="fp32")(tiles)
    features = create_encoder("test_efficientnet", weights=file, device="cuda", precision=precision)(tiles)
    assert features.device.type == "cpu"
    assert torch.nn.functional.cosine_similarity(features, exact).min() > similarity
