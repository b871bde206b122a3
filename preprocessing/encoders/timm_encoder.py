"""Encoders from timm: tiles in, one feature vector a tile out."""

import difflib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from acmil.preprocessing.devices import choose_device, cpu_multiplies_bf16
from acmil.preprocessing.encoders.facts import EncoderError, EncoderFacts, Feature, Interpolation
from acmil.preprocessing.encoders.features import token_feature
from acmil.preprocessing.encoders.hub import fetch_weights, hub_or_cache
from acmil.preprocessing.encoders.registry import HUB_PREFIXES, REGISTRY, find_encoder, foreign_help
from acmil.preprocessing.encoders.torchvision_schemas import import_timm
from acmil.preprocessing.encoders.weights import load_weights, weights_digest

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder:
    """A frozen network that turns tiles into features: resize, normalise, run, pool.

    Tiles are resized (antialiased) only where the network takes no other size, as vision transformers do. A
    convolutional network gets the tile as it is: its pooled features are defined at any size, and resampling twice
    would blur.

    Attributes:
        name: The name of the registry, or the timm name it was created by.
        facts: What the registry knows of it, None if it is not there.
        n_features: D, size of a feature vector.
        input_px: Side of the images the network was trained on.
        is_fixed_size: Whether tiles are resized to `input_px`.
        mean: Channel means (R, G, B) in [0, 1] that are subtracted.
        std: Channel standard deviations that are divided by.
        feature: What of the network's output is the feature.
        device: Where the network is.
        precision: fp32, bf16 or fp16: how the network computes. Features are returned in float32 always.
    """

    def __init__(
        self,
        model: Any,  # a timm model: a module, and what timm adds to one
        *,
        name: str,
        input_px: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        is_fixed_size: bool,
        device: torch.device,
        precision: Precision,
        feature: Feature = "pooled",
        resize_px: int | None = None,
        interpolation: Interpolation = "bilinear",
        facts: EncoderFacts | None = None,
    ) -> None:
        self.name = name
        self.facts = facts
        self.feature: Feature = feature
        self.n_features: int = model.num_features * (2 if feature == "class_and_mean_patch" else 1)
        self.input_px = input_px
        self._resize_px = resize_px or input_px
        self._interpolation = interpolation
        self.is_fixed_size = is_fixed_size
        self.mean = mean
        self.std = std
        self.device = device
        self.precision: Precision = precision
        self.model: nn.Module = model.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)
        self._network: Callable[[torch.Tensor], torch.Tensor] | None = None
        # (x/255 - mean)/std as one product and one sum.
        scale = 1.0 / (255.0 * torch.tensor(std))
        self._scale = scale.view(1, 3, 1, 1).to(device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).to(device)

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the weights."""
        return weights_digest(self.model)

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` has been called."""
        return self._network is not None

    def compile(self) -> None:
        """Have `torch.compile` make faster code of the network, at the first batch of each size; takes minutes."""
        self._network = torch.compile(self._features, dynamic=False)

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """Compute the features of a batch of tiles.

        Args:
            tiles: (B, H, W, 3) uint8, RGB, on any device.

        Returns:
            (B, D) float32 on the CPU.
        """
        return self.begin(tiles).cpu()  # (B, D)

    @torch.inference_mode()
    def begin(self, tiles: torch.Tensor) -> torch.Tensor:
        """Compute features as a call does, and leave them on the device: a GPU may still be at it on return.

        Args:
            tiles: (B, H, W, 3) uint8, RGB, on any device; if in page-locked memory, unchanged until the features are
                there.

        Returns:
            (B, D) float32 on the encoder's device.
        """
        with self._autocast():
            return (self._network or self._features)(self.normalise(tiles)).float()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        if self.feature in ("pooled", "layer3_pooled"):
            return model(images)
        tokens = model.forward_features(images)  # (B, T, C)
        return token_feature(tokens, self.feature, n_prefix_tokens=model.num_prefix_tokens)

    def normalise(self, tiles: torch.Tensor) -> torch.Tensor:
        """Turn uint8 tiles (B, H, W, 3) into the network's input (B, 3, h, w), float32, on its device."""
        if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != torch.uint8:
            raise EncoderError(f"tiles must be (B, H, W, 3) uint8, got {tuple(tiles.shape)} {tiles.dtype}.")
        images = tiles.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last
        if self.is_fixed_size:
            images = self._resize(images)
        images = images.mul_(self._scale).add_(self._shift)
        return images.contiguous(memory_format=torch.channels_last)

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images (B, 3, H, W) and cut their centre out, where the encoder's authors do."""
        size = (self._resize_px, self._resize_px)
        if images.shape[2:] != size:
            images = nn.functional.interpolate(images, size, mode=self._interpolation, antialias=True)
            images = images.clamp_(0, 255)  # bicubic weights are negative in places, and overshoot at edges
        margin = (self._resize_px - self.input_px) // 2
        return images[:, :, margin : margin + self.input_px, margin : margin + self.input_px]

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST_DTYPES[self.precision])


