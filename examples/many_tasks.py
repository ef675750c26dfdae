"""Thousands of tasks on one model, any of them in one batch, from one file.

    python examples/many_tasks.py --tasks 100000

Takes a MiniLM, makes one spectral adapter of k = 64 for all its linear layers, stacks as many tasks as you ask for in a
bank (their coefficients and heads are random here: what matters is that all are different), saves the bank, opens the
file again and serves batches in which every row belongs to another task. 100,000 tasks take 1.3 GB.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, logging

import spectralbasis as sb
from spectralbasis.checkpoints.opening import installed_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, help="how many tasks the bank holds")
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--batches", type=int, default=2, help="batches to serve")
    parser.add_argument("--file", type=Path, help="where to keep the bank; by default it is removed at the end")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "bank.safetensors"
        bank = build(Path(folder) / "adapter", arguments.tasks)
        bank.save(file)
        print(f"{len(bank):,} tasks of {bank.layout.width:,} numbers: a file of {file.stat().st_size / 1e6:,.1f} MB")
        serve(file, arguments.rows, arguments.length, arguments.batches)


def load_model() -> PreTrainedModel:
    """MiniLM with a head of two labels, which every task will replace by its own."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(installed_folder("minilm"), num_labels=2).eval()


def build(adapter: Path, count: int) -> sb.CoefficientBank:
    """A bank of as many tasks, each with coefficients and a head of its own."""
    config = sb.SpectralConfig(task_type="SEQ_CLS", target_modules="all-linear", coefficients="diagonal", leading=64,
                               init_weights=False)  # fmt: skip
    get_peft_model(load_model(), config).save_pretrained(adapter)
    bank = sb.CoefficientBank.from_adapters(load_model(), {"task 0": adapter})
    trained = load_file(adapter / "adapter_model.safetensors")
    for number in range(1, count):
        bank.add(f"task {number}", {name: 0.1 * torch.randn_like(tensor) for name, tensor in trained.items()})
    return bank


def serve(file: Path, rows: int, length: int, batches: int) -> None:
    """Batches of random text, a random task for each row; then a task leaves and another takes its room."""
    started = time.perf_counter()
    bank = sb.CoefficientBank.open(file, load_model())
    print(f"opened in {time.perf_counter() - started:.1f} s")
    for _ in range(batches):
        tasks = [bank.tasks[number] for number in torch.randint(len(bank), (rows,))]
        input_ids = torch.randint(1000, 30000, (rows, length))
        started = time.perf_counter()
        logits = bank(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), tasks=tasks).logits
        seconds = time.perf_counter() - started
        print(
            f"{rows} rows of {len(set(tasks))} tasks: {rows / seconds:,.0f} rows a second, logits {tuple(logits.shape)}"
        )
    bank.remove(tasks[0])
    print(f"without {tasks[0]}: {len(bank):,} tasks, and none of the others moved")


if __name__ == "__main__":
    main()
