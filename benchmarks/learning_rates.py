"""Which unit of the coefficients lets one learning rate serve models, tasks and modes?

Run with `python -m benchmarks.learning_rates --data PATH/TO/GLUE`; it goes on where it was stopped. Every unit
(`scaling`) is tuned with every rate on every cell: a model, a task and a mode. The *regret* of a rate in a cell is how
much better the best of all runs in that cell scored.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import earlier, environment, parse_arguments, write
from spectralbasis.training import tune
from spectralbasis.training.quickstart import save_untrained

NAME = "learning_rates"
RATES = {
    "absolute": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "relative": (3e-3, 1e-2, 3e-2, 1e-1),
    "normalized": (1e-2, 3e-2, 1e-1, 3e-1),
}
TEXTS: dict[str, Any] = {"steps": 100, "batch_size": 32, "max_length": 32, "bf16": True}
DIGITS: dict[str, Any] = {"steps": 100, "batch_size": 64}
CELLS: dict[tuple[str, str], dict[str, Any]] = {
    ("MiniLM", "SST-2"): TEXTS,
    ("small ViT", "digits-parity"): DIGITS,
    ("small ViT", "digits-rotated"): DIGITS,
}
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "MiniLM": {
        "diagonal": {"coefficients": "diagonal", "leading": 64},
        "core": {"coefficients": "core", "budget": 0.002},
    },
    "small ViT": {
        "diagonal": {"coefficients": "diagonal", "leading": 64},
        "core": {"coefficients": "core", "leading": 12},
    },
}


def main() -> None:
    arguments = parse_arguments(__doc__, data="../shared/data/glue", seed=0)
    runs: list[dict[str, Any]] = earlier(NAME).get("runs", [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"MiniLM": "minilm", "small ViT": pretrained(folder)}
        for run in planned(arguments.seed):
            if any(run.items() <= done.items() for done in runs):
                continue
            runs.append(run | {"score": score(run, models, Path(arguments.data), folder / "adapter")})
            write(NAME, {"settings": {"texts": TEXTS, "digits": DIGITS, "modes": MODES}, "runs": runs, **environment()})
            print(*runs[-1].values(), flush=True)


def planned(seed: int) -> list[dict[str, Any]]:
    """All runs, those of a cell together."""
    return [
        {"model": model, "task": task, "mode": mode, "scaling": scaling, "rate": rate, "seed": seed}
        for model, task in CELLS
        for mode in MODES[model]
        for scaling, rates in RATES.items()
        for rate in rates
    ]


def score(run: dict[str, Any], models: dict[str, Any], data: Path, folder: Path) -> float:
    """The score of one run on the task's evaluation split."""
    result = tune(
        models[run["model"]],
        task=run["task"],
        data=data if run["model"] == "MiniLM" else None,
        output=folder,
        scaling=run["scaling"],
        learning_rate=run["rate"],
        seed=run["seed"],
        progress=False,
        overwrite=True,
        **CELLS[run["model"], run["task"]],
        **MODES[run["model"]][run["mode"]],
    )
    return result.score


def pretrained(folder: Path) -> Path:
    """The base model of the quickstart."""
    untrained = save_untrained(folder / "untrained")
    options: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "steps": 500, "batch_size": 64}
    return tune(untrained, task="digits", output=folder / "base", seed=0, progress=False, **options).output


if __name__ == "__main__":
    main()
