"""What can be asked about a pair of checkpoints, and of whom: each a tool in the sense of `benchmarks.processes`.

Imports are inside the functions, because a tool's start-up is its own.
"""

from collections.abc import Callable
from typing import Any

K = 64


def ours(base: str, tuned: str, draws: str) -> Callable[[], Any]:
    """`compare` as it stands; the number of matrices is returned. `draws` is a number, or "default"."""
    import torch

    import spectralbasis

    one = {"layer.0.dense.weight": torch.eye(4)}
    spectralbasis.compare(one, [{name: W + 1 for name, W in one.items()}], leading=1)  # imports what it needs only then
    null, number = (None if draws == "0" else "scrambled"), (None if draws in ("0", "default") else int(draws))

    def work() -> int:
        found = spectralbasis.compare(base, [tuned], leading=K, null=null, draws=number)
        return int(found.table["matrix"].nunique())

    return work


def script(base: str, tuned: str, draws: str) -> Callable[[], Any]:
    """What one writes in an afternoon: full decompositions of both, and their overlaps; of each draw another one."""
    import torch
    from safetensors import safe_open

    def overlaps(W0: Any, W1: Any, shuffles: int) -> list[float]:
        U0, _, Vh0 = torch.linalg.svd(W0, full_matrices=False)
        found = []
        for shuffle in range(shuffles + 1):
            update = W1 - W0
            if shuffle:
                update = update[torch.randperm(W0.shape[0])][:, torch.randperm(W0.shape[1])]
            U1, _, Vh1 = torch.linalg.svd(W0 + update, full_matrices=False)
            found.append(float((U0[:, :K].T @ U1[:, :K]).square().sum() / K))
            found.append(float((Vh0[:K] @ Vh1[:K].T).square().sum() / K))
        return found

    def work() -> int:
        with (
            safe_open(f"{base}/model.safetensors", "pt") as before,
            safe_open(f"{tuned}/model.safetensors", "pt") as after,
        ):
            names = [name for name in before.keys() if _measured(name, before.get_slice(name).get_shape())]  # noqa: SIM118
            return len([overlaps(before.get_tensor(name), after.get_tensor(name), int(draws)) for name in names])

    return work


def modeldelta(base: str, tuned: str, scope: str) -> Callable[[], Any]:
    """modeldelta's own pass over the tensors: all of them, or ("matrices") only those that ours measures."""
    from modeldelta.core.weight_diff import compare_models
    from modeldelta.utils.model_loader import get_tensor_map, load_tensor

    def work() -> int:
        before, after = get_tensor_map(base), get_tensor_map(tuned)
        if scope == "matrices":
            before = {name: file for name, file in before.items() if _measured(name, load_tensor(before, name).shape)}
        return len(compare_models(before, after)[0])

    return work


def weightwatcher_distances(base: str, tuned: str) -> Callable[[], Any]:
    """weightwatcher's Frobenius distances between layers."""
    from transformers import AutoModel
    from weightwatcher import WeightWatcher

    def work() -> int:
        models = [AutoModel.from_pretrained(folder) for folder in (base, tuned)]
        return len(WeightWatcher().distances(*models)[2])

    return work


def weightwatcher_analyze(base: str, tuned: str) -> Callable[[], Any]:
    """weightwatcher's spectra and power laws of both models."""
    from transformers import AutoModel
    from weightwatcher import WeightWatcher

    def work() -> int:
        models = [AutoModel.from_pretrained(folder) for folder in (base, tuned)]
        return sum(len(WeightWatcher(model=model).analyze()) for model in models)

    return work


def _measured(name: str, shape: Any) -> bool:
    """Whether `compare` measures this tensor of a BERT: every matrix but the embeddings."""
    return len(shape) == 2 and "embeddings" not in name
