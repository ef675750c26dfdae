"""How a model represents examples, layer by layer: similarity of two representations, and what a probe reads off.

What lies in a basis: of a task's gradient, of single examples' gradients, and of other matrices of their shapes.
"""

import math
from collections.abc import Iterator, Mapping
from math import nan

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from spectralbasis.training.collators import Collator
from spectralbasis.training.tasks import pearson

Floats = NDArray[np.float64]
Labelled = tuple[ArrayLike, ArrayLike]
"""Representations and labels of the same examples."""

VARIANCE = 0.99
"""Share of the variance whose directions SVCCA keeps (Raghu et al., 2017)."""
BATCH = 64


def linear_cka(X: ArrayLike, Y: ArrayLike) -> float:
    """Linear centred kernel alignment of two representations of the same examples (Kornblith et al., 1905.00414).

    `‖Yᵀ X‖_F² / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)` of centred columns: in [0, 1], blind to rotations, shifts and one common scale,
    not to scales of single directions. Unrelated representations of n examples get about √(p q) / n, not 0.

    Args:
        X: (n, p).
        Y: (n, q).

    Returns:
        NaN where one of them does not vary.
    """
    X, Y = _centred(X), _centred(Y)
    size = np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)
    return float(np.linalg.norm(Y.T @ X) ** 2 / size) if size > 0 else math.nan


def svcca(X: ArrayLike, Y: ArrayLike, variance: float = VARIANCE) -> float:
    """Mean canonical correlation of the directions that hold most of the variance (Raghu et al., 1706.05806).

    In [0, 1] and, as all variance is kept, blind to every invertible linear map. Chance is high where the directions
    are many beside the examples: n should be several times as many.

    Args:
        X: (n, p).
        Y: (n, q).
        variance: share of the variance that is kept of each.

    Returns:
        The mean over as many correlations as the smaller of the two has directions; NaN where one does not vary.
    """
    U, V = (_leading_scores(_centred(one), variance) for one in (X, Y))
    most = min(U.shape[1], V.shape[1])
    if most == 0:
        return math.nan
    return float(np.linalg.svd(U.T @ V, compute_uv=False)[:most].clip(0, 1).mean())


def _centred(X: ArrayLike) -> Floats:
    X = np.asarray(X, dtype=np.float64)
    return X - X.mean(0)


def _leading_scores(X: Floats, variance: float) -> Floats:
    """Left singular vectors of the fewest directions with so much of the variance, (n, directions)."""
    U, S, _ = np.linalg.svd(X, full_matrices=False)
    if S[0] <= 0:
        return U[:, :0]
    held = np.cumsum(S**2) / np.sum(S**2)
    kept = min(int(np.searchsorted(held, variance - 1e-12)) + 1, np.count_nonzero(S / S[0] > 1e-10))
    return U[:, :kept]


def linear_probe(train: Labelled, held_out: Labelled, *, regression: bool) -> float:
    """What a linear model, trained on representations, gets on held-out ones: accuracy, or Pearson's correlation.

    Args:
        train: representations (n, p) and labels (n,).
        held_out: the same to score on.
        regression: labels are numbers, not classes.
    """
    X, y = (np.asarray(one) for one in train)
    unseen, truth = (np.asarray(one) for one in held_out)
    probe = RidgeCV(np.logspace(-1, 4, 11)) if regression else LogisticRegression(C=0.1, max_iter=500)
    predicted = make_pipeline(StandardScaler(), probe).fit(X, y).predict(unseen)
    return pearson(predicted, truth) if regression else float(np.mean(predicted == truth))


@torch.inference_mode()
def layer_activations(model: nn.Module, examples: list[dict[str, object]], collator: Collator) -> list[Floats]:
    """Hidden states of each example, averaged over its tokens or patches: of the embeddings, then of every layer.

    Padding does not count.

    Args:
        model: of transformers, which gives `hidden_states`.
        examples: rows of a task.
        collator: makes the model's inputs of them.

    Returns:
        For each layer (n, width).
    """
    model.eval()
    batches = [_pooled(model, collator(examples[start : start + BATCH])) for start in range(0, len(examples), BATCH)]
    return [np.concatenate(layer) for layer in zip(*batches, strict=True)]


