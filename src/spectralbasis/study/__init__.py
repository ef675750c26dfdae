"""Tasks, methods and training: what `tune`, `evaluate` and the quickstart are made of."""

from spectralbasis.study import image_tasks as image_tasks
from spectralbasis.study import text_tasks as text_tasks