def create_encoder(name: str, *, weights: Path | None = None, device: str = "auto", precision: str = "auto") -> Encoder:
    """Create an encoder by name.

    Args:
        name: An encoder of the registry ("uni", "virchow2"; case and hyphens do not matter), else a timm model
            ("resnet34", "vit_small_patch16_224.augreg_in1k") or a Hugging Face id in timm's format
            ("hf-hub:organisation/model").
        weights: A local file of weights (.safetensors, or .pth, .pt, .bin, .torch of tensors alone); with it no network
            is touched. None: the published weights, from the Hugging Face hub or its cache.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        precision: "fp32", "bf16", "fp16", or "auto": on CUDA bf16 where the hardware has it, else fp16; on a CPU bf16
            where it has the instructions (AVX512-BF16 or AMX), else fp32.

    Returns:
        The encoder, its network on the device and in inference mode.

    Raises:
        EncoderError: If the name is not known or needs another package, the weights cannot be had or do not fit, or
            device or precision is not one that this machine has.
    """
    where = choose_device(device)
    how = resolve_precision(precision, where)
    facts = find_encoder(name)
    if facts is not None:
        return _registered(facts, weights, where, how)
    timm = import_timm()
    _check_name(timm, name)
    model = _pretrained(timm, name) if weights is None else _architecture(timm, name)
    if weights is not None:
        load_weights(model, weights, classifiers=_classifier_names(model))
    data = timm.data.resolve_data_config({}, model=model)
    logger.info("encoder %s on %s in %s", name, where, how)
    return Encoder(
        model,
        name=name,
        input_px=int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        # timm marks most networks of fixed size; a model from the hub may lack the mark, its patch embedding tells.
        is_fixed_size=bool(model.pretrained_cfg.get("fixed_input_size")) or hasattr(model, "patch_embed"),
        device=where,
        precision=how,
    )


def build_network(facts: EncoderFacts) -> Any:
    """Build an encoder's network with random weights and without its classifier.

    Args:
        facts: The encoder.

    Returns:
        The timm model.

    Raises:
        EncoderError: If it needs another package, or a newer timm.
    """
    timm = import_timm()
    model = _architecture(timm, _timm_name(timm, facts), **_timm_arguments(timm, facts.timm_kwargs))
    if facts.feature == "layer3_pooled":
        model.layer4, model.num_features = nn.Identity(), facts.n_features
    return model


def _timm_name(timm: Any, facts: EncoderFacts) -> str:
    if facts.timm_name is None:
        raise EncoderError(foreign_help(facts))
    if not timm.is_model(facts.timm_name):
        raise EncoderError(
            f"encoder {facts.name!r} must have the network {facts.timm_name} in timm, got timm {timm.__version__} "
            "without it. Install a newer timm."
        )
    return facts.timm_name


def _registered(facts: EncoderFacts, weights: Path | None, device: torch.device, precision: Precision) -> Encoder:
    _timm_name(import_timm(), facts)  # refused before anything is fetched
    path = weights or fetch_weights(facts)  # and the weights before gigabytes are allocated
    model = build_network(facts)
    left_out = ("layer4",) if facts.feature == "layer3_pooled" else ()
    load_weights(model, path, classifiers=(*_classifier_names(model), *left_out))
    logger.info("encoder %s on %s in %s", facts.name, device, precision)
    return Encoder(
        model,
        name=facts.name,
        input_px=facts.input_px,
        mean=facts.mean,
        std=facts.std,
        is_fixed_size=facts.is_fixed_size,
        device=device,
        precision=precision,
        feature=facts.feature,
        resize_px=facts.resize_px,
        interpolation=facts.interpolation,
        facts=facts,
    )


def _timm_arguments(timm: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Give timm the class of a layer, of which the facts hold the name."""
    classes = {name: getattr(timm.layers, value) for name, value in arguments.items() if name == "mlp_layer"}
    return {**arguments, **classes}


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Choose what "auto" stands for on `device`; the other names are checked and kept."""
    if precision in get_args(Precision):
        return precision  # type: ignore[return-value]
    if precision != "auto":
        raise EncoderError(f"precision must be auto, {', '.join(get_args(Precision))}, got {precision!r}.")
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def _architecture(timm: Any, name: str, **options: Any) -> Any:
    asks_hub = options.get("pretrained") or name.startswith(HUB_PREFIXES)
    try:
        with hub_or_cache() if asks_hub else nullcontext():
            return timm.create_model(name, num_classes=0, **options)
    except (RuntimeError, ValueError) as error:  # such as a tag that the model has no weights by
        raise EncoderError(f"encoder {name!r} cannot be created: {error}") from error
    except OSError as error:
        raise EncoderError(_hub_message(timm, name, error)) from error


def _pretrained(timm: Any, name: str) -> Any:
    if not name.startswith(HUB_PREFIXES) and not timm.is_model_pretrained(name):
        raise EncoderError(
            f"encoder must have pretrained weights, timm has none by the name {name!r}. "
            f"Give them with --weights FILE, or choose one of timm.list_models({name.partition('.')[0]!r} + '.*', "
            "pretrained=True)."
        )
    logger.info("encoder %s: pretrained weights from the Hugging Face hub or its cache", name)
    return _architecture(timm, name, pretrained=True)


def _check_name(timm: Any, name: str) -> None:
    if name.startswith(HUB_PREFIXES) or timm.is_model(name):
        return
    known = [*timm.list_models(), *(facts.name for facts in REGISTRY)]
    close = difflib.get_close_matches(name.partition(".")[0], known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else " See timm.list_models() for the names."
    raise EncoderError(
        f"encoder must be one of `acmil encoders list`, a timm model or hf-hub:organisation/model, got {name!r}.{hint}"
    )


def _hub_message(timm: Any, name: str, error: OSError) -> str:
    reason = str(error).strip().partition("\n")[0]
    if name.startswith(HUB_PREFIXES):
        source = name[len(HUB_PREFIXES[0]) :]
        mend = f"Run `hf download {source}` where there is a network, and copy the cache that it fills (HF_HOME) here."
    else:
        source = timm.get_pretrained_cfg(name).hf_hub_id or "timm"
        mend = "Fetch model.safetensors from that page where there is a network, and give it with --weights FILE."
    return (
        f"encoder {name!r} could not be had from https://huggingface.co/{source}: {reason} {mend} "
        "A gated model asks for a login first."
    )


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
