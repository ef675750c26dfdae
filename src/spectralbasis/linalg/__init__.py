"""Spectral numerics: pure functions on tensors."""

from spectralbasis.linalg.approximation import LowRank, low_rank
from spectralbasis.linalg.certificates import (
    energy_error_bound,
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
from spectralbasis.linalg.svd import (
    LeadingSVD,
    leading_svd,
    leading_svd_and_values,
    singular_values,
    trailing_vectors,
)
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
    "LowRank",
    "assigned_cosines",
    "cross_cosines",
    "energy_error_bound",
    "gavish_donoho_threshold",
    "gram_cosines",
    "haar_overlap",
    "haar_overlap_std",
    "inner_products",
    "largest_value_outside",
    "leading_svd",
    "leading_svd_and_values",
    "low_rank",
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
