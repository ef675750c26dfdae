"""The preset "paper" at its smallest, on models and data of the hub's layouts with random weights.

As a script: `python -m tests.study.hub FOLDER` runs it with the models in FOLDER/models, a cache of the hub as its
library keeps one, and the data sets in FOLDER/data, and prints what failed as JSON.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, DeiTForImageClassificationWithTeacher

from spectralbasis.study.experiments import EXPERIMENTS, find_experiment
from spectralbasis.study.runner import run_all
from spectralbasis.study.runs import Results, Run, RunStore, with_needs
from spectralbasis.training.image_tasks import HUB_IMAGES
from tests.training.examples import WORDS, save_hub_images, write_tsv

COMMIT = "0" * 40
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "max_position_embeddings": 40, "type_vocab_size": 1}
_IMAGES = {**_SIZES, "image_size": 16, "patch_size": 8}
TEXTS = [f"the film {number} is {word}" for number in range(40) for word in WORDS]


def save_models(cache: Path) -> None:
    """Every model that the preset names, as a cache of the hub holds them: old ones as PyTorch files."""
    roberta = {"FacebookAI/roberta-base": True, "FacebookAI/roberta-large": True}
    roberta |= {f"nyu-mll/roberta-base-{size}-{seed}": False for size in ("10M", "100M", "1B") for seed in (1, 2, 3)}
    for name, safe in roberta.items():
        config = AutoConfig.for_model("roberta", **_TEXT, vocab_size=300, pad_token_id=1)
        _save(cache, name, AutoModelForMaskedLM.from_config(config), _byte_pairs, safe)
    for seed in range(5):
        config = AutoConfig.for_model("bert", **{**_TEXT, "type_vocab_size": 2}, vocab_size=100, pad_token_id=0)
        _save(cache, f"google/multiberts-seed_{seed}", AutoModelForMaskedLM.from_config(config), _words, False)
    config = AutoConfig.for_model(
        "deberta-v2", **{**_TEXT, "type_vocab_size": 0}, vocab_size=120, pad_token_id=0, relative_attention=True,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True, position_buckets=4,
        position_biased_input=False,
    )  # fmt: skip
    _save(cache, "microsoft/deberta-v3-base", AutoModel.from_config(config), _sentence_pieces, False)
    vit, deit = (AutoConfig.for_model(kind, **_IMAGES) for kind in ("vit", "deit"))
    _save(cache, "google/vit-base-patch16-224-in21k", AutoModel.from_config(vit), _pixels("size", 16))
    model = DeiTForImageClassificationWithTeacher(deit)
    _save(cache, "facebook/deit-base-distilled-patch16-224", model, _pixels("crop_size", {"height": 16, "width": 16}))
    config = AutoConfig.for_model(
        "clip", text_config={**_TEXT, "vocab_size": 300}, vision_config=_IMAGES, projection_dim=24
    )
    _save(cache, "openai/clip-vit-base-patch32", AutoModel.from_config(config), _pixels("size", {"shortest_edge": 16}))


def _save(cache: Path, name: str, model: Any, beside: Callable[[Path], None], safe: bool = True) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    model.save_pretrained(snapshot, safe_serialization=safe)
    beside(snapshot)


def _byte_pairs(folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(TEXTS, vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))


def _words(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))


def _sentence_pieces(folder: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))


def _pixels(key: str, size: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        settings = {key: size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    return save


def save_data(folder: Path) -> None:
    """What the preset reads that is small: GLUE, the sets of images, and clothes."""
    for name, header, rows in (
        ("RTE", ("index", "sentence1", "sentence2", "label"), [("0", "a film", "good", "entailment"),
                                                                ("1", "a film", "bad", "not_entailment")]),
        ("MRPC", ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), [("1", "0", "0", "a film", "the film"),
                                                                           ("0", "0", "0", "a film", "a plane")]),
        ("CoLA", None, [("x", "1", "", "the film is good"), ("x", "0", "", "film the good is")]),
        ("STS-B", ("sentence1", "sentence2", "score"), [("a film", "the film", "4.5"), ("a film", "a plane", "0.5")]),
        ("SST-2", ("sentence", "label"), [("the film is good", "1"), ("the film is bad", "0")]),
    ):  # fmt: skip
        for split in ("train", "dev"):
            write_tsv(folder / "glue" / name / f"{split}.tsv", [*([header] if header else []), *rows * 8])
    for which in HUB_IMAGES:
        save_hub_images(folder, which)
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 255, (40, 6, 6), np.uint8), np.arange(40) % 10
    (folder / "fashion_mnist").mkdir()
    np.savez(
        folder / "fashion_mnist" / "fashion_mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )


ALIKE = {"MRPC": "RTE", "CoLA": "SST-2", "SVHN": "CIFAR-100", "DTD": "CIFAR-100", "EuroSAT": "CIFAR-100"}
"""Task → one that is as good a test of the code."""
SMALL: dict[str, Callable[[Any], Any]] = {
    "task": lambda value: ALIKE.get(value, value),
    "second_task": lambda value: ALIKE.get(value, value),
    "steps": lambda _: 2,
    "batch_size": lambda _: 4,
    "train_examples": lambda _: 8,
    "max_length": lambda _: 16,
    "examples": lambda _: 8,
    "probe_examples": lambda _: 16,
    "head_steps": lambda _: 2,
    "draws": lambda _: 1,
    "k": lambda _: [2, 4],
    "leading": lambda value: min(value, 4) if isinstance(value, int) else value,
    "rank": lambda value: min(value, 2),
    "dimension": lambda value: min(value, 8),
    "budget": lambda _: 0.2,
    "learning_rate": lambda _: 1e-3,
    "measure": lambda value: {**value, "steps": [1, 2], "leading": 4, "draws": 1},
}


METHODS = ("full", "lora", "spectral", "svft")
"""Other methods are tested on models of both kinds elsewhere."""
SEEDS = 5
"""Of the preset's comparisons, in whose lists they are innermost."""


