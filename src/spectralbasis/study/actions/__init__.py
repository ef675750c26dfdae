"""What runs do, one file for each action."""

from importlib import import_module

from spectralbasis.study.runs import Action

# Actions are named, not imported: a worker loads the one that its run asks for.
ACTIONS = {
    "basis": "spectralbasis.study.actions.bases:basis",
    "compare": "spectralbasis.study.actions.comparing:compare",
    "diagnose": "spectralbasis.study.actions.diagnosing:diagnose",
    "gradient_coverage": "spectralbasis.study.actions.coverage:gradient_coverage",
    "initialise": "spectralbasis.study.actions.initialisation:initialise",
    "power_laws": "spectralbasis.study.actions.diagnosing:power_laws",
    "retention": "spectralbasis.study.actions.retaining:retention",
    "similarity": "spectralbasis.study.actions.similarity:similarity",
    "tune": "spectralbasis.study.actions.tuning:tune",
}
"""Name of an action → `module:function`."""


def find_action(name: str) -> Action:
    """The function of an action, named by a key of `ACTIONS` or itself as `package.module:function`."""
    module, _, function = ACTIONS.get(name, name).partition(":")
    action: Action = getattr(import_module(module), function)
    return action
