"""Which solver is the fastest to leading singular triplets of a given accuracy?

Run with `python -m benchmarks.leading_triplets`, in parts with `--sizes 768x768,3072x768 --spectra steep`: a part
replaces its own entries of benchmarks/results/leading_triplets.json and leaves the others. Methods take turns, so that
what disturbs the machine disturbs all of them; the least time of a method counts, and its largest error.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from benchmarks.matrices import Problem, load_problem
from benchmarks.results import earlier, environment, parse_arguments, write
from benchmarks.solvers import ABSENT, OURS, SOLVERS, TOLERANCE, Solver, products
from spectralbasis.linalg import leading_svd

NAME = "leading_triplets"
K = 64
WORK = 2e10
"""About how many multiplications m·n·min(m, n) all repeats of a method may add up to: large matrices repeat less."""


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        sizes="768x768,3072x768,2048x2048,4096x4096",
        spectra="steep,flat",
        repeats=7,
        limit=120.0,
        folder=str(Path(gettempdir()) / "spectralbasis-benchmarks"),
    )
    done: list[dict[str, Any]] = earlier(NAME).get("problems", [])
    shapes = [tuple(int(side) for side in size.split("x")) for size in arguments.sizes.split(",")]
    for m, n in sorted(shapes, key=lambda shape: _volume(*shape)):
        for spectrum in arguments.spectra.split(","):
            problem = load_problem(m, n, K, spectrum, Path(arguments.folder))
            found = measure(problem, spectrum, done, arguments.repeats, arguments.limit)
            done = [one for one in done if (one["shape"], one["spectrum"]) != ([m, n], spectrum)] + [found]
            settings = {"k": K, "tolerance": TOLERANCE, "limit": arguments.limit, "absent": ABSENT}
            write(NAME, {"settings": settings, "problems": sorted(done, key=_order), **environment()})
            print(f"{m}x{n} {spectrum}: done", flush=True)


def measure(problem: Problem, spectrum: str, done: list[dict[str, Any]], repeats: int, limit: float) -> dict[str, Any]:
    """Times and errors of every method, and the times of the products, on one matrix.

    Args:
        problem: the matrix.
        spectrum: its name in `matrices.SPECTRA`.
        done: what was measured on other matrices, from which times are predicted.
        repeats: at most so many; large matrices have fewer.
        limit: seconds that a method may take; one that would take longer is left out.
    """
    m, n = problem.A.shape
    repeats = min(repeats, max(2, int(WORK / _volume(m, n))))
    predicted = {name: predict(name, spectrum, (m, n), done) for name in SOLVERS}
    rows: dict[str, dict[str, Any]] = {
        name: {"method": name} | ({"skipped": f"{seconds:.0f} s predicted"} if seconds > limit else {})
        for name, seconds in predicted.items()
    }
    times: dict[str, list[float]] = {name: [] for name in products(problem)}
    for repeat in range(repeats):
        for name, solve in SOLVERS.items():
            if _goes_on(rows[name], repeat, limit):
                torch.manual_seed(repeat)
                attempt(rows[name], solve, problem)
        for name, product in products(problem).items():
            times[name].append(_timed(product)[0])
    rows[OURS]["solver"] = leading_svd(problem.A, problem.k, tolerance=TOLERANCE).solver
    return {
        "shape": [m, n],
        "spectrum": spectrum,
        "relative_gap": problem.relative_gap,
        "methods": list(rows.values()),
        "products": {name: min(found) for name, found in times.items()},
    }


def attempt(row: dict[str, Any], solve: Solver, problem: Problem) -> None:
    """Run one method once more and keep its least time, its largest errors, or why it gave up."""
    try:
        seconds, (U, Vh) = _timed(lambda: solve(problem))
    except (RuntimeError, ValueError, ArithmeticError) as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return
    left, right = problem.errors(U, Vh)
    row["seconds"] = min(seconds, row.get("seconds", seconds))
    row["left"] = max(left, row.get("left", 0.0))
    row["right"] = max(right, row.get("right", 0.0))


def predict(method: str, spectrum: str, shape: tuple[int, int], done: list[dict[str, Any]]) -> float:
    """Seconds that a method would take, from the next smaller matrix of the same spectrum; 0 where there is none."""
    smaller = [
        (_volume(*one["shape"]), row["seconds"])
        for one in done
        for row in one["methods"]
        if one["spectrum"] == spectrum and row["method"] == method and "seconds" in row
        if _volume(*one["shape"]) < _volume(*shape)
    ]
    if not smaller:
        return 0.0
    volume, seconds = max(smaller)
    return seconds * _volume(*shape) / volume


def _goes_on(row: dict[str, Any], repeat: int, limit: float) -> bool:
    return "skipped" not in row and "failed" not in row and (repeat + 1) * row.get("seconds", 0.0) <= limit


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _volume(m: int, n: int) -> int:
    return m * n * min(m, n)


def _order(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["spectrum"] != "steep", _volume(*found["shape"])


if __name__ == "__main__":
    main()
