"""Encoders trained on pathology slides that timm alone can build.

Facts only, each with where it was seen; nothing of those pages' code is here. TRIDENT, STAMP, LazySlide and eva are
other tools that load these encoders: where an encoder's own page is behind a login, they are the witnesses.
"""

from acmil.preprocessing.encoders.facts import HALF, EncoderFacts

_BIOPTIMUS_MEAN, _BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_LUNIT_MEAN, _LUNIT_STD = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_GIANT = {"img_size": 224, "init_values": 1e-5}
_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
_NON_COMMERCIAL = "CC-BY-NC-ND-4.0"

UNI = EncoderFacts(
    name="uni",
    organisation="Mahmood Lab",
    architecture="ViT-L/16",
    timm_name="vit_large_patch16_224",
    timm_kwargs={"img_size": 224, "init_values": 1e-5},
    hub_id="MahmoodLab/UNI",
    n_features=1024,
    tile_px=256,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://github.com/mahmoodlab/UNI",
    confirmed="authors' README (architecture, normalisation, feature, licence); TRIDENT's table (tile, mpp)",
    aliases=("uni_v1",),
)
UNI2_H = EncoderFacts(
    name="uni2_h",
    organisation="Mahmood Lab",
    architecture="ViT-H/14, 8 registers",
    timm_name="vit_giant_patch14_224",
    timm_kwargs={
        "img_size": 224,
        "patch_size": 14,
        "depth": 24,
        "num_heads": 24,
        "init_values": 1e-5,
        "embed_dim": 1536,
        "mlp_ratio": 2.66667 * 2,
        "no_embed_class": True,
        "reg_tokens": 8,
        **_SWIGLU,
    },
    hub_id="MahmoodLab/UNI2-h",
    n_features=1536,
    tile_px=256,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://huggingface.co/MahmoodLab/UNI2-h",
    confirmed="eva and TRIDENT, which agree (architecture, normalisation); TRIDENT's table (tile, mpp, licence)",
    aliases=("uni2", "uni_v2"),
)
VIRCHOW = EncoderFacts(
    name="virchow",
    organisation="Paige",
    architecture="ViT-H/14",
    timm_name="vit_huge_patch14_224",
    timm_kwargs=_VIRCHOW,
    hub_id="paige-ai/Virchow",
    interpolation="bicubic",
    feature="class_and_mean_patch",
    n_features=2560,
    tile_px=224,
    tile_mpp=0.5,
    licence="Apache-2.0, with the page's terms",
    is_gated=True,
    source="https://huggingface.co/paige-ai/Virchow",
    confirmed="model card (licence, access); TRIDENT (architecture, normalisation, feature, tile, mpp)",
)
VIRCHOW2 = EncoderFacts(
    name="virchow2",
    organisation="Paige",
    architecture="ViT-H/14, 4 registers",
    timm_name="vit_huge_patch14_224",
    timm_kwargs={**_VIRCHOW, "reg_tokens": 4},
    hub_id="paige-ai/Virchow2",
    interpolation="bicubic",
    feature="class_and_mean_patch",
    n_features=2560,
    tile_px=224,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://huggingface.co/paige-ai/Virchow2",
    confirmed="model page (licence); eva and TRIDENT, which agree (architecture, feature); TRIDENT (tile, mpp)",
    notes="Trained at 2, 1, 0.5 and 0.25 µm/px. The four register tokens are no part of the feature.",
)
GIGAPATH = EncoderFacts(
    name="gigapath",
    organisation="Microsoft, Providence",
    architecture="ViT-g/16",
    timm_name="vit_giant_patch14_dinov2",
    timm_kwargs={**_GIANT, "patch_size": 16, "mlp_ratio": 5.33334},
    hub_id="prov-gigapath/prov-gigapath",
    resize_px=256,
    interpolation="bicubic",
    n_features=1536,
    tile_px=256,
    tile_mpp=0.5,
    licence="Apache-2.0, research use only by the page's terms",
    is_gated=True,
    source="https://github.com/prov-gigapath/prov-gigapath",
    confirmed="authors' README (normalisation, resizing, access, terms); TRIDENT (architecture, tile, mpp, licence)",
    notes="Tiles are resized to 256 px and the centre 224 px is taken, as its authors do.",
    aliases=("prov_gigapath",),
)
H_OPTIMUS_0 = EncoderFacts(
    name="h_optimus_0",
    organisation="Bioptimus",
    architecture="ViT-g/14, 4 registers",
    timm_name="vit_giant_patch14_reg4_dinov2",
    timm_kwargs=_GIANT,
    hub_id="bioptimus/H-optimus-0",
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    n_features=1536,
    tile_px=224,
    tile_mpp=0.5,
    licence="Apache-2.0",
    is_gated=True,
    source="https://huggingface.co/bioptimus/H-optimus-0",
    confirmed="model page (licence, file); TRIDENT and LazySlide, which agree (architecture, normalisation); TRIDENT "
    "(tile, mpp)",
    unconfirmed=("is_gated: TRIDENT says that it is, LazySlide that it is not",),
    aliases=("hoptimus0",),
)
H_OPTIMUS_1 = EncoderFacts(
    name="h_optimus_1",
    organisation="Bioptimus",
    architecture="ViT-g/14, 4 registers",
    timm_name="vit_giant_patch14_reg4_dinov2",
    timm_kwargs=_GIANT,
    hub_id="bioptimus/H-optimus-1",
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    n_features=1536,
    tile_px=224,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://huggingface.co/bioptimus/H-optimus-1",
    confirmed="TRIDENT, LazySlide and STAMP, which agree (architecture, normalisation); TRIDENT (tile, mpp, licence)",
    aliases=("hoptimus1",),
)
H0_MINI = EncoderFacts(
    name="h0_mini",
    organisation="Owkin, Bioptimus",
    architecture="ViT-B/14, 4 registers",
    timm_name="vit_base_patch14_reg4_dinov2",
    timm_kwargs={**_GIANT, "mlp_ratio": 5.33334, **_SWIGLU},
    hub_id="bioptimus/H0-mini",
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    interpolation="bicubic",
    feature="class_and_mean_patch",
    n_features=1536,
    tile_px=224,
    tile_mpp=0.5,
    licence=_NON_COMMERCIAL,
    is_gated=True,
    source="https://huggingface.co/bioptimus/H0-mini",
    confirmed="docs.bioptimus.com (feature, dimension, tile, mpp, normalisation); LazySlide (MLP kind, licence)",
    unconfirmed=(
        "timm_name and mlp_ratio: not read off the page's config.json, but they give its 85.7 M parameters and 261 "
        "tokens of 768; reading the weights checks every shape",
    ),
)
PHIKON = EncoderFacts(
    name="phikon",
    organisation="Owkin",
    architecture="ViT-B/16",
    timm_name="vit_base_patch16_224",
    timm_kwargs={"img_size": 224},
    hub_id="owkin/phikon",
    n_features=768,
    tile_px=224,
    tile_mpp=0.5,
    licence="Owkin non-commercial",
    source="https://github.com/owkin/HistoSSLscaling",
    confirmed="authors' README (architecture, dimension, tile, mpp); model page (LayerNorm's epsilon is timm's); "
    "TRIDENT (normalisation, feature, licence)",
    notes="Its file has the names of the package transformers, which are turned into timm's.",
)
PHIKON_V2 = EncoderFacts(
    name="phikon_v2",
    organisation="Owkin",
    architecture="ViT-L/16",
    timm_name="vit_large_patch16_224",
    timm_kwargs={"img_size": 224, "init_values": 1e-5},
    hub_id="owkin/phikon-v2",
    n_features=1024,
    tile_px=224,
    tile_mpp=0.5,
    licence="Owkin non-commercial",
    source="https://huggingface.co/owkin/phikon-v2",
    confirmed="paper arXiv 2409.09173 (ViT-L/16 by DINOv2, no registers, tile, mpp); TRIDENT (normalisation, feature, "
    "licence); LazySlide (parameters)",
    unconfirmed=("that its position embedding is for 224 px, as the parameters count; reading the weights checks it",),
    notes="Its file has the names of the package transformers, which are turned into timm's.",
)
GPFM = EncoderFacts(
    name="gpfm",
    organisation="HKUST",
    architecture="ViT-L/14",
    timm_name="vit_large_patch14_dinov2",
    timm_kwargs={"img_size": 224, "init_values": 1e-5},
    hub_id="majiabo/GPFM",
    hub_files=("GPFM.pth",),
    interpolation="bicubic",
    n_features=1024,
    tile_px=512,
    tile_mpp=0.25,
    licence="see its page",
    source="https://github.com/birkhoffkiki/GPFM",
    confirmed="authors' README (tile, 40x, dimension); eva, TRIDENT and LazySlide, which agree (architecture); TRIDENT "
    "and LazySlide (normalisation, file)",
    unconfirmed=("licence: TRIDENT says MIT, LazySlide CC-BY-NC-ND-4.0",),
)


