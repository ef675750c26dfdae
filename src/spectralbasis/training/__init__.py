"""Tasks, methods and training: what `tune`, `evaluate` and the quickstart are made of."""

from spectralbasis.training import image_tasks as image_tasks
from spectralbasis.training import text_tasks as text_tasks
from spectralbasis.training.evaluation import evaluate
from spectralbasis.training.method import Method, MethodOptions
from spectralbasis.training.methods import METHODS
from spectralbasis.training.models import LoadedModel, load_model, resolve_source
from spectralbasis.training.outcomes import EvaluateResult, ParameterCounts, TuneResult, write_tuning_table
from spectralbasis.training.tasks import Task, load_task, register_task, task_names
from spectralbasis.training.tuning import tune

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
