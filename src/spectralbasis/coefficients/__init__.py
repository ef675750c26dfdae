"""What can be done with trained coefficients."""

from spectralbasis.coefficients.lora_export import LoraExport, export_lora
from spectralbasis.coefficients.similarity import Similarity, similarity

__all__ = ["LoraExport", "Similarity", "export_lora", "similarity"]
