"""Batches through the encoder: what fits goes through, what does not is halved, a compiled network gets one size."""

import logging

import numpy as np
import pytest
import torch

from acmil.preprocessing.batch_encoder import BatchEncoder
from acmil.preprocessing.encoders import Encoder, EncoderError
from acmil.preprocessing.encoders.torchvision_schemas import import_timm


class SmallDevice:
    """An encoder on a device with memory for `most_tiles`; a tile's feature is its first pixel."""

    device = torch.device("cpu")

    def __init__(self, most_tiles: int, *, is_compiled: bool = False) -> None:
        self.most_tiles = most_tiles
        self.is_compiled = is_compiled
        self.sizes: list[int] = []

    def begin(self, tiles: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(tiles))
        if len(tiles) > self.most_tiles:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return tiles[:, 0, 0, :2].float()


def tiles_of(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8), 2 * 2 * 3).reshape(-1, 2, 2, 3)


def test_a_batch_that_does_not_fit_is_halved_once_and_for_all(caplog):
    device = SmallDevice(5)
    encoder = BatchEncoder(device, feature_dtype="float16", batch_size=16)
    with caplog.at_level(logging.WARNING):
        for start in (0, 16, 32):
            features = encoder.begin(tiles_of(*range(start, start + 16))).result()
            assert features.dtype == np.float16
            np.testing.assert_array_equal(features, np.repeat(np.arange(start, start + 16), 2).reshape(16, 2))
        np.testing.assert_array_equal(encoder.begin(tiles_of(7, 8, 9)).result()[:, 0], [7, 8, 9])
    assert device.sizes == [16, 8, *[4] * 12, 3]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "16 tiles at a time do not fit into the GPU's memory",
        "8 tiles at a time do not fit into the GPU's memory",
    ]
    assert "--batch-size 4" in caplog.text


def test_a_tile_that_does_not_fit_is_the_end():
    with pytest.raises(EncoderError, match=r"not even one does: CUDA out of memory.*--device cpu"):
        BatchEncoder(SmallDevice(0), feature_dtype="float32", batch_size=3).begin(tiles_of(1, 2))


def test_a_compiled_network_gets_full_batches_alone():
    device = SmallDevice(4, is_compiled=True)
    encoder = BatchEncoder(device, feature_dtype="float32", batch_size=4)
    np.testing.assert_array_equal(encoder.begin(tiles_of(5, 6, 7)).result(), [[5, 5], [6, 6], [7, 7]])
    np.testing.assert_array_equal(encoder.begin(tiles_of(1, 2, 3, 4)).result()[:, 1], [1, 2, 3, 4])
    assert device.sizes == [4, 4]


def test_warming_up_takes_one_batch_of_the_size_that_follows():
    device = SmallDevice(4, is_compiled=True)
    encoder = BatchEncoder(device, feature_dtype="float32", batch_size=4)
    encoder.warm_up(2)
    encoder.begin(tiles_of(5)).result()
    assert device.sizes == [4, 4]


def small_encoder(device: str) -> Encoder:
    torch.manual_seed(0)
    model = import_timm().create_model("test_efficientnet", num_classes=0)
    facts = {"name": "test", "input_px": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "is_fixed_size": False}
    return Encoder(model, device=torch.device(device), precision="fp32", **facts)


def test_the_compiled_function_is_what_runs(monkeypatch):
    calls = []

    def compiled(function, *, dynamic):
        assert not dynamic
        return lambda images: calls.append(images.shape) or function(images)

    monkeypatch.setattr(torch, "compile", compiled)
    encoder = small_encoder("cpu")
    tiles = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    expected = encoder(tiles)
    assert not encoder.is_compiled
    encoder.compile()
    assert encoder.is_compiled
    assert torch.equal(encoder(tiles), expected)
    assert calls == [(3, 3, 64, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_a_gpu_batches_come_from_page_locked_memory_and_give_what_a_call_gives(is_compiled):
    encoder = small_encoder("cuda")
    runner = BatchEncoder(encoder, feature_dtype="float32", batch_size=32)
    generator = np.random.default_rng(0)
    batches = []
    for n_tiles in (32, 32, 5):
        tiles = runner.allocate((n_tiles, 64, 64, 3))
        assert torch.from_numpy(tiles).is_pinned()
        tiles[:] = generator.integers(0, 256, tiles.shape)
        batches.append(tiles)
    expected = [encoder(torch.from_numpy(tiles.copy())).numpy() for tiles in batches]
    if is_compiled:
        encoder.compile()
    pending = [runner.begin(tiles) for tiles in batches]
    for features, wanted in zip(pending, expected, strict=True):
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if is_compiled else {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(features.result(), wanted, **tolerance)


@pytest.mark.gpu
def test_on_a_gpu_that_is_full_the_batch_is_halved():
    encoder = small_encoder("cuda")
    n_bytes = torch.cuda.get_device_properties(0).total_memory
    tiles = np.random.default_rng(0).integers(0, 256, (512, 64, 64, 3), dtype=np.uint8)
    expected = encoder(torch.from_numpy(tiles)).numpy()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / n_bytes)
    try:
        runner = BatchEncoder(encoder, feature_dtype="float32", batch_size=512)
        features = runner.begin(tiles).result()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert runner._most_tiles < 512
    np.testing.assert_allclose(features, expected, rtol=2e-2, atol=2e-3)
