"""The experiments, one file each: a question, presets, a plan of runs, and an analysis of what they gave."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from spectralbasis.errors import InputError
from spectralbasis.study.claims import Findings
from spectralbasis.study.runs import Results, Run

EXPERIMENTS = ("stability", "sharing", "scale", "scratch", "ablation", "glue", "similarity", "diagnostics", "reuse")
"""Modules of this package, in the order in which `all` runs them."""
_MODULES = {"sharing": "task_sharing", "similarity": "task_similarity"}
"""Experiment → its module, where another module has that name."""


class Experiment(Protocol):
    """What the module of an experiment offers; `Settings` are its own dataclass."""

    QUESTION: str
    PRESETS: Mapping[str, Any]

    @staticmethod
    def plan(settings: Any, results: Results) -> list[Run]:
        """The runs wanted, in order of preference, as far as what is known tells; needs need not be listed."""

    @staticmethod
    def analyse(settings: Any, results: Results) -> Findings:
        """What the finished runs show."""


def find_experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        InputError: there is none.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; the known ones are {', '.join(EXPERIMENTS)}, and all")
    return cast(Experiment, import_module(f"{__name__}.{_MODULES.get(name, name)}"))
