"""Synthetic results of a comparison, in the columns and keys that `compare` writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
HOSTILE = "<script>alert(1)</script>"
ID_COLUMNS = ["tuned", "matrix", "layer", "kind", "m", "n"]
COLUMNS = [*ID_COLUMNS, "k", "metric", "side", "index", "value", "null", "null_mean", "null_std", "z", "p_value"]


def matrices(layers: int, kinds: dict[str, tuple[int, int]] | None = None) -> pd.DataFrame:
    rows = [
        {"matrix": f"encoder.layer.{layer}.{kind}", "layer": layer, "kind": kind, "m": m, "n": n}
        for layer in range(layers)
        for kind, (m, n) in (KINDS if kinds is None else kinds).items()
    ]
    rows.append({"matrix": "pooler.dense", "layer": -1, "kind": "pooler.dense", "m": 384, "n": 384})
    return pd.DataFrame(rows)


def comparison(
    tuned: Sequence[str] = ("rte", "sst2"),
    *,
    layers: int = 6,
    k: int = 64,
    null: bool = True,
    effect: float = 0.03,
    names: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A table as `comparison.parquet` holds it; `effect` is the overlap's excess over the null."""
    rng = np.random.default_rng(seed)
    frame = matrices(layers) if names is None else names
    pairs = pd.concat([frame.assign(tuned=name, order=i) for i, name in enumerate(tuned)], ignore_index=True)
    depth = 1 + pairs["layer"].to_numpy() / max(layers, 1)
    step = 0.01 * depth * (1 + pairs["order"].to_numpy()) ** 0.5 * rng.uniform(0.8, 1.2, len(pairs))
    powers = [2**i for i in range(20) if 2**i < k] + [k]
    parts = [_scalar(pairs, k, "update_norm_relative", step), _scalar(pairs, k, "stable_rank_update", 40 * depth)]
    for size in powers:
        parts += _at(pairs, size, step, effect, rng)
    parts += _singular_values(pairs, k, step)
    table = pd.concat(parts, ignore_index=True)
    if not null:
        table["null"] = None
        table[["null_mean", "null_std", "z", "p_value"]] = np.nan
    return table[COLUMNS]


def _scalar(pairs: pd.DataFrame, k: int, metric: str, value: np.ndarray) -> pd.DataFrame:
    return pairs[ID_COLUMNS].assign(k=k, metric=metric, side="both", index=-1, value=value, null=None)


def _at(
    pairs: pd.DataFrame, size: int, step: np.ndarray, effect: float, rng: np.random.Generator
) -> list[pd.DataFrame]:
    m, n = pairs["m"].to_numpy(), pairs["n"].to_numpy()
    still = np.exp(-step * (2 + 0.6 * np.sqrt(size)))
    moved = np.clip(still + effect * (1 - still) / 0.1, 0, 1)
    shares = {
        ("coverage_core", "both"): size**2 / (m * n),
        ("coverage_diagonal", "both"): size / (m * n),
        ("coverage_left", "left"): size / m,
        ("coverage_right", "right"): size / n,
    }
    parts = [_nulled(pairs, size, "subspace_overlap", side, moved, still, 0.006, rng) for side in ("left", "right")]
    parts += [_nulled(pairs, size, name, side, 2.2 * share, share, 0.05, rng) for (name, side), share in shares.items()]
    for side, width in (("left", m), ("right", n)):
        haar = _scalar(pairs, size, "overlap_haar", size / width)
        parts.append(haar.assign(side=side))
    return parts


