"""What is known of an encoder: the record, and the error that all of this package raises."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Feature = Literal["pooled", "layer3_pooled", "class_token", "class_and_mean_patch"]
Interpolation = Literal["bilinear", "bicubic"]
Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
HALF: Channels = (0.5, 0.5, 0.5)


class EncoderError(ValueError):
    """An encoder that cannot be made: the message says what is wrong with its name or its weights."""


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """One published encoder.

    Attributes:
        name: The name to give as `--encoder`.
        organisation: Who published it.
        architecture: The network, for people ("ViT-L/16").
        package: What builds it: "timm" here, another package where this one cannot.
        timm_name: The timm model that it is, None where timm has none.
        timm_kwargs: Arguments to timm.create_model; `mlp_layer` is the name of a class of timm.layers.
        hub_id: Where its weights are on the Hugging Face hub, None if nowhere there.
        hub_files: Files of that page that may hold the weights, the first that exists is taken.
        weights_url: Where its weights are published if not on the hub.
        input_px: Side of the network's input.
        resize_px: Side that tiles are resized to before the centre of `input_px` is cut out; as a rule `input_px`.
        is_fixed_size: Whether the network takes that size alone.
        interpolation: How tiles are resized.
        mean: Channel means (R, G, B) in [0, 1] that are subtracted.
        std: Channel standard deviations that are divided by.
        feature: What of the network's output is the feature: its own pooling, that of a ResNet without its fourth
            stage, the class token, or the class token followed by the mean of the patch tokens.
        n_features: D, size of a feature vector.
        tile_px: Recommended side of a tile in px, None where none is recommended.
        tile_mpp: Recommended resolution of a tile in µm/px, None where none is recommended.
        licence: Licence of the weights.
        is_gated: Whether the hub asks for a login and the acceptance of terms.
        source: The encoder's own page.
        confirmed: Where the facts were seen.
        unconfirmed: Facts that no source was found for, or that sources disagree on.
        notes: What else to know.
        aliases: Other names that it is found by.
    """

    name: str
    organisation: str
    architecture: str
    package: str = "timm"
    timm_name: str | None = None
    timm_kwargs: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str | None = None
    hub_files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    weights_url: str | None = None
    input_px: int = 224
    resize_px: int | None = None
    is_fixed_size: bool = True
    interpolation: Interpolation = "bilinear"
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    feature: Feature = "class_token"
    n_features: int
    tile_px: int | None = None
    tile_mpp: float | None = None
    licence: str
    is_gated: bool = False
    source: str
    confirmed: str
    unconfirmed: tuple[str, ...] = ()
    notes: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def is_built_here(self) -> bool:
        """Whether this package builds it, with timm alone."""
        return self.package == "timm"

    @property
    def weights_page(self) -> str:
        """Where the weights are published."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else self.weights_url or self.source
