"""Leading singular triplets with certified errors, and singular values and trailing vectors on request."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralbasis.linalg.certificates import (
    ritz_error_bound,
    subspace_error_bound,
    triplet_residuals,
)
from spectralbasis.linalg.row_blocks import (
    Factor,
    MatrixLike,
    gram,
    largest_modulus,
    times,
    times_and_back,
    transposed_times,
)
from spectralbasis.linalg.solvers import (
    eigenvalues,
    eigenvector_products,
    leading_eigenpairs,
    leading_right_space,
)

DENSE_SIDE = 64
"""Up to this smaller side a dense decomposition costs less than the calls around any other."""
REFINEMENTS = 3
"""Steps of subspace iteration in float64 that a Krylov space of float32 gets to reach the tolerance."""
DIVISIBLE = 1e-5
"""Share of the largest singular value down to which `Aᵀ u = Aᵀ A v / σ` is exact enough."""
SQUARED = 1e-4
"""Share of the largest singular value from which the Gram matrix tells the smallest ones apart."""
RESOLVED = 1e-3
"""Share of the largest singular value down to which squares in float64 leave ten digits of a singular value."""
ORTHONORMAL = 1e-3
"""By how much vectors found in float32 may miss being orthonormal; those that a solver returned twice miss it by 1."""
GUARD = 24
"""Vectors that are found beside the leading ones: errors of float32 lie outside of all of them, where a gap is."""
FLOAT32_ERROR = 4.0
"""Error of an eigenvalue in float32, of a Gram matrix and of its reduction, over `sqrt(max(m, n)) eps λ_1`. The largest
of many measured ones were 3."""
GRAM_ERROR = 32.0
"""Error of a Gram matrix in float32 over `eps ‖AᵀA‖_F`, as two random vectors see it: a tenth of that is usual, and
some hundred times of it where products drop digits."""
FLOAT32_NOISE = 8.0
"""Error of a small eigenvalue in float32 over `eps λ_1`: eigenvalues below are noise."""
NOISE_SHARE = 5e-3
"""What values that may be noise may change of the effective rank, each as large as noise can be. Measured changes are
up to a sixth of that."""
SQUARABLE = (1e-6, 1e6)
"""Largest entries of a matrix whose Gram matrix in float32 neither overflows nor loses small numbers."""
VALUES_SIDE = 1024
"""From this smaller side on, values alone and a Krylov space cost less than one reduction for values and vectors."""
KRYLOV_SIDE = 512
"""From this smaller side on, a few hundred products cost less than a Gram matrix and its eigenvectors."""


@dataclass(frozen=True)
class LeadingSVD:
    """The k leading singular triplets of an (m, n) matrix, with the evidence that they are right.

    Attributes:
        U: left singular vectors, (m, k), columns orthonormal.
        S: singular values, (k,), descending.
        Vh: right singular vectors, (k, n), rows orthonormal.
        residuals: `sqrt(‖A v − σ u‖² + ‖Aᵀ u − σ v‖²)` of each triplet, (k,), in the units of `S`, measured in float64
            before the factors are rounded to the dtype they are returned in. After a Rayleigh–Ritz step the first of
            the two is zero but for rounding, and is not measured.
        next_singular_value: σ_{k+1}; 0 where k = min(m, n).
        subspace_error_bound: bound on the largest sine between the computed and the true leading subspaces (left and
            right), in [0, 1]; 1 says that nothing is certain, as where σ_k = σ_{k+1} and no leading subspace exists.
        solver: "krylov", "gram" or "dense": what produced the triplets; "dense (gram missed the tolerance)" after a
            fallback; "krylov (row blocks)" or "gram (row blocks)" of a matrix that was never in memory as a whole.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import leading_svd
        >>> svd = leading_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
        >>> svd.U.shape, svd.Vh.shape, svd.residuals.shape
        (torch.Size([3, 2]), torch.Size([2, 3]), torch.Size([2]))
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    next_singular_value: float
    subspace_error_bound: float
    solver: str


