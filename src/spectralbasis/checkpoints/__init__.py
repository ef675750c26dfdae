"""Open model weights from any supported source and read them as logical matrices."""

import spectralbasis.checkpoints.lora  # noqa: F401  # registers the method "LORA"
from spectralbasis.checkpoints.adapters import Adapter, AdapterMethod, register_adapter_method
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matching import match_matrices
from spectralbasis.checkpoints.matrices import Matrix, logical_matrices
from spectralbasis.checkpoints.names import matrix_name
from spectralbasis.checkpoints.opening import Format, open_checkpoint, register_format

__all__ = [
    "Adapter",
    "AdapterMethod",
    "Checkpoint",
    "Format",
    "Matrix",
    "logical_matrices",
    "match_matrices",
    "matrix_name",
    "open_checkpoint",
    "register_adapter_method",
    "register_format",
]
