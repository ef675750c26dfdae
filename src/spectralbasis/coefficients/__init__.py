"""What can be done with trained coefficients."""

from spectralbasis.coefficients.similarity import Similarity, similarity

__all__ = ["Similarity", "similarity"]
