"""Tasks, methods and training: what `tune`, `evaluate` and the quickstart are made of; needs the extra `tune`.

Public names are loaded when they are first used, since `--help` reads the records of tasks and methods alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralbasis.training.evaluation import evaluate
    from spectralbasis.training.known_tasks import load_task, register_task, task_names
    from spectralbasis.training.methods import METHODS, Method, MethodOptions, register_method
    from spectralbasis.training.models import LoadedModel, load_model, resolve_source
    from spectralbasis.training.outcomes import EvaluateResult, ParameterCounts, TuneResult, write_tuning_table
    from spectralbasis.training.own_tasks import task_from_table
    from spectralbasis.training.predicting import PredictResult, predict, predict_file
    from spectralbasis.training.tasks import Task
    from spectralbasis.training.tuning import tune

__all__ = [
    "METHODS",
    "EvaluateResult",
    "LoadedModel",
    "Method",
    "MethodOptions",
    "ParameterCounts",
    "PredictResult",
    "Task",
    "TuneResult",
    "evaluate",
    "load_model",
    "load_task",
    "predict",
    "predict_file",
    "register_method",
    "register_task",
    "resolve_source",
    "task_from_table",
    "task_names",
    "tune",
    "write_tuning_table",
]

_HOMES = {
    "evaluation": ("evaluate",),
    "known_tasks": ("load_task", "register_task", "task_names"),
    "methods": ("METHODS", "Method", "MethodOptions", "register_method"),
    "models": ("LoadedModel", "load_model", "resolve_source"),
    "outcomes": ("EvaluateResult", "ParameterCounts", "TuneResult", "write_tuning_table"),
    "own_tasks": ("task_from_table",),
    "predicting": ("PredictResult", "predict", "predict_file"),
    "tasks": ("Task",),
    "tuning": ("tune",),
}
"""Module → its public names."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