def _kaiko(size: str, patch_px: int, width: int, timm_name: str, **timm_kwargs: object) -> EncoderFacts:
    return EncoderFacts(
        name=f"kaiko_vit{size}{patch_px}",
        organisation="kaiko.ai",
        architecture=f"ViT-{size.upper()}/{patch_px}",
        timm_name=timm_name,
        timm_kwargs=timm_kwargs,
        hub_id=f"1aurent/{timm_name}.kaiko_ai_towards_large_pathology_fms",
        mean=HALF,
        std=HALF,
        n_features=width,
        tile_px=256,
        tile_mpp=0.5,
        licence="kaiko.ai non-commercial",
        source="https://github.com/kaiko-ai/towards_large_pathology_fms",
        confirmed="authors' README and loader (architecture, normalisation, dimension); TRIDENT (tile, mpp, licence, "
        "hub id)",
        notes=f"The authors' own file vit{size}{patch_px}.pth, on their releases page, fits as well.",
    )


KAIKO = (
    _kaiko("s", 16, 384, "vit_small_patch16_224", img_size=224),
    _kaiko("s", 8, 384, "vit_small_patch8_224", img_size=224),
    _kaiko("b", 16, 768, "vit_base_patch16_224", img_size=224),
    _kaiko("b", 8, 768, "vit_base_patch8_224", img_size=224),
    # Its position embedding is DINOv2's, for 518 px; the authors' own pipeline interpolates it to 224 px.
    _kaiko("l", 14, 1024, "vit_large_patch14_reg4_dinov2", img_size=518, dynamic_img_size=True),
)