def leading_svd(A: MatrixLike, k: int, *, tolerance: float = 1e-4) -> LeadingSVD:
    """The k leading singular triplets of a dense matrix, certified to a subspace error.

    The cheapest of three solvers runs first. *Krylov*: block Lanczos in float32 finds a space somewhat larger than
    asked for, then Rayleigh–Ritz, residuals and bound are taken in float64. *Gram*: the leading eigenvectors of the
    smaller side's Gram matrix, in float32 with the same step in float64, or else in float64. *Dense*: a full
    decomposition in float64. What one cannot certify, as the Gram matrix where it squares a large condition number,
    goes to the next. A row source is never decomposed in full:
    its Gram triplets are refined by subspace iteration, and returned with the bound that was reached.

    Args:
        A: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: the largest sine accepted between computed and true leading subspaces.

    Returns:
        Factors in float32 (float64 if `A` is), on the device of `A`. Where the spectrum has no gap after σ_k no solver
        can reach the tolerance; then `subspace_error_bound` says what can be said.

    Raises:
        ValueError: `A` is not a finite matrix, or k is out of range.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import leading_svd
        >>> svd = leading_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
        >>> svd.S, svd.next_singular_value, svd.solver
        (tensor([3., 2.]), 1.0, 'dense')
        >>> svd.subspace_error_bound < 1e-4
        True
    """
    m, n = check_k(A, k)
    found = _krylov(_plain(A), k, tolerance) if krylov_pays(m, n, k) else None
    return found or _leading(A, k, tolerance)[0]


def leading_svd_and_values(A: MatrixLike, k: int, *, tolerance: float = 1e-4) -> tuple[LeadingSVD, Tensor]:
    """`leading_svd` and all singular values of one matrix, where it can be from one reduction of its Gram matrix.

    Args:
        A: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: see `leading_svd`.

    Returns:
        The triplets, and all singular values (min(m, n),) in float64, descending. Where the certificate allows they are
        found in float32: then the leading ones have the accuracy of the triplets, and the effective rank of all is
        right to a thousandth (to a hundred-thousandth as a rule). Else they are those of `singular_values`.

    Raises:
        ValueError: `A` is not a finite matrix, or k is out of range.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import leading_svd_and_values
        >>> svd, values = leading_svd_and_values(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=1)
        >>> svd.S, values
        (tensor([3.]), tensor([3., 2., 1.], dtype=torch.float64))
    """
    check_k(A, k)
    svd, values = _leading(A, k, tolerance, all_values=True)
    return svd, with_leading(spectrum(A) if values is None else values, svd.S)


def _leading(A: MatrixLike, k: int, tolerance: float, *, all_values: bool = False) -> tuple[LeadingSVD, Tensor | None]:
    """Triplets by the first solver that certifies them, and all singular values where they come with it.

    Where `all_values` are asked for, a solver that cannot give them accurately does not count. The values are those of
    `spectrum` to the last bit, whichever solver certified the triplets.
    """
    m, n = A.shape
    if not isinstance(A, Tensor):
        return _gram(A, k, tolerance, REFINEMENTS)
    A = plain_numbers(A)
    solver = "dense"
    values = None
    if gram_pays(m, n, k):
        found, values = _gram_float32(A, k, tolerance, all_values)
        if found is not None:
            return found, values
        result, exact = _gram(A, k, tolerance)
        values = exact if values is None else values
        if result.subspace_error_bound <= tolerance:
            return result, values
        solver = "dense (gram missed the tolerance)"
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    residuals = triplet_residuals(A, U[:, :k], S[:k], Vh[:k])
    return _result(A, U, S, Vh, residuals, _bound(A, S, residuals, k), solver), values


