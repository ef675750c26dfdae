"""Base against finetuned checkpoints: metrics, nulls, statistics, a verdict."""

from spectralbasis.comparison.engine import compare
from spectralbasis.comparison.result import Comparison

__all__ = ["Comparison", "compare"]