def shrunk(run: Run) -> Run:
    """The same run, as small as it can be; runs that differ in their learning rates or seeds become one."""
    settings = {name: SMALL.get(name, lambda value: value)(value) for name, value in run.settings.items()}
    needs = {role: shrunk(need) for role, need in run.needs.items()}
    if run.action == "compare":
        settings["tasks"] = settings["tasks"][::SEEDS]
        kept = {f"tuned_{number}": needs[f"tuned_{SEEDS * number}"] for number in range(len(settings["tasks"]))}
        needs = {role: need for role, need in needs.items() if not role.startswith("tuned_")} | kept
    return Run(run.action, settings, 0, needs)


def kinds_of_runs() -> Iterator[Run]:
    """One run of every kind that the preset asks for first: what is done, to which model, by which method and basis."""
    seen = set()
    for name in EXPERIMENTS:
        experiment = find_experiment(name)
        for run in with_needs(experiment.plan(experiment.presets["paper"], Results({}))):
            told = ("method", "coefficients", "basis", "kind", "rank", "dimension", "penalty", "architecture")
            kind = json.dumps(
                [run.action, sorted(run.needs), _family(run), {key: run.settings.get(key) for key in told}]
            )
            if kind not in seen and _is_of_hub(run) and run.settings.get("method", "full") in METHODS:
                seen.add(kind)
                yield shrunk(run)


def _family(run: Run) -> str:
    """What is told apart of the model that a run names: its family where it is tuned, else whether it reads images."""
    model = str(run.settings.get("model"))
    return re.sub(r"[-_]\d.*", "", model) if run.action == "tune" else str("vit" in model or "deit" in model)


def _is_of_hub(run: Run) -> bool:
    """It and what it needs start from models of the hub, on data that are here."""
    chain = list(with_needs([run]))
    named = [one.settings.get("model") or _like(one) for one in chain if one.action in ("tune", "initialise")]
    tasks = {one.settings[key] for one in chain for key in ("task", "second_task") if key in one.settings}
    return any(named) and not tasks & {"CIFAR-10", "MNIST", "USPS", "novels", "Shakespeare", "WikiText-2"}


def _like(run: Run) -> Any:
    architecture = run.settings.get("architecture")
    return architecture["like"] if isinstance(architecture, Mapping) else None


class _Failures:
    """Hears of a study, and keeps what failed."""

    def __init__(self) -> None:
        self.done = 0
        self.failed: dict[str, str] = {}

    def planned(self, missing: Any, done: int, at_once: int) -> None:
        """See `Watcher`."""

    def finished(self, run: Run, seconds: float, error: str | None) -> None:
        """See `Watcher`."""
        self.done += 1
        if error:
            self.failed[f"{run} ({', '.join(run.needs)})"] = error


if __name__ == "__main__":
    place = Path(sys.argv[1])
    watcher = _Failures()
    with RunStore(place / "study") as store:
        run_all(lambda _: list(kinds_of_runs()), store, data=place / "data", watcher=watcher)
    models = {one.settings["model"] for run in kinds_of_runs() for one in with_needs([run]) if "model" in one.settings}
    print(json.dumps({"done": watcher.done, "failed": watcher.failed, "models": sorted(models)}))
