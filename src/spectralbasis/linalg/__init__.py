"""Spectral numerics: pure functions on tensors."""

from spectralbasis.linalg.certificates import (
    largest_value_outside,
    subspace_error_bound,
    triplet_residuals,
    values_of_singular_vectors,
    vector_error_bounds,
    wedin_bound,
)
from spectralbasis.linalg.row_blocks import gram_cosines, inner_products
from spectralbasis.linalg.subspaces import (
    assigned_cosines,
    cross_cosines,
    haar_overlap,
    haar_overlap_std,
    matched_cosines,
    overlaps_by_k,
    principal_angles,
    subspace_overlap,
)
from spectralbasis.linalg.svd import LeadingSVD, leading_svd, leading_svd_and_values, singular_values, trailing_vectors
from spectralbasis.linalg.thresholds import (
    Leading,
    gavish_donoho_threshold,
    marchenko_pastur_edge,
    parse_leading,
    resolve_leading,
)

__all__ = [
    "Leading",
    "LeadingSVD",
    "assigned_cosines",
    "cross_cosines",
    "gavish_donoho_threshold",
    "gram_cosines",
    "haar_overlap",
    "haar_overlap_std",
    "inner_products",
    "largest_value_outside",
    "leading_svd",
    "leading_svd_and_values",
    "marchenko_pastur_edge",
    "matched_cosines",
    "overlaps_by_k",
    "parse_leading",
    "principal_angles",
    "resolve_leading",
    "singular_values",
    "subspace_error_bound",
    "subspace_overlap",
    "trailing_vectors",
    "triplet_residuals",
    "values_of_singular_vectors",
    "vector_error_bounds",
    "wedin_bound",
]
