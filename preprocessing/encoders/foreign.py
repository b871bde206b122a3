"""Encoders trained on pathology slides that need another package than timm: known here, built there."""

from acmil.preprocessing.encoders.facts import CLIP_MEAN, CLIP_STD, HALF, EncoderFacts

_HIBOU_MEAN, _HIBOU_STD = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
_NON_COMMERCIAL = "CC-BY-NC-ND-4.0"

CONCH_V1 = EncoderFacts(
    name="conch_v1",
    organisation="Mahmood Lab",
    architecture="ViT-B/16 with attentional pooling (CoCa)",
    package="conch",
    hub_id="MahmoodLab/CONCH",
    input_px=448,
    interpolation="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    feature="pooled",
    n_features=512,
    tile_px=512,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://github.com/mahmoodlab/CONCH",
    confirmed="authors' factory.py, transform.py (normalisation, interpolation); TRIDENT (feature, tile, mpp, licence)",
    unconfirmed=("input_px: seen in other tools' copies of its configuration",),
    notes="pip install git+https://github.com/mahmoodlab/CONCH.git; the feature is the image before the contrastive "
    "projection.",
    aliases=("conch",),
)
CONCH_V15 = EncoderFacts(
    name="conch_v15",
    organisation="Mahmood Lab",
    architecture="ViT-L/16 with attentional pooling",
    package="transformers",
    hub_id="MahmoodLab/conchv1_5",
    input_px=448,
    interpolation="bicubic",
    feature="pooled",
    n_features=768,
    tile_px=512,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://huggingface.co/MahmoodLab/conchv1_5",
    confirmed="discussion on the model page (input, interpolation); CLAM's constants (normalisation); STAMP (loaded "
    "through MahmoodLab/TITAN); TRIDENT (dimension, tile, mpp, licence)",
    unconfirmed=("architecture",),
    notes="Comes with TITAN's own code: trust_remote_code=True, then return_conch(); needs einops and einops_exts too.",
    aliases=("conchv1_5", "conch_v1_5"),
)


def _hibou(size: str, width: int, *, unconfirmed: tuple[str, ...]) -> EncoderFacts:
    return EncoderFacts(
        name=f"hibou_{size.lower()}",
        organisation="HistAI",
        architecture=f"ViT-{size}/14, 4 registers",
        package="transformers",
        hub_id=f"histai/hibou-{size}" if size == "L" else "histai/hibou-b",
        interpolation="bicubic",
        mean=_HIBOU_MEAN,
        std=_HIBOU_STD,
        n_features=width,
        tile_px=224,
        tile_mpp=0.5,
        licence="Apache-2.0",
        is_gated=True,
        source="https://github.com/HistAI/hibou",
        confirmed="model card (licence, loading); eva (registers); TRIDENT (normalisation, feature, tile, mpp); "
        "LazySlide (dimension)",
        unconfirmed=unconfirmed,
        notes="Comes with its own code: trust_remote_code=True.",
    )


HIBOU = (
    _hibou("B", 768, unconfirmed=("is_gated: LazySlide says so, the model page as stored does not",)),
    _hibou("L", 1024, unconfirmed=()),
)
MIDNIGHT = EncoderFacts(
    name="midnight_12k",
    organisation="kaiko.ai",
    architecture="ViT-g/14",
    package="transformers",
    hub_id="kaiko-ai/midnight",
    mean=HALF,
    std=HALF,
    feature="class_and_mean_patch",
    n_features=3072,
    tile_px=224,
    tile_mpp=0.5,
    licence="MIT",
    source="https://github.com/kaiko-ai/Midnight",
    confirmed="authors' README (licence, access); LazySlide (normalisation, feature, dimension); TRIDENT (tile, mpp)",
    unconfirmed=("size of its position embedding, which its package interpolates otherwise than timm does",),
    notes="Trained at 2, 1, 0.5 and 0.25 µm/px.",
    aliases=("midnight", "midnight12k"),
)
CTRANSPATH = EncoderFacts(
    name="ctranspath",
    organisation="Sichuan University, Tencent",
    architecture="Swin-T with a convolutional stem",
    package="timm_ctp",
    weights_url="https://github.com/Xiyue-Wang/TransPath",
    feature="pooled",
    n_features=768,
    tile_px=224,
    tile_mpp=1.0,
    licence="GPL-3.0, non-commercial academic use",
    source="https://github.com/Xiyue-Wang/TransPath",
    confirmed="authors' README (modified timm 0.5.4, mpp, licence) and get_features_CTransPath.py (normalisation, "
    "input); LazySlide (dimension); a study by Owkin (tile)",
    notes="Needs its authors' modified timm 0.5.4; the package timm_ctp is that under another name.",
)
PLIP = EncoderFacts(
    name="plip",
    organisation="Stanford University",
    architecture="CLIP ViT-B/32",
    package="transformers",
    hub_id="vinid/plip",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    feature="pooled",
    n_features=512,
    licence="non-commercial",
    source="https://github.com/PathologyFoundation/plip",
    confirmed="STAMP (loading, normalisation, input); LazySlide (dimension, licence)",
    unconfirmed=("licence: LazySlide alone", "interpolation"),
    notes="CLIPModel; the feature is get_image_features. Trained on pictures of many magnifications: any tile.",
)
MUSK = EncoderFacts(
    name="musk",
    organisation="Stanford University",
    architecture="BEiT-3 large, patches of 16 px",
    package="musk",
    hub_id="xiangjx/musk",
    input_px=384,
    interpolation="bicubic",
    mean=HALF,
    std=HALF,
    n_features=1024,
    tile_px=384,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://github.com/lilab-stanford/MUSK",
    confirmed="authors' README (loading, licence); TRIDENT (input, normalisation, dimension, tile, mpp)",
    notes="pip install fairscale git+https://github.com/lilab-stanford/MUSK; for MIL without head and normalisation.",
)

FOREIGN = (CONCH_V1, CONCH_V15, *HIBOU, MIDNIGHT, CTRANSPATH, PLIP, MUSK)
