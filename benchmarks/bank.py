"""How many tasks fit into memory, and does a batch of many cost more than a batch of one?

Run with `python -m benchmarks.bank`: a MiniLM-sized model, banks of 1,000 and 100,000 tasks (diagonal, k = 64, and a
head each) in files, batches in which every row has another task, and PEFT's mixed batches of LoRA adapters beside them.
It needs 1.3 GB of disk and of memory, and writes the files to a temporary folder that is removed afterwards.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.processes import measure, memory
from benchmarks.results import environment, parse_arguments, write

ROWS, LENGTH = 256, 32
K, RANK, LABELS = 64, 8, 2
LORA_SECONDS = 45
"""How long LoRA adapters are added before the batch: each takes longer than the one before."""


def main() -> None:
    arguments = parse_arguments(__doc__, tasks=100_000, few=1_000, repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder) / "adapter")
        files = {count: Path(folder) / f"{count}.bank" for count in (1, arguments.few, arguments.tasks)}
        added = {count: write_bank_file(path, adapter, count) for count, path in files.items()}
        counted = [str(files[count]) for count in (arguments.few, arguments.tasks)]
        serving = measure("benchmarks.bank:serving", str(adapter), *counted, str(arguments.repeats))["result"]
        held = [measure("benchmarks.bank:residence", str(files[1]), file)["result"] for file in counted]
    lora = measure("benchmarks.bank:lora", str(arguments.repeats))["result"]
    settings = {"rows": ROWS, "length": LENGTH, "k": K, "rank": RANK, "labels": LABELS, "repeats": arguments.repeats}
    found = {
        "settings": settings | {"matrices": matrices(), "head": sum(T.numel() for T in base().classifier.parameters())},
        "serving": serving,
        "memory": held,
        "lora": lora,
        "seconds_per_task_added": added[arguments.tasks] / arguments.tasks,
    }
    write("bank", found | environment())


def base() -> Any:
    """MiniLM with a head, in evaluation mode."""
    from transformers import AutoModelForSequenceClassification, logging

    from spectralbasis.locations import installed_folder

    logging.set_verbosity_error()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(installed_folder("minilm"), num_labels=LABELS).eval()


def matrices() -> list[list[int]]:
    """Shapes of the matrices that are adapted: all linear layers but the head."""
    found = [module for name, module in base().named_modules() if isinstance(module, torch.nn.Linear) and "." in name]
    return [list(module.weight.shape) for module in found]


def write_adapter(folder: Path) -> Path:
    """An adapter with random coefficients."""
    from peft import get_peft_model

    import spectralbasis as sb

    config = sb.SpectralConfig(task_type="SEQ_CLS", target_modules="all-linear", coefficients="diagonal", leading=K,
                               init_weights=False)  # fmt: skip
    get_peft_model(base(), config).save_pretrained(folder)
    return folder


def write_bank_file(path: Path, adapter: Path, count: int) -> float:
    """A bank of random tasks as a file; gives the seconds that adding them took."""
    import spectralbasis as sb

    bank = sb.CoefficientBank.from_adapters(base(), {"task 0": adapter})
    one = load_file(adapter / "adapter_model.safetensors")
    seconds = 0.0
    for number in range(1, count):
        other = {name: torch.randn_like(tensor) * 0.1 for name, tensor in one.items()}
        started = time.perf_counter()
        bank.add(f"task {number}", other)
        seconds += time.perf_counter() - started
    bank.save(path)
    return seconds


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def serving(adapter: str, few: str, many: str, repeats: str) -> Callable[[], dict[str, Any]]:
    """A tool: seconds of a batch, the least of all repeats, in which candidates take turns."""
    from peft import PeftModel

    import spectralbasis as sb

    single, plain = PeftModel.from_pretrained(base(), adapter).eval(), base()
    banks = [sb.CoefficientBank.open(file, base()) for file in (few, many)]
    draws = torch.Generator().manual_seed(0)

    def any_tasks(bank: sb.CoefficientBank) -> list[str]:
        return [f"task {number}" for number in torch.randperm(len(bank), generator=draws)[:ROWS].tolist()]

    candidates = {
        "base": lambda: plain(**batch()),
        "one task, PEFT": lambda: single(**batch()),
        "one task, bank": lambda: banks[0](**batch(), tasks=["task 0"] * ROWS),
        "few": lambda: banks[0](**batch(), tasks=any_tasks(banks[0])),
        "many": lambda: banks[1](**batch(), tasks=any_tasks(banks[1])),
    }
    return lambda: {"tasks": [len(bank) for bank in banks], "seconds": take_turns(candidates, int(repeats))}


def take_turns(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each candidate, after one pass to warm up."""
    seconds = dict.fromkeys(candidates, float("inf"))
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in candidates.items():
                started = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - started if turn else float("inf"))
    return seconds


def residence(one: str, file: str) -> Callable[[], dict[str, Any]]:
    """A tool: memory that a bank adds, mapped pages of its file included, when every task has been used."""
    import spectralbasis as sb

    model = base()

    def served(path: str) -> sb.CoefficientBank:
        bank = sb.CoefficientBank.open(path, model)
        bank(**batch(), tasks=["task 0"] * ROWS)
        return bank

    def work() -> dict[str, Any]:
        served(one).close()
        gc.collect()
        before = resident()
        started = time.perf_counter()
        bank = served(file)
        opened = time.perf_counter() - started
        for task in bank.tasks:
            bank.labels(task)
        kinds = {f"{kind}_bytes": size - before[kind] for kind, size in resident().items()}
        return {"tasks": len(bank), "numbers_bytes": bank.nbytes, "file_bytes": Path(file).stat().st_size} | {
            **kinds,
            "seconds_until_first_batch": opened,
        }

    return work


def resident() -> dict[str, int]:
    """Bytes in memory: of this process alone, and of files that it maps."""
    return {"anonymous": memory("self", "RssAnon"), "mapped": memory("self", "RssFile")}


def lora(repeats: str) -> Callable[[], dict[str, Any]]:
    """A tool: PEFT's mixed batch of as many LoRA adapters as can be added in `LORA_SECONDS`, 256 at most."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False, inference_mode=True
    )
    model = get_peft_model(base(), config, adapter_name="task 0").eval()

    def work() -> dict[str, Any]:
        before, started, count = resident()["anonymous"], time.perf_counter(), 1
        while count < ROWS and time.perf_counter() - started < LORA_SECONDS:
            model.add_adapter(f"task {count}", config)
            count += 1
        adding, added = time.perf_counter() - started, resident()["anonymous"] - before
        model.eval()
        names = [f"task {row % count}" for row in range(ROWS)]
        candidates = {"one task": lambda: model(**batch()), "mixed": lambda: model(**batch(), adapter_names=names)}
        seconds = take_turns(candidates, int(repeats))
        return {"tasks": count, "adding_seconds": adding, "added_bytes": added, "seconds": seconds}

    return work


if __name__ == "__main__":
    main()
