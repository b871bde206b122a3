"""What every model returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MILOutput:
    """Predictions and attention of a batch of packed bags.

    In evaluation the attention is that of all instances; in training it is the masked one that the losses see.

    Attributes:
        logits: Bag logits, (B, C): the prediction.
        branch_logits: (B, K, C), or None for a model without branches.
        attention: (K, ΣN) probabilities, each bag's row sums to 1; the mean over heads where there are heads. None if
            the model has no attention.
        offsets: (B+1,) int64, where each bag begins and ends.
        head_attention: (K, heads, ΣN) probabilities, or None for a model without heads.
        gram: (B, K, K), the products `P_k · P_j` of the branches' attention over each bag; None: not computed.
    """

    logits: Tensor
    branch_logits: Tensor | None
    attention: Tensor | None
    offsets: Tensor
    head_attention: Tensor | None = None
    gram: Tensor | None = None