def singular_values(A: MatrixLike) -> Tensor:
    """All singular values of an (m, n) matrix, (min(m, n),), descending, float64.

    From the Gram matrix in float64, without vectors: values below 1e-8 σ_1 are noise.

    Raises:
        ValueError: `A` is not a finite matrix.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import singular_values
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    check_matrix(A)
    tall = _plain(A if A.shape[0] >= A.shape[1] else A.T)
    return eigenvalues(gram(tall)).clamp_min(0).sqrt()


def spectrum(A: MatrixLike) -> Tensor:
    """All singular values (min(m, n),) in float64, descending, as accurate as those of `leading_svd_and_values`.

    Raises:
        ValueError: `A` is not a finite matrix.
    """
    check_matrix(A)
    tall = _plain(A if A.shape[0] >= A.shape[1] else A.T)
    squared = _float32_gram(tall) if isinstance(tall, Tensor) else None
    if squared is not None:
        values = _accurate(eigenvalues(squared[0]), squared[1])
        if values is not None:
            return values
    return eigenvalues(gram(tall)).clamp_min(0).sqrt()


def with_leading(values: Tensor, S: Tensor) -> Tensor:
    """All singular values, (min(m, n),) float64, with those of triplets, (k,), where the two differ; descending.

    Values in float32 have the error of a Gram matrix, which triplets do not have. Those that agree with the triplets to
    the last digits of float32 may come from float64, and are left as they are.
    """
    S, first = S.to(values), values[: len(S)]
    same = (first - S).abs() <= torch.finfo(torch.float32).eps * S
    return torch.cat([torch.where(same, first, S), values[len(S) :]]).cummin(0).values


def trailing_vectors(A: Factor, k: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of the k smallest singular values: U (m, k) and V (n, k) in float64, the smallest value first.

    From the Gram matrix of the smaller side in float64 where the smallest singular value is large enough to survive
    being squared, else from a full decomposition. Of a rectangular matrix, what its null space holds is not among them.

    Raises:
        ValueError: `A` is not a finite matrix, k is out of range, or a row source would need the full decomposition.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import trailing_vectors
        >>> U, V = trailing_vectors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=1)
        >>> V[:, 0].abs()
        tensor([0., 0., 1.], dtype=torch.float64)
    """
    m, n = check_k(A, k)
    if m < n:
        return trailing_vectors(A.T, k)[::-1]
    A = _plain(A)
    squares, V = torch.linalg.eigh(gram(A))
    if squares[0] > SQUARED**2 * squares[-1]:
        return times(A, V[:, :k]) / squares[:k].sqrt(), V[:, :k]
    if not isinstance(A, Tensor):
        raise ValueError(
            f"the smallest singular value is below {SQUARED:g} of the largest, so the trailing directions need a full "
            "decomposition, which is not available for a matrix read in row blocks; allow more memory"
        )
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return U.flip(1)[:, :k], Vh.flip(0)[:k].T


def largest_cosines(W: MatrixLike, X: Tensor) -> Tensor:
    """The largest `|cos|` of each column of X with any left singular vector of W, (j,), float64.

    A tensor is decomposed in full. Of a row source, the right vectors come from the Gram matrix, and the left ones from
    them: directions whose singular value is below 1e-8 of the largest are noise there, and are left out.

    Args:
        W: (m, n).
        X: (m, j) float64, columns of norm 1.
    """
    if isinstance(W, Tensor):
        every = torch.linalg.svd(W.double(), full_matrices=False).U
        return (every.T @ X).abs().amax(0)
    if W.shape[0] < W.shape[1]:
        return eigenvector_products(gram(W.T), X)[1].abs().amax(0)
    squares, products = eigenvector_products(gram(W), transposed_times(W, X))
    clear = squares > 1e-16 * squares[0]
    return (products[clear] / squares[clear].sqrt()[:, None]).abs().amax(0)


def krylov_pays(m: int, n: int, k: int) -> bool:
    """Whether block Lanczos is the cheapest way to k triplets; the crossover was measured on a CPU."""
    return min(m, n) >= max(KRYLOV_SIDE, 12 * k)