def _pooled(model: nn.Module, batch: dict[str, Tensor]) -> list[Floats]:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    states = model(**inputs, output_hidden_states=True).hidden_states
    return [_mean_over_tokens(state.float(), mask).double().cpu().numpy() for state in states]


def _mean_over_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != state.shape[:2]:
        return state.flatten(1, -2).mean(1)
    weight = mask[..., None].to(state)
    return (state * weight).sum(1) / weight.sum(1)


Matrices = Mapping[str, Tensor]
Directions = Mapping[str, tuple[Tensor, Tensor]]
"""Matrix name → U (m, k) and V (n, k), columns orthonormal; k may differ."""
FORMS = ("core", "diagonal")
"""Which of the coefficients `C = Uᵀ M V` count: all, or those of paired directions."""


def shares(matrices: Matrices, directions: Directions, k: int) -> dict[str, float]:
    """The share of `Σ ‖M‖_F²` over all matrices M (m, n) that the coefficients of the first k directions hold, by form.

    NaN where the matrices are all zero.
    """
    total = _energy(matrices)
    inside = dict.fromkeys(FORMS, 0.0)
    for name, M in matrices.items():
        for form, C in _by_form(_coefficients(M, *directions[name]), k):
            inside[form] += float(C.double().square().sum())
    return {form: energy / total if total else nan for form, energy in inside.items()}


class GradientNoise:
    """Moments, over single examples, of the loss gradient with respect to the coefficients in one basis.

    Examples go to two halves by turns: the product of the halves' means estimates the square of the mean gradient
    without bias, where the square of a mean over N examples has N-th parts of the noise in it.

    Args:
        directions: of every matrix that gets a gradient.
    """

    def __init__(self, directions: Directions) -> None:
        def zeros() -> dict[str, Tensor]:
            return {
                name: U.new_zeros(U.shape[1], V.shape[1], dtype=torch.float64) for name, (U, V) in directions.items()
            }

        self._directions = directions
        self._sums = zeros(), zeros()
        self._squares = zeros()
        self._energy = 0.0
        self._examples = 0

    def add(self, gradients: Matrices) -> None:
        """One example's gradients, (m, n) each."""
        half = self._sums[self._examples % 2]
        self._examples += 1
        self._energy += _energy(gradients)
        for name, gradient in gradients.items():
            C = _coefficients(gradient, *self._directions[name]).double()
            half[name] += C
            self._squares[name] += C.square()

    def shares(self, k: int) -> dict[str, float]:
        """The share of `Σ ‖∂L_i/∂W‖_F²` over examples i and matrices that the first k directions hold, by form."""
        inside = dict.fromkeys(FORMS, 0.0)
        for squares in self._squares.values():
            for form, part in _by_form(squares, k):
                inside[form] += float(part.sum())
        return {form: energy / self._energy if self._energy else nan for form, energy in inside.items()}

    def signal(self, k: int) -> dict[str, float]:
        """Mean over the coefficients of `E[g]² / E[g²]`, g an example's gradient with respect to one, by form.

        It is what a coefficient's gradient tells over its noise, whatever the size of either: 1 where all examples
        agree, 0 where they cancel. An optimizer that divides by the root of `E[g²]`, as Adam does, sees only this.
        Coefficients that no example moves are left out. NaN with fewer than two examples.
        """
        first, second = self._sums
        halves = (self._examples + 1) // 2, self._examples // 2
        found: dict[str, list[Tensor]] = {form: [] for form in FORMS}
        for name, squares in self._squares.items():
            ratios = (first[name] / halves[0]) * (second[name] / halves[1]) / (squares / self._examples)
            for form, part in _by_form(ratios, k):
                found[form].append(part[part.isfinite()])
        return {form: float(torch.cat(parts).mean()) for form, parts in found.items()}


def _coefficients(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return U.T @ M @ V


def _by_form(C: Tensor, k: int) -> Iterator[tuple[str, Tensor]]:
    """The entries of C (k, k) that each form has."""
    core = C[:k, :k]
    yield "core", core.flatten()
    yield "diagonal", core.diagonal()


def _energy(matrices: Matrices) -> float:
    return sum(float(M.double().square().sum()) for M in matrices.values())
