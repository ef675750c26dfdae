"""Tasks, methods and training: what `tune`, `evaluate` and the quickstart are made of."""

from spectralbasis.study import corpora as corpora
from spectralbasis.study import image_tasks as image_tasks
from spectralbasis.study import jpeg_tasks as jpeg_tasks
from spectralbasis.study import signal_tasks as signal_tasks
from spectralbasis.study import text_tasks as text_tasks
from spectralbasis.study.evaluation import evaluate
from spectralbasis.study.methods import METHODS, Method, MethodOptions
from spectralbasis.study.models import LoadedModel, load_model
from spectralbasis.study.results import EvaluateResult, ParameterCounts, TuneResult, write_tuning_table
from spectralbasis.study.sources import resolve_source
from spectralbasis.study.tasks import Task, load_task, register_task, task_names
from spectralbasis.study.training import tune

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
