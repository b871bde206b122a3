"""From a vision transformer's tokens to a tile's feature."""

import torch

from acmil.preprocessing.encoders.facts import Feature


def token_feature(tokens: torch.Tensor, feature: Feature, *, n_prefix_tokens: int) -> torch.Tensor:
    """Take the feature out of a transformer's normalised tokens.

    The class token comes first, then register tokens if there are any, then one token a patch. Register tokens are
    the network's scratch space: they are left out.

    Args:
        tokens: (B, T, C).
        feature: "class_token": the first; "class_and_mean_patch": the first, then the mean of the patches' (Virchow's).
        n_prefix_tokens: Class and register tokens together.

    Returns:
        (B, C) or (B, 2C).

    Raises:
        ValueError: If the feature is not one of tokens.

    Reference:
        Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588.
    """
    class_token = tokens[:, 0]  # (B, C)
    if feature == "class_token":
        return class_token
    if feature == "class_and_mean_patch":
        return torch.cat([class_token, tokens[:, n_prefix_tokens:].mean(dim=1)], dim=-1)  # (B, 2C)
    raise ValueError(f"feature must be class_token or class_and_mean_patch, got {feature!r}.")
