"""Whole-slide images to a trained, tested and explainable classifier."""

__version__ = "0.1.0"
