"""How a model represents examples, layer by layer: similarity of two representations, and linear probes."""

import math

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
    device = next(model.parameters()).device
    layers: list[list[Floats]] = []
    for start in range(0, len(examples), BATCH):
        batch = collator(examples[start : start + BATCH])
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        states = model(**inputs, output_hidden_states=True).hidden_states
        means = (_mean_over_tokens(state.float(), inputs.get("attention_mask")) for state in states)
        layers.append([mean.double().cpu().numpy() for mean in means])
    return [np.concatenate(layer) for layer in zip(*layers, strict=True)]


def _mean_over_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != state.shape[:2]:
        return state.flatten(1, -2).mean(1)
    weight = mask[..., None].to(state)
    return (state * weight).sum(1) / weight.sum(1)
