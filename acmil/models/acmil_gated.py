"""ACMIL with gated attention (ACMIL-GA); with one branch and no masking it is ABMIL."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from acmil.kernels import gated_attention_scores, masked_attention_pool, stochastic_top_k_mask
from acmil.losses import Losses, acmil_losses
from acmil.models import defaults
from acmil.models.layers import (
    StackedLinear,
    check_masking,
    check_options,
    offsets_of_one_bag,
    prepare_features,
    rows_of_bags,
)
from acmil.models.output import MILOutput


class ACMILGated(nn.Module):
    """Attention-challenging MIL: several attention branches, and stochastic top-k instance masking while training.

    ```
    H = relu(X W1ᵀ)                                        (N, L)
    S = w (tanh(H Vᵀ + bV) ⊙ sigmoid(H Uᵀ + bU))ᵀ + b      (K, N), masked in training
    P_k = softmax(S_k)      z_k = P_k H      y_k = Wc_k z_k + bc_k
    z̄ = mean_k z_k          ȳ = Ws z̄ + bs                  the prediction
    ```

    Args:
        in_features: D, size of an instance's features.
        n_classes: C.
        n_branches: K. `n_branches=1, mask_top_k=0` is ABMIL.
        mask_top_k: Size of the pool of highest-scored instances that masking draws from; 0 masks nothing.
        mask_ratio: Share of that pool to mask, in [0, 1].
        hidden_features: L; None takes `default_hidden_features(in_features)`.
        attention_features: A, size of the gate.

    Raises:
        ValueError: If a size is below 1 or the ratio is outside [0, 1].

    Reference:
        Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image
        Classification", ECCV 2024,
        https://arxiv.org/abs/2311.07125; Ilse et al., ICML 2018, https://arxiv.org/abs/1802.04712.
    """

    name = "acmil_ga"

    def __init__(
        self,
        *,
        in_features: int,
        n_classes: int,
        n_branches: int = defaults.N_BRANCHES,
        mask_top_k: int = defaults.MASK_TOP_K,
        mask_ratio: float = defaults.MASK_RATIO,
        hidden_features: int | None = None,
        attention_features: int = defaults.ATTENTION_FEATURES,
    ) -> None:
        super().__init__()
        check_options(in_features=in_features, n_classes=n_classes, n_branches=n_branches)
        check_masking(mask_top_k, mask_ratio)
        if hidden_features is None:
            hidden_features = defaults.default_hidden_features(in_features)
        check_options(hidden_features=hidden_features, attention_features=attention_features)
        self.options: dict[str, Any] = {
            "in_features": in_features,
            "n_classes": n_classes,
            "n_branches": n_branches,
            "mask_top_k": mask_top_k,
            "mask_ratio": mask_ratio,
            "hidden_features": hidden_features,
            "attention_features": attention_features,
        }
        self.mask_top_k = mask_top_k
        self.mask_ratio = mask_ratio
        self.reduction = nn.Linear(in_features, hidden_features, bias=False)
        self.gate_v = nn.Linear(hidden_features, attention_features)
        self.gate_u = nn.Linear(hidden_features, attention_features)
        self.score = nn.Linear(attention_features, n_branches)
        self.branch_head = StackedLinear(n_branches, hidden_features, n_classes)
        self.bag_head = nn.Linear(hidden_features, n_classes)

    def forward(
        self,
        features: Tensor,
        offsets: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: Tensor | None = None,
    ) -> MILOutput:
        """Predict each bag.

        Args:
            features: Instance features, (ΣN, D). bf16: the products over instances are computed in bf16, all else in
                the weights' type; any other type is brought to the weights'. On a CPU rows may follow the last bag's.
            offsets: (B+1,) int64, where each bag begins and ends; None for one bag.
            generator: Source of the masks in training, on the model's device; None draws from torch's global one.
            keep: (K, ΣN) bool mask to use in place of a drawn one, in training and evaluation alike.

        Returns:
            Logits (B, C), branch logits (B, K, C), attention (K, ΣN) and its Gram matrices (B, K, K).

        Raises:
            ValueError: If the features have another size than the model's, or a bag is empty.
        """
        hidden, scores = self._scores(features, offsets)
        if keep is None and self.training and self.mask_top_k > 0:
            keep = stochastic_top_k_mask(
                scores, top_k=self.mask_top_k, ratio=self.mask_ratio, generator=generator, offsets=offsets
            )
        pooled, attention, gram = masked_attention_pool(hidden, scores, offsets, keep)
        pooled = pooled.to(self.bag_head.weight.dtype)
        return MILOutput(
            logits=self.bag_head(pooled.mean(dim=1)),
            branch_logits=self.branch_head(pooled),
            attention=attention,
            offsets=offsets_of_one_bag(features) if offsets is None else offsets,
            gram=gram,
        )

    def hidden(self, features: Tensor) -> Tensor:
        """Instance features after the reduction, H: (N, L)."""
        features = prepare_features(features, self.reduction.weight)
        return F.relu(F.linear(features, self.reduction.weight.to(features.dtype)))

    def loss(self, out: MILOutput, labels: Tensor) -> Losses:
        """Loss terms of an output against labels (B,) int64."""
        return acmil_losses(out, labels)

    def _scores(self, features: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """H (ΣN, L) and scores (K, ΣN)."""
        features = prepare_features(features, self.reduction.weight)
        v, u, score = self.gate_v, self.gate_u, self.score
        return gated_attention_scores(
            features, self.reduction.weight, v.weight, v.bias, u.weight, u.bias, score.weight, score.bias,
            n_rows=rows_of_bags(features, offsets),
        )  # fmt: skip
