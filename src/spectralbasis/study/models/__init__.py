"""Models with a head for a task: found, opened, made, and fed."""

from spectralbasis.study.models.loading import LoadedModel, load_model
from spectralbasis.study.models.sources import resolve_source

__all__ = ["LoadedModel", "load_model", "resolve_source"]
