"""Compare a base with finetuned checkpoints: metrics, nulls, statistics, verdicts. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralbasis.comparison.comparing import Comparison, compare
    from spectralbasis.comparison.planning import plan_comparison

__all__ = ["Comparison", "compare", "plan_comparison"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "planning" if name == "plan_comparison" else "comparing"
    return getattr(import_module(f"{__name__}.{home}"), name)
