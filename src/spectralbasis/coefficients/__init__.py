"""Work with trained coefficients: extract, combine and compare adapters, export them, and serve many tasks."""

from spectralbasis.coefficients.bank import CoefficientBank
from spectralbasis.coefficients.combination import Combination, combine
from spectralbasis.coefficients.extraction import Extraction, extract
from spectralbasis.coefficients.lora_export import LoraExport, export_lora
from spectralbasis.coefficients.merged_export import MergedExport, export_merged
from spectralbasis.coefficients.similarity import Similarity, similarity

__all__ = [
    "CoefficientBank",
    "Combination",
    "Extraction",
    "LoraExport",
    "MergedExport",
    "Similarity",
    "combine",
    "export_lora",
    "export_merged",
    "extract",
    "similarity",
]
