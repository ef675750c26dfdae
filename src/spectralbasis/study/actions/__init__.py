"""What runs do, one file for each action."""

from importlib import import_module

from spectralbasis.study.runs import Action

# Modules are named, not imported: a worker loads the one that its run asks for.
ACTIONS: dict[str, str] = {}
"""Name of an action → `module:function` below this package."""


def find_action(name: str) -> Action:
    """The function of an action.

    Raises:
        KeyError: there is none of this name.
    """
    module, _, function = ACTIONS[name].partition(":")
    action: Action = getattr(import_module(f"{__name__}.{module}"), function)
    return action