def gram_pays(m: int, n: int, k: int) -> bool:
    """Whether the Gram matrix is the cheaper way to k triplets; the crossovers were measured on a CPU in float64."""
    short, long = min(m, n), max(m, n)
    return short > DENSE_SIDE and k <= (short // 2 if long >= 2 * short else short // 4)


def check_matrix(A: Factor) -> None:
    """Raise ValueError unless `A` is a non-empty matrix of finite real numbers; a row source is taken to be one."""
    if not isinstance(A, Tensor):
        return
    if A.ndim != 2 or A.numel() == 0 or not A.is_floating_point():
        raise ValueError(f"expected a non-empty real matrix (m, n), got {A.dtype} of shape {tuple(A.shape)}")
    A = plain_numbers(A)
    if not bool(torch.isfinite(A.sum()) or torch.isfinite(A).all()):
        raise ValueError("the matrix holds NaN or infinite values, so it has no singular value decomposition")


def check_k(A: Factor, k: int) -> tuple[int, int]:
    check_matrix(A)
    m, n = A.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k={k} is outside 1..min(m, n)={min(m, n)} of this {m}x{n} matrix; pass k<={min(m, n)}")
    return m, n


def _plain(A: Factor) -> Factor:
    return plain_numbers(A) if isinstance(A, Tensor) else A


def plain_numbers(A: Tensor) -> Tensor:
    """The numbers alone; those of 8 bits as float32, for torch stores them and does not compute with them."""
    return A.detach().float() if A.dtype.itemsize == 1 else A.detach()


def _krylov(A: Factor, k: int, tolerance: float, G: Tensor | None = None) -> LeadingSVD | None:
    """Triplets from a Krylov space, or None where their error cannot be bounded by the tolerance; see its `G`."""
    if A.shape[0] < A.shape[1]:
        found = _krylov(A.T, k, tolerance, G)
        return found and replace(found, U=found.Vh.T, Vh=found.U.T)
    with torch.autocast(A.device.type, enabled=False):
        V = leading_right_space(A, k, tolerance, G=G)
    if V is None:
        return None
    V = V.double()
    for _ in range(REFINEMENTS):
        U, S, V, R = rayleigh_ritz(A, V)
        bound = ritz_error_bound(S, R, k)
        if bound <= tolerance:
            return _result(A, U, S, V.T, torch.linalg.vector_norm(R[:, :k], dim=0), bound, "krylov")
        V = torch.linalg.qr(R + V * S)[0]
    return None


def _gram_float32(A: Tensor, k: int, tolerance: float, all_values: bool) -> tuple[LeadingSVD | None, Tensor | None]:
    """Triplets from eigenvectors in float32 and a Rayleigh–Ritz step in float64, and all singular values.

    No triplets where the residuals do not certify them, or where values are asked for and float32 is not accurate
    enough for these, which are then left out too.
    """
    if A.shape[0] < A.shape[1]:
        found, values = _gram_float32(A.T, k, tolerance, all_values)
        return found and replace(found, U=found.Vh.T, Vh=found.U.T), values
    m, n = A.shape
    squared = _float32_gram(A)
    if squared is None:
        return None, None
    G, scale = squared
    if all_values and n >= VALUES_SIDE and krylov_pays(m, n, k):
        values = _accurate(eigenvalues(G.clone()), scale)
        return None if values is None else _krylov(A, k, tolerance, G), values
    squares, V = leading_eigenpairs(G, min(k + GUARD, n))
    values = _accurate(squares, scale)
    if values is None and all_values:
        return None, None
    U, S, V, R = rayleigh_ritz(A, V.double())
    # Ritz values are at most the true ones. Where all reach them, no direction was found twice and none is missing.
    reached = (S / scale).square() >= squares[: len(S)].double() - _float32_error(A) * float(squares[0])
    bound = ritz_error_bound(S, R, k) if bool(reached.all()) and len(S) > k else 1.0
    if bound > tolerance:
        return None, values
    return _result(A, U, S, V.T, torch.linalg.vector_norm(R[:, :k], dim=0), bound, "gram"), values


def _float32_gram(A: Tensor) -> tuple[Tensor, float] | None:
    """`AᵀA / scale²` in float32 of a tall matrix, and scale.

    None where A has more digits than that or is zero, or where the product is less accurate than float32 is.
    """
    if A.dtype == torch.float64:
        return None
    A = A.float()
    largest = largest_modulus(A)
    if not largest > 0:
        return None
    scale = 1.0 if SQUARABLE[0] < largest < SQUARABLE[1] else largest
    A = A if scale == 1.0 else A / scale
    with torch.autocast(A.device.type, enabled=False):
        G = A.T @ A
    # Settings of torch let products in float32 drop half of the digits; two products in float64 tell.
    X = torch.randn(A.shape[1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(A.device)
    off = torch.linalg.vector_norm(times_and_back(A, X)[1] - G.double() @ X)
    allowed = GRAM_ERROR * torch.finfo(torch.float32).eps * float(torch.linalg.vector_norm(G))
    return (G, scale) if float(off) <= allowed else None


def _float32_error(A: Tensor) -> float:
    """Error of an eigenvalue of the Gram matrix in float32, as a share of the largest."""
    return FLOAT32_ERROR * max(A.shape) ** 0.5 * torch.finfo(torch.float32).eps


def _accurate(squares: Tensor, scale: float) -> Tensor | None:
    """Singular values from eigenvalues in float32, (n,) float64; None where too many of them are noise.

    Noise in place of zeros changes the effective rank most: each value x adds about `x (1 + log(Σσ / x)) / Σσ` to its
    logarithm. Errors of clear values have either sign and are a thousandth of that.
    """
    values = squares.double().clamp_min(0).sqrt()
    noise = (FLOAT32_NOISE * torch.finfo(torch.float32).eps) ** 0.5 * float(values[0])
    share = noise / float(values.sum())
    unclear = int(torch.count_nonzero(values <= noise))
    return values * scale if unclear * share * (1 - math.log(share)) <= NOISE_SHARE else None


def _gram(A: Factor, k: int, tolerance: float, refinements: int = 0) -> tuple[LeadingSVD, Tensor]:
    """Triplets from the leading eigenvectors of the smaller Gram matrix, and all singular values.

    Where they miss the tolerance, up to `refinements` steps of subspace iteration follow, and the best result counts.
    """
    if A.shape[0] < A.shape[1]:
        found, values = _gram(A.T, k, tolerance, refinements)
        return replace(found, U=found.Vh.T, Vh=found.U.T), values
    squares, V = leading_eigenpairs(gram(A), min(k + 1, A.shape[1]))
    best, V = _projected(A, V, k)
    for _ in range(refinements):
        if best.subspace_error_bound <= tolerance:
            break
        found, V = _projected(A, V, k)
        best = min(best, found, key=lambda one: one.subspace_error_bound)
    return best, squares.clamp_min(0).sqrt()


def _projected(A: Factor, V: Tensor, k: int) -> tuple[LeadingSVD, Tensor]:
    """Triplets of a tall A from a space that holds its leading right vectors, and what spans a better one: `Aᵀ U`."""
    U, S, V, R = rayleigh_ritz(A, V)
    residuals = torch.linalg.vector_norm(R[:, :k], dim=0)
    found = _result(A, U, S, V.T, residuals, _bound(A, S, residuals, k), "gram")
    return found, R + V * S


def rayleigh_ritz(A: Factor, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best triplets of a tall A (m, n) whose right vectors lie in the span of V (n, p), with what `Aᵀ` leaves of them.

    Singular values come out to full relative accuracy, which the square roots of eigenvalues do not have.

    Args:
        A: (m, n), m ≥ n ≥ p, any floating dtype.
        V: columns orthonormal to about the dtype that they were found in; float64.

    Returns:
        U (m, p), S (p,), V (n, p) with `A V = U S`, and the residual vectors `Aᵀ U − V S`, all in float64.
    """
    there, back = times_and_back(A, V)
    small = _small_problem(V, there)
    if small is not None:
        S, turn = small
        U, V = there @ (turn / S), V @ turn
        return U, S, V, back @ (turn / S) - V * S
    V = torch.linalg.qr(V)[0]
    there, back = times_and_back(A, V)
    Q, B = torch.linalg.qr(there)
    left, S, right = torch.linalg.svd(B)
    U, V = Q @ left, V @ right.T
    back = back @ (right.T / S) if S[-1] > DIVISIBLE * S[0] else transposed_times(A, U)
    return U, S, V, back - V * S


def _small_problem(V: Tensor, there: Tensor) -> tuple[Tensor, Tensor] | None:
    """Singular values of A on the span of V and what turns V into their vectors, from `VᵀV` and `(A V)ᵀ(A V)`.

    Cheaper than orthonormal bases of both; None where V is far from orthonormal, or squares would hide small values.
    """
    overlap = V.T @ V
    if float((overlap - torch.eye(len(overlap), dtype=V.dtype, device=V.device)).abs().max()) > ORTHONORMAL:
        return None
    factor, failed = torch.linalg.cholesky_ex(overlap)
    if int(failed):
        return None
    half = torch.linalg.solve_triangular(factor, there.T @ there, upper=False)
    squares, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor.T, half, upper=True, left=False))
    if not float(squares[0]) > RESOLVED**2 * float(squares[-1]):
        return None
    return squares.flip(0).sqrt(), torch.linalg.solve_triangular(factor.T, vectors.flip(1), upper=True)


def _bound(A: Factor, S: Tensor, residuals: Tensor, k: int) -> float:
    return subspace_error_bound(S[:k], residuals, _next(S, k), (A.shape[0], A.shape[1]))


def _next(S: Tensor, k: int) -> float:
    return float(S[k]) if S.numel() > k else 0.0


def _result(A: Factor, U: Tensor, S: Tensor, Vh: Tensor, residuals: Tensor, bound: float, solver: str) -> LeadingSVD:
    """The leading triplets, as many as there are residuals, in the dtype that they are returned in."""
    k = residuals.numel()
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    solver = solver if isinstance(A, Tensor) else f"{solver} (row blocks)"
    return LeadingSVD(
        U=U[:, :k].to(dtype),
        S=S[:k].to(dtype),
        Vh=Vh[:k].to(dtype),
        residuals=residuals.to(dtype),
        next_singular_value=_next(S, k),
        subspace_error_bound=bound,
        solver=solver,
    )
