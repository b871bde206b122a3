"""ACMIL with multi-head cross attention (ACMIL-MHA)."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from acmil.kernels import masked_attention_pool, stochastic_top_k_mask
from acmil.losses import Losses, acmil_losses
from acmil.models import defaults
from acmil.models.layers import (
    StackedLinear,
    check_masking,
    check_options,
    offsets_of_one_bag,
    prepare_features,
    rows_of_bags,
    sampled_dropout,
)
from acmil.models.output import MILOutput

LAYER_NORM_EPS = 1e-6
QUERY_STD = 1e-6


class ACMILMultiHead(nn.Module):
    """Attention-challenging MIL whose branches are learned queries, each with a multi-head cross attention of its own.

    With `h` a head of size `d = L / heads`, and `Wq_k, Wk_k, Wv_k, Wo_k` the projections of branch `k`:

    ```
    H = relu(X W1ᵀ)                                                        (N, L)
    S_kh = (Wq_k q_k + bq_k)_h · (Wk_k H + bk_k)_h / sqrt(d)               (N,), masked in training
    P_kh = softmax(S_kh)
    z_k = LayerNorm(dropout(Wo_k [P_kh (Wv_k H + bv_k)_h]_h + bo_k))       y_k = Wc_k z_k + bc_k
    P̄_h = mean_k P_kh, and z̄ from it likewise with the bag's own Wv, Wo    ȳ = Ws z̄ + bs, the prediction
    ```

    Keys and values are never formed. A head's query is one vector, so it is carried through the key projection to
    the instances, `S_kh = (Wk_khᵀ q_kh) · H + const`; and attention sums to 1, so the value projection is applied to
    the pooled instances, `P (H Wvᵀ + bv) = (P H) Wvᵀ + bv`. This is the same function for K·heads products with H
    where projecting takes 2·K·L of them.

    Args:
        in_features: D, size of an instance's features.
        n_classes: C.
        n_branches: K.
        mask_top_k: Size of the pool of highest-scored instances that masking draws from, for each branch and head;
            0 masks nothing.
        mask_ratio: Share of that pool to mask, in [0, 1].
        hidden_features: L, a multiple of `n_heads`; None takes `default_hidden_features(in_features)`, rounded down to
            one.
        n_heads: Heads of each branch.
        dropout: Probability of dropping an output of the attention while training, in [0, 1).

    Raises:
        ValueError: If a size is below 1, L is no multiple of the heads, or a probability is out of range.

    Reference:
        Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image
        Classification", ECCV 2024,
        https://arxiv.org/abs/2311.07125.
    """

    name = "acmil_mha"

    def __init__(
        self,
        *,
        in_features: int,
        n_classes: int,
        n_branches: int = defaults.N_BRANCHES,
        mask_top_k: int = defaults.MASK_TOP_K,
        mask_ratio: float = defaults.MASK_RATIO,
        hidden_features: int | None = None,
        n_heads: int = defaults.N_HEADS,
        dropout: float = defaults.DROPOUT,
    ) -> None:
        super().__init__()
        check_options(in_features=in_features, n_classes=n_classes, n_branches=n_branches, n_heads=n_heads)
        check_masking(mask_top_k, mask_ratio)
        if hidden_features is None:
            hidden_features = defaults.default_hidden_features(in_features, multiple_of=n_heads)
        check_options(hidden_features=hidden_features)
        if hidden_features % n_heads:
            raise ValueError(
                f"hidden_features must be a multiple of n_heads ({n_heads}), got {hidden_features}. "
                f"Use {max(hidden_features - hidden_features % n_heads, n_heads)}."
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}.")
        self.options: dict[str, Any] = {
            "in_features": in_features,
            "n_classes": n_classes,
            "n_branches": n_branches,
            "mask_top_k": mask_top_k,
            "mask_ratio": mask_ratio,
            "hidden_features": hidden_features,
            "n_heads": n_heads,
            "dropout": dropout,
        }
        self.mask_top_k = mask_top_k
        self.mask_ratio = mask_ratio
        self.n_heads = n_heads
        self.dropout = dropout
        self.reduction = nn.Linear(in_features, hidden_features, bias=False)
        self.query = nn.Parameter(torch.empty(n_branches, hidden_features))
        nn.init.normal_(self.query, std=QUERY_STD)
        self.query_projection = StackedLinear(n_branches, hidden_features, hidden_features)
        self.key_projection = StackedLinear(n_branches, hidden_features, hidden_features)
        self.value_projection = StackedLinear(n_branches, hidden_features, hidden_features)
        self.out_projection = StackedLinear(n_branches, hidden_features, hidden_features)
        self.branch_norm_weight = nn.Parameter(torch.ones(n_branches, hidden_features))
        self.branch_norm_bias = nn.Parameter(torch.zeros(n_branches, hidden_features))
        self.branch_head = StackedLinear(n_branches, hidden_features, n_classes)
        self.bag_value_projection = nn.Linear(hidden_features, hidden_features)
        self.bag_out_projection = nn.Linear(hidden_features, hidden_features)
        self.bag_norm = nn.LayerNorm(hidden_features, eps=LAYER_NORM_EPS)
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
            features: Instance features, (ΣN, D). bf16: H and its pooling are computed in bf16, all else in the
                weights' type; any other type is brought to the weights'. On a CPU rows may follow the last bag's.
            offsets: (B+1,) int64, where each bag begins and ends; None for one bag.
            generator: Source of masks and dropout in training, on the model's device; None draws from the global one.
            keep: (K, heads, ΣN) bool mask to use in place of a drawn one, in training and evaluation alike.

        Returns:
            Logits (B, C), branch logits (B, K, C), attention (K, ΣN) averaged over heads and head attention
            (K, heads, ΣN).

        Raises:
            ValueError: If the features have another size than the model's, or a bag is empty.
        """
        hidden = self.hidden(features)[: rows_of_bags(features, offsets)]  # (ΣN, L)
        scores = self._scores(hidden)  # (K·heads, ΣN)
        if keep is not None:
            keep = keep.flatten(0, 1)
        elif self.training and self.mask_top_k > 0:
            keep = stochastic_top_k_mask(
                scores, top_k=self.mask_top_k, ratio=self.mask_ratio, generator=generator, offsets=offsets
            )
        pooled, attention, _ = masked_attention_pool(hidden, scores, offsets, keep)  # (B, K·heads, L), (K·heads, ΣN)
        pooled = pooled.to(self.bag_head.weight.dtype).unflatten(1, (-1, self.n_heads))  # (B, K, heads, L)
        head_attention = attention.unflatten(0, (-1, self.n_heads))  # (K, heads, ΣN)
        return MILOutput(
            logits=self.bag_head(self._bag_features(pooled, generator)),
            branch_logits=self.branch_head(self._branch_features(pooled, generator)),
            attention=head_attention.mean(dim=1),
            offsets=offsets_of_one_bag(features) if offsets is None else offsets,
            head_attention=head_attention,
        )

    def hidden(self, features: Tensor) -> Tensor:
        """Instance features after the reduction, H: (N, L)."""
        features = prepare_features(features, self.reduction.weight)
        return F.relu(F.linear(features, self.reduction.weight.to(features.dtype)))

    def loss(self, out: MILOutput, labels: Tensor) -> Losses:
        """Loss terms of an output against labels (B,) int64."""
        return acmil_losses(out, labels)

    def _scores(self, hidden: Tensor) -> Tensor:
        """Scaled scores of every branch and head, (K·heads, ΣN), with each query carried through its key projection."""
        query = self._split_heads(self.query_projection(self.query))  # (K, heads, d)
        key_weight = self.key_projection.weight.unflatten(1, (self.n_heads, -1))  # (K, heads, d, L)
        key_bias = self._split_heads(self.key_projection.bias)  # (K, heads, d)
        direction = torch.einsum("khd,khdl->khl", query, key_weight).flatten(0, 1)  # (K·heads, L)
        constant = (query * key_bias).sum(dim=-1).flatten()  # (K·heads,)
        return torch.addmm(constant[:, None], direction, hidden.T.to(direction.dtype)) / math.sqrt(query.shape[-1])

    def _branch_features(self, pooled: Tensor, generator: torch.Generator | None) -> Tensor:
        """Branch features (B, K, L) from the instances pooled by each head (B, K, heads, L)."""
        weight = self.value_projection.weight.unflatten(1, (self.n_heads, -1))  # (K, heads, d, L)
        values = torch.einsum("bkhl,khdl->bkhd", pooled, weight) + self._split_heads(self.value_projection.bias)
        out = sampled_dropout(self.out_projection(values.flatten(2)), p=self._dropout_now(), generator=generator)
        normed = F.layer_norm(out, out.shape[-1:], eps=LAYER_NORM_EPS)
        return normed * self.branch_norm_weight + self.branch_norm_bias

    def _bag_features(self, pooled: Tensor, generator: torch.Generator | None) -> Tensor:
        """Bag features (B, L); pooling by the branches' mean attention is the mean of what they pooled."""
        weight = self.bag_value_projection.weight.unflatten(0, (self.n_heads, -1))  # (heads, d, L)
        values = torch.einsum("bhl,hdl->bhd", pooled.mean(dim=1), weight)
        values = values.flatten(1) + self.bag_value_projection.bias  # (B, L)
        out = sampled_dropout(self.bag_out_projection(values), p=self._dropout_now(), generator=generator)
        return self.bag_norm(out)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(…, L) as (…, heads, d)."""
        return x.unflatten(-1, (self.n_heads, -1))

    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0
