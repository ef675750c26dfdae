"""Tasks, methods and training: what `tune`, `evaluate` and the quickstart are made of."""

from spectralbasis.study.methods import METHODS, Method, MethodOptions
from spectralbasis.study.models import LoadedModel, load_model, resolve_source
from spectralbasis.study.tasks import Task, load_task, register_task, task_names
from spectralbasis.study.training.evaluation import evaluate
from spectralbasis.study.training.results import EvaluateResult, ParameterCounts, TuneResult, write_tuning_table
from spectralbasis.study.training.tuning import tune

__all__ = [
    "METHODS",
    "EvaluateResult",
    "LoadedModel",
    "Method",
    "MethodOptions",
    "ParameterCounts",
    "Task",
    "TuneResult",
    "evaluate",
    "load_model",
    "load_task",
    "register_task",
    "resolve_source",
    "task_names",
    "tune",
    "write_tuning_table",
]
