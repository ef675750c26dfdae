"""The experiments, one file each: a question, presets, a plan of runs, and an analysis of what they gave.

`EXPERIMENTS` has their records, in the order in which `all` runs them.
"""

from spectralbasis.errors import InputError
from spectralbasis.study.claims import Experiment
from spectralbasis.study.experiments import (
    ablation,
    crossed,
    diagnostics,
    frontier,
    glue,
    ladder,
    language,
    length,
    reuse,
    scale,
    scratch,
    stability,
    task_sharing,
    task_similarity,
)

_MODULES = (
    stability,
    ladder,
    task_sharing,
    scale,
    length,
    scratch,
    ablation,
    crossed,
    glue,
    frontier,
    language,
    task_similarity,
    diagnostics,
    reuse,
)
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}


def register_experiment(experiment: Experiment) -> None:
    """Make an experiment known by its name, to `study`; a known name is replaced."""
    EXPERIMENTS[experiment.name] = experiment


def find_experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        InputError: there is none.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; the known ones are {', '.join(EXPERIMENTS)}, and all")
    return EXPERIMENTS[name]