def _lunit(patch_px: int) -> EncoderFacts:
    return EncoderFacts(
        name=f"lunit_vits{patch_px}",
        organisation="Lunit",
        architecture=f"ViT-S/{patch_px}",
        timm_name=f"vit_small_patch{patch_px}_224",
        timm_kwargs={"img_size": 224},
        hub_id=f"1aurent/vit_small_patch{patch_px}_224.lunit_dino",
        mean=_LUNIT_MEAN,
        std=_LUNIT_STD,
        n_features=384,
        tile_px=224,
        tile_mpp=0.5,
        licence="Lunit non-commercial",
        source="https://github.com/lunit-io/benchmark-ssl-pathology",
        confirmed="authors' README (architecture, licence); eva (normalisation); model page (file); TRIDENT (tile)",
        unconfirmed=("interpolation",),
        notes=f"The authors' own file on their releases page, dino_vit_small_patch{patch_px}_ep200.torch, fits too.",
    )


LUNIT = (_lunit(16), _lunit(8))
RETCCL = EncoderFacts(
    name="retccl",
    organisation="Sichuan University, Tencent",
    architecture="ResNet-50",
    timm_name="resnet50",
    weights_url="https://github.com/Xiyue-Wang/RetCCL",
    input_px=256,
    is_fixed_size=False,
    feature="pooled",
    n_features=2048,
    tile_px=256,
    tile_mpp=1.0,
    licence="GPL-3.0, non-commercial academic use",
    source="https://github.com/Xiyue-Wang/RetCCL",
    confirmed="authors' README (mpp, licence) and get_feature.py, ResNet.py (architecture, normalisation, size)",
    notes="Its weights are on a drive that the page links to: best_ckpt.pth.",
)

PATHOLOGY = (
    *(UNI, UNI2_H, VIRCHOW, VIRCHOW2, GIGAPATH, H_OPTIMUS_0, H_OPTIMUS_1, H0_MINI, PHIKON, PHIKON_V2, GPFM),
    *(*KAIKO, *LUNIT, RETCCL),
)
