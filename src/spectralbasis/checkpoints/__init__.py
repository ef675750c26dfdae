"""Opening weights wherever they are, and reading them as logical matrices."""

from spectralbasis.checkpoints.adapter_folder import register_adapter_method
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matching import match_matrices
from spectralbasis.checkpoints.matrices import Matrix, logical_matrices
from spectralbasis.checkpoints.names import matrix_name
from spectralbasis.checkpoints.opening import open_checkpoint
from spectralbasis.checkpoints.peft_adapter import Adapter, AdapterMethod

__all__ = [
    "Adapter",
    "AdapterMethod",
    "Checkpoint",
    "Matrix",
    "logical_matrices",
    "match_matrices",
    "matrix_name",
    "open_checkpoint",
    "register_adapter_method",
]
