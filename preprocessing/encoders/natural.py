"""Encoders trained on natural images: what pathology encoders are compared with. All are timm's own weights."""

from acmil.preprocessing.encoders.facts import HALF, IMAGENET_MEAN, IMAGENET_STD, EncoderFacts

_CONFIRMED = "timm 1.0.31's own configuration of these weights"
_DINOV3_LICENCE = "DINOv3 licence"


def _convolutional(name: str, tag: str, architecture: str, width: int, *, is_half: bool = False) -> EncoderFacts:
    return EncoderFacts(
        name=name,
        organisation="timm",
        architecture=architecture,
        timm_name=name,
        hub_id=f"timm/{name}.{tag}",
        is_fixed_size=False,
        interpolation="bicubic",
        mean=HALF if is_half else IMAGENET_MEAN,
        std=HALF if is_half else IMAGENET_STD,
        feature="pooled",
        n_features=width,
        licence="Apache-2.0",
        source=f"https://huggingface.co/timm/{name}.{tag}",
        confirmed=_CONFIRMED,
    )


def _transformer(name: str, tag: str, architecture: str, width: int) -> EncoderFacts:
    return EncoderFacts(
        name=name,
        organisation="timm",
        architecture=architecture,
        timm_name=name,
        hub_id=f"timm/{name}.{tag}",
        interpolation="bicubic",
        mean=HALF,
        std=HALF,
        n_features=width,
        licence="Apache-2.0",
        source=f"https://huggingface.co/timm/{name}.{tag}",
        confirmed=_CONFIRMED,
    )


def _dinov2(size: str, timm_size: str, width: int) -> EncoderFacts:
    timm_name = f"vit_{timm_size}_patch14_dinov2"
    return EncoderFacts(
        name=f"dinov2_vit{size}14",
        organisation="Meta",
        architecture=f"ViT-{size.upper()}/14",
        timm_name=timm_name,
        timm_kwargs={"dynamic_img_size": True},
        hub_id=f"timm/{timm_name}.lvd142m",
        interpolation="bicubic",
        n_features=width,
        licence="Apache-2.0",
        source=f"https://huggingface.co/timm/{timm_name}.lvd142m",
        confirmed=_CONFIRMED,
        notes=f"Its position embedding, for 518 px, is interpolated to 224 px; --encoder {timm_name} keeps 518 px.",
    )


def _dinov3(size: str, timm_size: str, width: int) -> EncoderFacts:
    timm_name = f"vit_{timm_size}_patch16_dinov3"
    return EncoderFacts(
        name=f"dinov3_vit{size}16",
        organisation="Meta",
        architecture=f"ViT-{size.upper()}/16, 4 registers",
        timm_name=timm_name,
        hub_id=f"timm/{timm_name}.lvd1689m",
        input_px=256,
        interpolation="bicubic",
        n_features=width,
        licence=_DINOV3_LICENCE,
        source=f"https://huggingface.co/timm/{timm_name}.lvd1689m",
        confirmed=_CONFIRMED + " (which also says that Meta's feature is the class token)",
        unconfirmed=("is_gated: timm's copy",),
        notes=f"--encoder {timm_name} is the same network with timm's pooling, the mean of the patch tokens.",
    )


_RESNET50_LAYER3 = EncoderFacts(
    name="resnet50_layer3",
    organisation="torchvision",
    architecture="ResNet-50 to its third stage",
    timm_name="resnet50",
    hub_id="timm/resnet50.tv_in1k",
    is_fixed_size=False,
    feature="layer3_pooled",
    n_features=1024,
    licence="BSD-3-Clause",
    source="https://huggingface.co/timm/resnet50.tv_in1k",
    confirmed=_CONFIRMED + "; CLAM's paper (arXiv 2004.09666) on the stage and the 1024 features",
    notes="The encoder that CLAM began with; torchvision's first ImageNet weights.",
    aliases=("resnet50_trunc",),
)

NATURAL = (
    _convolutional("resnet18", "a1_in1k", "ResNet-18", 512),
    _convolutional("resnet50", "a1_in1k", "ResNet-50", 2048),
    _RESNET50_LAYER3,
    _convolutional("convnext_tiny", "in12k_ft_in1k", "ConvNeXt-T", 768),
    _convolutional("convnext_base", "fb_in22k_ft_in1k", "ConvNeXt-B", 1024),
    _convolutional("tf_efficientnet_lite0", "in1k", "EfficientNet-Lite0", 1280, is_half=True),
    _transformer("vit_small_patch16_224", "augreg_in21k_ft_in1k", "ViT-S/16", 384),
    _transformer("vit_base_patch16_224", "augreg2_in21k_ft_in1k", "ViT-B/16", 768),
    _transformer("vit_large_patch16_224", "augreg_in21k_ft_in1k", "ViT-L/16", 1024),
    _dinov2("s", "small", 384),
    _dinov2("b", "base", 768),
    _dinov2("l", "large", 1024),
    _dinov3("s", "small", 384),
    _dinov3("b", "base", 768),
    _dinov3("l", "large", 1024),
)
