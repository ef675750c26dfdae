"""What models are tuned for: examples, labels and scores; importing this package makes its tasks known by name."""

from spectralbasis.study.tasks import corpora as corpora
from spectralbasis.study.tasks import hub_images as hub_images
from spectralbasis.study.tasks import images as images
from spectralbasis.study.tasks import jpegs as jpegs
from spectralbasis.study.tasks import signals as signals
from spectralbasis.study.tasks import text as text
from spectralbasis.study.tasks.task import Task, load_task, register_task, task_names

__all__ = ["Task", "load_task", "register_task", "task_names"]
