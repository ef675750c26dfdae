"""The kinds of files that are changed: small real ones, each with the command that reads it."""

import json
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from benchmarks.faults.bench import Bench
from benchmarks.faults.commands import Ended, run
from benchmarks.hostile.trials import Subject

Command = list[str | Path]
_COMPARE = ("--leading", "4", "--draws", "1")
_SHAPE = (24, 20)


def _command(*parts: str) -> Callable[[Path], Command]:
    """The command with `{}` standing for the folder."""
    return lambda room: [part.replace("{}", str(room)) for part in parts]


# --- what readers made of the files -----------------------------------------------------------------------------


def _table(room: Path, ended: Ended) -> object:
    """The measurements and findings of a comparison in `out`."""
    table = pd.read_parquet(room / "out" / "comparison.parquet")
    summary = json.loads((room / "out" / "summary.json").read_text())
    return table.to_csv(index=False), summary["stability"], summary["coverage"], summary["skipped"], summary["unpaired"]


def _file(name: str) -> Callable[[Path, Ended], object]:
    """The bytes of a file that the command writes; its size where it writes a page, in which times differ."""
    return lambda room, ended: sha256((room / name).read_bytes()).hexdigest()


def _told(room: Path, ended: Ended) -> object:
    return [line for line in ended.stderr.splitlines() if line.startswith("found ")]


# --- checkpoints ------------------------------------------------------------------------------------------------


def _state(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    names = ("layer.0.query", "layer.0.key", "layer.1.query", "layer.1.key")
    state = {f"{name}.weight": torch.randn(_SHAPE, generator=generator) for name in names}
    return state | {f"{name}.bias": torch.zeros(_SHAPE[0]) for name in names}


def _tuned_state() -> dict[str, torch.Tensor]:
    return {name: W + 0.05 * other for (name, W), other in zip(_state(0).items(), _state(1).values(), strict=True)}


def _pair(bench: Bench, room: Path) -> None:
    room.mkdir()
    save_file(_state(0), room / "base.safetensors")
    (room / "tuned").mkdir()
    save_file(_tuned_state(), room / "tuned" / "model.safetensors", metadata={"format": "pt"})


def _shards(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    state = load_file(room / "tuned" / "model.safetensors")
    (room / "tuned" / "model.safetensors").unlink()
    names = sorted(state)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, room / "tuned" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (room / "tuned" / "model.safetensors.index.json").write_text(json.dumps(index))
    (room / "tuned" / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 4}))


