"""What can be done with trained coefficients."""

from spectralbasis.coefficients.bank import CoefficientBank
from spectralbasis.coefficients.lora_export import LoraExport, export_lora
from spectralbasis.coefficients.similarity import Similarity, similarity

__all__ = ["CoefficientBank", "LoraExport", "Similarity", "export_lora", "similarity"]
