"""The basis of the loss's curvature: leading eigenvectors of the two factors that K-FAC approximates it by."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading, leading_svd, parse_leading, resolve_leading
from spectralbasis.linalg.certificates import triplet_residuals
from spectralbasis.triplets import Triplets, fix_signs, matrix_hash
from spectralbasis.tuner.allocation import DEFAULT_LEADING
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.gradients import Batch, Loss, observe_gradients
from spectralbasis.tuner.originals import Target, find_targets
from spectralbasis.tuner.targets import targeted_modules

KIND = "curvature"


class Covariances:
    """Uncentred second moments of what passes the target layers, summed as it comes: `Σ g gᵀ` and `Σ x xᵀ`.

    Attributes:
        left: matrix name → (m, m), of the gradients with respect to the outputs.
        right: matrix name → (n, n), of the inputs.
    """

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add the tokens of one use of a layer: inputs x (tokens, n) and output gradients g (tokens, m)."""
        for sums, rows in ((self.left, g), (self.right, x)):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.T, rows)


def curvature_basis(
    model: nn.Module,
    batches: Iterable[Batch],
    leading: Leading | None = None,
    *,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    loss: Loss | None = None,
) -> SpectralBasis:
    """The leading eigenvectors of the outputs' gradient covariance and of the inputs' covariance, for each matrix.

    They are the Kronecker factors of K-FAC (Martens & Grosse, arXiv 1503.05671), with the gradients of the given labels
    (the empirical Fisher matrix), over all tokens that a gradient reaches. U holds eigenvectors of `Σ g gᵀ`, V those of
    `Σ x xᵀ`, both in descending order of eigenvalues; the i-th of one goes with the i-th of the other. Such pairs are
    no singular vectors of W: `S_i = u_iᵀ W v_i`, made positive by the sign of v_i and in no order, the residuals say
    how far the pair is from a singular one, and `subspace_error_bound` is 1. One pass; the two matrices are all that
    is kept.

    Args:
        model: the base, without adapters. It is not changed.
        batches: its keyword arguments, labels among them; read once.
        leading: how many directions: a number (min(m, n) where that is smaller), a fraction, "mp" or "gd", by the
            singular values of W; None is 64.
        target_modules: see `SpectralConfig`.
        exclude_modules: see `SpectralConfig`.
        loss: (model, batch) → mean loss over the batch's rows; None takes `model(**batch).loss`.

    Returns:
        A basis of the kind "curvature"; its file is what `SpectralConfig(basis=PATH)` takes.

    Raises:
        InputError: there are no batches, no loss, no finite gradient, or a target is no linear layer.
    """
    leading = DEFAULT_LEADING if leading is None else parse_leading(leading)
    config = SpectralConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = find_targets(targeted_modules(config, model))
    covariances = Covariances()
    observe_gradients(model, batches, targets, covariances.add, loss)
    found, skipped = {}, {}
    for target in targets:
        try:
            found[target.name] = _eigenvectors(target, covariances, leading)
        except ValueError as error:
            skipped[target.name] = str(error)
    if not found:
        name, reason = next(iter(skipped.items()))
        raise InputError(f"the gradients say nothing of any matrix; {name}: {reason}")
    return SpectralBasis(found, kind=KIND, source=_source(model), leading=leading, skipped=skipped)


def _eigenvectors(target: Target, covariances: Covariances, leading: Leading) -> Triplets:
    if target.name not in covariances.left:
        raise ValueError("no gradient of the loss reaches it")
    W = target.W
    k = min(leading, *W.shape) if isinstance(leading, int) else resolve_leading(leading, W)
    U = leading_svd(covariances.left.pop(target.name), k).U
    V = leading_svd(covariances.right.pop(target.name), k).U
    return pair_directions(W, U, V, solver=KIND)


def pair_directions(W: Tensor, U: Tensor, V: Tensor, *, solver: str) -> Triplets:
    """Directions that are no singular vectors of W (m, n), U (m, k) and V (n, k), in the form of a basis.

    `S_i = u_iᵀ W v_i` is made positive by the sign of v_i; the sign of u_i follows the rule of `Triplets`.
    """
    U, Vh = fix_signs(U.double().cpu(), V.double().cpu().T)
    W = W.cpu()
    S = ((W.double() @ Vh.T) * U).sum(0)
    Vh = torch.where(S < 0, -1.0, 1.0)[:, None] * Vh
    return Triplets(
        U=U.float().contiguous(),
        S=S.abs().float(),
        Vh=Vh.float().contiguous(),
        residuals=triplet_residuals(W, U, S.abs(), Vh).float(),
        next_singular_value=torch.inf,
        subspace_error_bound=1.0,
        solver=solver,
        base_hash=matrix_hash(W),
    )


def _source(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
