"""A tiny bank of classifiers with a tokenizer of words, and a server's parts without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import spectralbasis as sb
from spectralbasis.coefficients.bank_file import read_bank
from spectralbasis.coefficients.ray_bank import RayBank
from spectralbasis.coefficients.replicas import BankReplica, Opened, TaskTable
from spectralbasis.training.bank_models import load_served
from tests.coefficients.folders import load_base, save_adapter, save_base

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(46))]


def save_served(folder: Path, tasks: int = 3, **bank: Any) -> Path:
    """A base with a tokenizer in `folder/base`, adapters `t0`, `t1`, … in `folder/adapters` and a bank of them.

    The adapters have 2, 3, 2, … labels.
    """
    base = save_base(folder / "base")
    save_tokenizer(base)
    for number in range(tasks):
        save_adapter(folder / "adapters" / f"t{number}", base, seed=number, labels=2 + number % 2)
    adapters = {f"t{number}": folder / "adapters" / f"t{number}" for number in range(tasks)}
    sb.CoefficientBank.from_adapters(load_base(base), adapters, **bank).save(folder / "bank.safetensors")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that splits at spaces and takes pairs of texts."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def opened(folder: Path, **changes: Any) -> Opened:
    """What a replica of the bank in a folder needs."""
    found = read_bank(folder / "bank.safetensors")

    def load() -> Any:
        return load_served(str(folder / "base"), found.layout.config.task_type, found.layout.heads, None)

    settings = {"load": load, "file": str(folder / "bank.safetensors"), "checksum": found.checksum, "threads": 1}
    return Opened(**(settings | changes))


def remote(work: Any) -> Any:
    """A method as an actor has it."""

    async def call(*arguments: Any) -> Any:
        found = work(*arguments)
        return await found if hasattr(found, "__await__") else found

    return SimpleNamespace(remote=call)


def actor(one: Any, *methods: str) -> Any:
    """An object as its actor would be called."""
    return SimpleNamespace(**{name: remote(getattr(one, name)) for name in methods})


def replica(folder: Path, table: TaskTable) -> BankReplica:
    """A replica in this process, which computes each call by itself: Ray batches calls in its own processes alone."""
    one = BankReplica(opened(folder), actor(table, "since"))
    one._batched = one.answer
    return one


def backend(folder: Path, table: TaskTable, one: Any) -> RayBank:
    """A backend over one replica in this process; `one` may stand for it."""
    handle = actor(one, "predict", "pack", "ping")
    return RayBank(handle, actor(table, "held", "extend"), read_bank(folder / "bank.safetensors").tasks)
