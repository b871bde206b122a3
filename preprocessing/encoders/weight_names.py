"""Tensor names of other libraries turned into timm's: the same networks, written down under other names."""

import re
from collections.abc import Mapping

import torch

Weights = dict[str, torch.Tensor]
# The package transformers, vision transformers and DINOv2: its name of a layer's part → timm's, the longer names first.
_TRANSFORMERS_PARTS = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_TRANSFORMERS_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_TRANSFORMERS_MARK = "embeddings.patch_embeddings.projection.weight"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_QUERY = re.compile(r"attention\.attention\.query\.(weight|bias)")
_OTHER_THAN_QUERY = re.compile(r"attention\.attention\.(key|value)\.(weight|bias)")
_DINOV2_MARK = "mask_token"
_CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+\..+)")


def timm_names(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Turn the names of a transformer's weights into timm's, where they are those of transformers or of DINOv2."""
    if _TRANSFORMERS_MARK in weights:
        return _from_transformers(weights)
    if _DINOV2_MARK in weights:
        return _from_dinov2(weights)
    return dict(weights)


def _from_transformers(weights: Mapping[str, torch.Tensor]) -> Weights:
    """ViTModel and Dinov2Model: query, key and value become one matrix; mask token and pooler are for training."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        if name == "embeddings.mask_token" or name.startswith("pooler."):
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            renamed[_TRANSFORMERS_STEM.get(name, name)] = tensor
            continue
        index, part = layer.groups()
        if query := _QUERY.fullmatch(part):
            parts = [weights.get(name.replace(".query.", f".{which}.")) for which in ("query", "key", "value")]
            renamed[f"blocks.{index}.attn.qkv.{query[1]}"] = torch.cat([part for part in parts if part is not None])
        elif not _OTHER_THAN_QUERY.fullmatch(part):
            renamed[f"blocks.{index}.{_part(part)}"] = tensor
    return renamed


def _part(part: str) -> str:
    for theirs, timms in _TRANSFORMERS_PARTS.items():
        if part.startswith(theirs):
            return timms + part.removeprefix(theirs)
    return part


def _from_dinov2(weights: Mapping[str, torch.Tensor]) -> Weights:
    """DINOv2's own: blocks in chunks; with registers, timm adds the class token's position to the token itself."""
    renamed = {_CHUNKED_BLOCK.sub(r"blocks.\1", name): tensor for name, tensor in weights.items()}
    del renamed[_DINOV2_MARK]
    if "register_tokens" in renamed and {"cls_token", "pos_embed"} <= renamed.keys():
        position = renamed["pos_embed"]  # (1, 1 + patches, C)
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:]
    return renamed
