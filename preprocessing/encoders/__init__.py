"""Encoders: networks that turn tiles into features."""

from acmil.preprocessing.encoders.timm_encoder import Encoder, create_encoder
from acmil.preprocessing.encoders.weights import EncoderError

__all__ = ["Encoder", "EncoderError", "create_encoder"]
