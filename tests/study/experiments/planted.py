"""Results of runs that were never run, with a known truth."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from spectralbasis.study.runs import Record, Results, Run
from spectralbasis.study.trajectories import COLUMNS


def results(
    runs: Iterable[Run],
    result: Callable[[Run], Mapping[str, Any]],
    measurements: Callable[[Run], pd.DataFrame] = lambda run: pd.DataFrame(),
) -> Results:
    """Records of these runs, with what the functions say of each."""
    return Results({run.key: Record(result(run), measurements(run), 1.0, {}, run.seed) for run in runs})


def trajectory(values: Mapping[str, tuple[float, float]], steps: Iterable[int] = (1, 2)) -> pd.DataFrame:
    """What a trajectory callback measures: metric → (value, mean of the null), the same in four matrices."""
    rows = [
        (step, f"layer.{layer}.{kind}", layer, kind, metric, "both", value, null, 0.0, "scrambled")
        for step in steps
        for layer in (0, 1)
        for kind in ("query", "key")
        for metric, (value, null) in values.items()
    ]
    loss = [(step, "", -1, "", "train_loss", "both", 0.5, float("nan"), float("nan"), "") for step in steps]
    return pd.DataFrame(rows + loss, columns=list(COLUMNS))


def verdicts(findings: Any) -> dict[str, str]:
    """Claim → verdict."""
    return {claim.name: claim.verdict for claim in findings.claims}


def conducted(
    plan: Callable[[Results], Iterable[Run]], result: Callable[[Run], Mapping[str, Any]], rounds: int = 10
) -> Results:
    """Records of all that a plan wants, asked again as results come in, as the runner does."""
    known: dict[str, Record] = {}
    for _ in range(rounds):
        new = [run for run in plan(Results(known)) if run.key not in known]
        if not new:
            break
        known |= {run.key: Record(result(run), pd.DataFrame(), 1.0, {}, run.seed) for run in new}
    return Results(known)