def _nulled(
    pairs: pd.DataFrame,
    size: int,
    metric: str,
    side: str,
    value: np.ndarray,
    mean: np.ndarray,
    spread: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    std = spread * mean
    value = np.clip(value * rng.normal(1, spread, len(pairs)), 0, 1)
    z = (value - mean) / std
    part = _scalar(pairs, size, metric, value)
    return part.assign(
        side=side, null="scrambled", null_mean=mean, null_std=std, z=z, p_value=np.where(z > 1, 1 / 6, 1)
    )


def _singular_values(pairs: pd.DataFrame, k: int, step: np.ndarray) -> list[pd.DataFrame]:
    index = np.tile(np.arange(k), len(pairs))
    rows = pairs[ID_COLUMNS].loc[pairs.index.repeat(k)].reset_index(drop=True)
    rows = rows.assign(k=k, side="both", index=index, null=None)
    base = 8 * (1 + index) ** -0.45
    tuned = base * (1 + np.repeat(step, k) * np.cos(index / 9))
    return [
        rows.assign(metric="singular_value_base", value=base),
        rows.assign(metric="singular_value_tuned", value=tuned),
    ]


def finding(value: float, null: float | None, low: float | None, high: float | None, p: float | None, verdict: str):
    effect = None if null is None else value - null
    return {
        "value": value,
        "null_mean": null,
        "effect": effect,
        "ci_low": low,
        "ci_high": high,
        "p_value": p,
        "verdict": verdict,
        "matrices": 37,
        "relative_effect": None,
        "significant": {"above_null": 0, "below_null": 0, "of": 37, "false_discovery_rate": 0.05},
    }


def summary(tuned: Sequence[str] = ("rte", "sst2"), *, null: bool = True, **changes: Any) -> dict[str, Any]:
    stability = finding(0.912, 0.883, 0.021, 0.038, 0.0004, "supported")
    coverage = finding(0.061, 0.0278, 0.024, 0.043, 0.0004, "supported")
    level = finding(0.9801, 0.9797, -0.0011, 0.0019, 0.61, "undecided")
    level["note"] = "Stability at the null's level only shows that the update is small."
    against = finding(0.012, 0.0278, -0.021, -0.011, 0.002, "contradicted")
    if not null:
        stability, coverage = (finding(x["value"], None, None, None, None, "undecided") for x in (stability, coverage))
        level, against = stability, coverage
    per_tuned = {
        name: {"stability": level if i % 3 == 1 else stability, "coverage": against if i % 3 == 2 else coverage}
        for i, name in enumerate(tuned)
    }
    return {
        "base": "/models/minilm",
        "tuned": list(tuned),
        "tuned_sources": {name: f"/models/{name}" for name in tuned},
        "leading": 64,
        "null": "scrambled" if null else None,
        "draws": 5 if null else 0,
        "null_from": {"draws": 6} if null else {},
        "tolerance": 1e-4,
        "seed": 0,
        "matrices": 37,
        "skipped": {"classifier": "only in the finetuned checkpoint", "embeddings.norm": "a vector, not a matrix"},
        "unpaired": [],
        "measured_share": 1.0,
        "notes": [],
        "stability": stability,
        "coverage": coverage,
        "per_tuned": per_tuned,
        "methods": "",
        "versions": {"spectralbasis": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
        "seconds": 83.2,
        "peak_rss_bytes": 612_000_000,
    } | changes


def sharing(labels: Sequence[str], tasks: Sequence[str] = (), *, null: bool = True) -> dict[str, Any]:
    """The entry `sharing`; checkpoints of one task share more."""
    found = finding(0.861, 0.842 if null else None, *((0.008, 0.031, 0.004) if null else (None,) * 3), "supported")
    pairs = []
    for j, b in enumerate(labels):
        for i, a in enumerate(labels[:j]):
            same = tasks[i] == tasks[j] if tasks else None
            effect = 0.05 if same else 0.012 + 0.002 * ((i + 3 * j) % 5 - 2)
            pairs.append(
                {"a": a, "b": b, "value": 0.842 + effect, "null_mean": 0.842 if null else None}
                | {"effect": effect if null else None, "base_overlap_a": 0.93, "base_overlap_b": 0.91}
                | {"update_cosine": 0.3 * bool(same) + 0.004 * i, "update_overlap": 0.2, "update_overlap_haar": 0.0208}
                | {"same_task": same}
            )
    test = {"statistic": 0.0381, "same_task": 0.05, "different_tasks": 0.0119, "p_value": 0.0667}
    return found | {
        "over": "different tasks" if tasks else "all",
        "note": "",
        "tasks": dict(zip(labels, tasks, strict=False)),
        "ceiling": finding(0.892, 0.842, 0.04, 0.06, 0.001, "supported") if tasks else None,
        "permutation": test | {"arrangements": 90, "exact": True} if tasks else None,
        "pairs": pairs,
    }


def trajectory(runs: Sequence[str] = ("rte",), points: int = 5) -> list[dict[str, Any]]:
    """The entry `trajectory`: runs that move away from the base, faster than their null says."""
    return [
        {
            "run": run,
            "points": [
                {
                    "step": 200 * (i + 1),
                    "tuned": f"{run}/checkpoint-{200 * (i + 1)}",
                    "stability": finding(0.99 - size, 0.985 - 1.5 * size, 0.001, 0.01, 0.01, "supported"),
                    "coverage": finding(0.05 + 0.002 * i, 0.0278, 0.01, 0.03, 0.01, "supported"),
                    "update_norm_relative": size,
                }
                for i in range(points)
                for size in [0.02 * (i + 1) ** 0.5 * (1 + 0.3 * place)]
            ],
        }
        for place, run in enumerate(runs)
    ]


def tuning() -> dict[str, Any]:
    shape = {"parameters_head": 770, "seed": 0, "metric": "accuracy", "seconds_per_step": 0.31}
    methods = [
        ("head", "", 0, 0.561, 3_300),
        ("spectral", "diagonal", 2_304, 0.603, 12_900),
        ("spectral", "core", 41_472, 0.628, 169_000),
        ("lora", "", 147_456, 0.634, 594_000),
        ("full", "", 22_565_376, 0.657, 90_700_000),
    ]
    rows = [
        shape
        | {
            "task": task,
            "method": method,
            "coefficients": coefficients,
            "parameters_backbone": parameters,
            "share_backbone": parameters / 22_565_376,
            "share_head": 770 / 22_565_376,
            "score": score + shift,
            "adapter_bytes": size,
        }
        for task, shift in (("RTE", 0.0), ("SST-2", 0.25))
        for method, coefficients, parameters, score, size in methods
    ]
    return {"rows": rows, "note": "Each method had the same steps; none was searched for its learning rate."}


def write_results(
    directory: Path, table: pd.DataFrame, summary: dict[str, Any], tuning: dict[str, Any] | None = None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    table.to_parquet(directory / "comparison.parquet", index=False)
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if tuning is not None:
        (directory / "tuning.json").write_text(json.dumps(tuning), encoding="utf-8")
    return directory
