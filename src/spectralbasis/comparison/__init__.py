"""Base against finetuned checkpoints: metrics, nulls, statistics, a verdict."""

from spectralbasis.comparison.comparing import Comparison, compare
from spectralbasis.comparison.planning import plan_comparison

__all__ = ["Comparison", "compare", "plan_comparison"]
