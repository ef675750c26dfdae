"""Ways to adapt a model to a task: what each one trains, which options it has, and at which learning rates."""

from spectralbasis.study.methods.method import Method, Setup
from spectralbasis.study.methods.options import MethodOptions
from spectralbasis.study.methods.registry import METHODS, check_options, find_method
from spectralbasis.study.methods.spectral import BASIS_FILE

__all__ = ["BASIS_FILE", "METHODS", "Method", "MethodOptions", "Setup", "check_options", "find_method"]
