"""Weights of the hub where it cannot be reached: said in seconds, and the cache is used; else it is asked."""

import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from acmil.preprocessing.encoders import EncoderError, create_encoder
from acmil.preprocessing.encoders.hub import hub_or_cache


@pytest.fixture(autouse=True)
def _empty_cache_and_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def closed_port():
    """An address of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("resnet10t.c3_in1k", "Fetch model.safetensors .* --weights FILE"),
        ("hf-hub:some/model", "Run `hf download some/model`"),
        ("lunit_vits16", "fetch model.safetensors or pytorch_model.bin .* --weights FILE"),
    ],
)
def test_a_hub_out_of_reach_is_said_within_seconds(monkeypatch, closed_port, name, mend):
    monkeypatch.setattr(constants, "ENDPOINT", closed_port)
    begun = time.monotonic()
    with pytest.raises(EncoderError, match=rf"cannot be reached \(.*refused\), and is not in the cache\. .*{mend}"):
        create_encoder(name, device="cpu")
    assert time.monotonic() - begun < 8.0
    assert not constants.HF_HUB_OFFLINE


def test_the_cache_is_used_where_the_hub_is_out_of_reach(monkeypatch, closed_port, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", closed_port)
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"weights")
    with hub_or_cache():
        path = hf_hub_download("some/model", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == b"weights"


def test_a_hub_that_takes_the_connection_is_asked_however_slow(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub_or_cache():
            assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_through_a_proxy_the_hub_is_asked(monkeypatch, closed_port, variable):
    monkeypatch.setattr(constants, "ENDPOINT", closed_port.replace("127.0.0.1", "hub.invalid"))
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    monkeypatch.setenv(variable, "socks5://127.0.0.1:1")
    with hub_or_cache():
        assert not constants.HF_HUB_OFFLINE


def test_offline_by_the_users_choice_stays_so(monkeypatch, closed_port):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", closed_port)
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