def _torch_file(zipped: bool) -> Callable[[Bench, Path], None]:
    def make(bench: Bench, room: Path) -> None:
        _pair(bench, room)
        (room / "tuned" / "model.safetensors").unlink()
        torch.save(_tuned_state(), room / "tuned" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return make


def _llama2c(bench: Bench, room: Path) -> None:
    room.mkdir()
    width, hidden, layers, heads, vocabulary, positions = 16, 24, 2, 2, 12, 8
    sizes = np.array([width, hidden, layers, heads, heads, vocabulary, positions], "int32")
    layer = 2 * width + 4 * width * width + 3 * width * hidden
    count = vocabulary * width + layers * layer + width + positions * (width // heads)
    for number, name in enumerate(("base", "tuned")):
        numbers = np.random.default_rng(number).standard_normal(count).astype("float32")
        (room / f"{name}.bin").write_bytes(sizes.tobytes() + numbers.tobytes())


def _gguf(bench: Bench, room: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.gguf_files import write

    room.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes))
    model.save_pretrained(room / "base")
    write(model, room / "tuned.gguf", "Q8_0")


def _quantized(bench: Bench, room: Path) -> None:
    """4-bit weights as bitsandbytes saves them, and 8-bit floats beside their scales."""
    room.mkdir()
    (room / "tuned").mkdir()
    state = {f"layer.{i}.query.weight": W for i, W in enumerate(_state(0).values()) if W.ndim == 2}
    save_file(state, room / "base.safetensors")
    facts = {"quant_type": "nf4", "blocksize": 16, "dtype": "float32", "shape": list(_SHAPE)}
    packed = torch.randint(0, 256, (_SHAPE[0] * _SHAPE[1] // 2, 1), dtype=torch.uint8)
    four = {
        "layer.0.query.weight": packed,
        "layer.0.query.weight.absmax": torch.ones(_SHAPE[0] * _SHAPE[1] // 16),
        "layer.0.query.weight.quant_map": torch.linspace(-1, 1, 16),
        "layer.0.query.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(facts).encode())).byte(),
    }
    eight = {
        "layer.1.query.weight": state["layer.1.query.weight"].to(torch.float8_e4m3fn),
        "layer.1.query.weight_scale": torch.tensor(0.5),
    }
    rest = {name: state[name] for name in ("layer.2.query.weight", "layer.3.query.weight")}
    save_file(four | eight | rest, room / "tuned" / "model.safetensors")


def _lora(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    shutil.rmtree(room / "tuned")
    (room / "tuned").mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "alpha_pattern": {},
        "rank_pattern": {}, "use_rslora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False,
        "base_model_name_or_path": "base.safetensors", "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    (room / "tuned" / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.layer.{i}.query.lora_{letter}.weight": torch.randn(shape)
        for i in range(2)
        for letter, shape in (("A", (2, _SHAPE[1])), ("B", (_SHAPE[0], 2)))
    }
    save_file(factors, room / "tuned" / "adapter_model.safetensors")


# --- adapters, bases and banks ----------------------------------------------------------------------------------


def _adapter(bench: Bench, room: Path) -> None:
    """A spectral adapter with a basis file of its own."""
    room.mkdir()
    bench.tune(room / "adapter", "--basis", "random")
    (room / "adapter" / "README.md").unlink()


def _pair_of_adapters(bench: Bench, room: Path) -> None:
    _adapter(bench, room)
    shutil.copytree(room / "adapter", room / "other")


def _basis(bench: Bench, room: Path) -> None:
    room.mkdir()
    run(["basis", bench.model, "-o", room / "basis.safetensors", "--leading", "4"])


def _bank(bench: Bench, room: Path) -> None:
    from spectralbasis import CoefficientBank

    room.mkdir()
    model = AutoModelForImageClassification.from_pretrained(bench.model).eval()
    bank = CoefficientBank.from_adapters(model, {"one": bench.tuned, "two": bench.tuned})
    bank.save(room / "bank.safetensors")
    (room / "model").write_text(str(bench.model))


def _open_bank(room: Path) -> Callable[[], None]:
    def work() -> None:
        from spectralbasis import CoefficientBank

        model = AutoModelForImageClassification.from_pretrained((room / "model").read_text()).eval()
        bank = CoefficientBank.open(room / "bank.safetensors", model)
        logits = bank(pixel_values=torch.ones(2, 1, 8, 8), tasks=["one", "two"]).logits
        print(f"found {logits.flatten().tolist()}", file=sys.stderr)

    return work


def _model(bench: Bench, room: Path) -> None:
    room.mkdir()
    shutil.copytree(bench.model, room / "model")


# --- what comparisons and studies leave -------------------------------------------------------------------------


def _compared(bench: Bench, room: Path) -> None:
    _pair(bench, room)
    bench.compare(room / "out", "--draws", "1", pair=(room / "base.safetensors", room / "tuned"))
    rows = [{
        "task": "digits", "method": "spectral", "coefficients": "core", "metric": "accuracy", "score": 0.5, "seed": 0,
        "parameters_backbone": 3, "parameters_head": 3, "share_backbone": 0.1, "share_head": 0.1, "adapter_bytes": 10,
        "seconds_per_step": 0.1,
    }]  # fmt: skip
    (room / "out" / "tuning.json").write_text(json.dumps({"rows": rows, "note": "a note"}))


def _studied(bench: Bench, room: Path) -> None:
    (room / "cache").mkdir(parents=True)
    shutil.copytree(bench.studied, room / "out")
    shutil.copy(bench.studied.parent / "cache" / "key", room / "cache")  # with which its runs are sealed


def _claims(room: Path, ended: Ended) -> object:
    return json.loads((room / "out" / "results.json").read_text())["experiments"]["stability"]["claims"]


# --- data sets --------------------------------------------------------------------------------------------------


def _data(file: str) -> Callable[[Bench, Path], None]:
    def make(bench: Bench, room: Path) -> None:
        import h5py

        room.mkdir()
        pixels, labels = np.arange(4 * 64, dtype="uint8").reshape(4, 8, 8), np.array([0, 1, 2, 3])
        if file == "mnist.npz":
            np.savez(room / file, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
        elif file == "usps.h5":
            with h5py.File(room / file, "w") as opened:
                for part in ("train", "test"):
                    opened[f"{part}/data"] = pixels.reshape(4, 64) / np.float32(255)
                    opened[f"{part}/target"] = labels
        else:
            (room / "RTE").mkdir()
            rows = "".join(f"{i}\ta b\tc d\t{('not_' * (i % 2))}entailment\n" for i in range(8))
            for part in ("train", "dev"):
                (room / "RTE" / f"{part}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{rows}")

    return make


def _load_task(task: str, file: str) -> Callable[[Path], Callable[[], None]]:
    def read(room: Path) -> Callable[[], None]:
        def work() -> None:
            from spectralbasis.training import load_task

            found: Any = load_task(task, room / file if file else room)
            told = f"found {len(found.train)} {found.label_names} {found.train[0]}"
            print(told.encode("ascii", "backslashreplace").decode()[:2000], file=sys.stderr)

        return work

    return read


_TUNED_COMPARE = _command("compare", "{}/base.safetensors", "{}/tuned", "-o", "{}/out", *_COMPARE)
SUBJECTS: tuple[Subject, ...] = (
    Subject("checkpoint, safetensors", _pair, "tuned/*", _TUNED_COMPARE, _table),
    Subject("checkpoint, shards and their index", _shards, "tuned/*", _TUNED_COMPARE, _table, quick=12),
    Subject("checkpoint, torch archive", _torch_file(zipped=True), "tuned/*", _TUNED_COMPARE, _table, quick=12),
    Subject("checkpoint, torch before 1.6", _torch_file(zipped=False), "tuned/*", _TUNED_COMPARE, _table),
    Subject("checkpoint, llama2.c", _llama2c, "tuned.bin",
            _command("compare", "{}/base.bin", "{}/tuned.bin", "-o", "{}/out", *_COMPARE), _table),
    Subject("checkpoint, GGUF", _gguf, "tuned.gguf",
            _command("compare", "{}/base", "{}/tuned.gguf", "-o", "{}/out", *_COMPARE), _table, quick=12),
    Subject("checkpoint, quantized", _quantized, "tuned/*", _TUNED_COMPARE, _table, quick=12),
    Subject("adapter, LoRA", _lora, "tuned/*", _TUNED_COMPARE, _table, quick=12),
    Subject("adapter, spectral", _adapter, "adapter/*",
            _command("export", "{}/adapter", "--to", "merged", "-o", "{}/merged"), _file("merged/model.safetensors")),
    Subject("adapters, combined", _pair_of_adapters, "other/*",
            _command("combine", "{}/adapter", "{}/other", "--heads", "first", "-o", "{}/sum"),
            _file("sum/adapter_model.safetensors")),
    Subject("adapter and its task, scored", _adapter, "adapter/*",
            lambda room: ["evaluate", room.parents[1] / "model", room / "adapter", "--task", "digits"],
            lambda room, ended: None),
    Subject("model, tuned", _model, "model/*",
            _command("tune", "{}/model", "--task", "digits", "-o", "{}/out", "--steps", "1", "--leading", "2",
                     "--train-examples", "32"), _file("out/adapter_model.safetensors")),
    Subject("basis file", _basis, "*.safetensors",
            lambda room: ["tune", room.parents[1] / "model", "--task", "digits", "-o", room / "out", "--steps", "1",
                          "--train-examples", "32", "--leading", "4", "--basis", room / "basis.safetensors"],
            _file("out/adapter_model.safetensors"), checked=True),
    Subject("bank", _bank, "*.safetensors", _open_bank, _told, checked=True),
    Subject("cached triplets", _compared, "cache/**/*.safetensors", _TUNED_COMPARE, _table, checked=True),
    Subject("store of a comparison", _compared, "out/store.sqlite",
            _command("compare", "{}/base.safetensors", "{}/tuned", "-o", "{}/out", *_COMPARE, "--resume"), _table,
            checked=True, quick=12),
    Subject("results of a comparison", _compared, "out/[cst]*", _command("report", "{}/out"),
            _file("out/index.html"), quick=12),
    Subject("results of a study", _studied, "out/[fr]*.json", _command("report", "{}/out"), _file("out/index.html")),
    Subject("runs of a study", _studied, "out/*.[sp][qa][lr]*",
            _command("study", "stability", "--preset", "quick", "-o", "{}/out", "--analyse"), _claims),
    Subject("data set, npz", _data("mnist.npz"), "*", _load_task("mnist", "mnist.npz"), _told),
    Subject("data set, HDF5", _data("usps.h5"), "*", _load_task("usps", "usps.h5"), _told),
    Subject("data set, TSV", _data("RTE"), "RTE/*", _load_task("RTE", ""), _told),
)  # fmt: skip
