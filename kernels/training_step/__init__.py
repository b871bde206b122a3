"""A whole training step of ACMIL with gated attention; the fused one is in `training_step.fused`, and needs Triton."""

from acmil.kernels.training_step.parameters import GatedParameters
from acmil.kernels.training_step.reference import LossTerms, loss_terms

__all__ = ["GatedParameters", "LossTerms", "loss_terms"]
