"""Base against finetuned checkpoints: metrics, nulls, statistics, a verdict."""

from spectralbasis.comparison.engine import compare
from spectralbasis.comparison.planning import plan_comparison
from spectralbasis.comparison.result import Comparison

__all__ = ["Comparison", "compare", "plan_comparison"]
