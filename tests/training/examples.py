"""Small models and data files in the layouts that users have, made in a temporary folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers import AutoConfig, AutoModelForImageClassification, BertTokenizerFast

from spectralbasis.training import Task
from spectralbasis.training.image_tasks import HubImages
from tests.models import tiny

WORDS = ("the", "film", "is", "good", "bad", "a", "plane", "takes", "off", "not", "very", '"')
RTE_HEADER = ("index", "sentence1", "sentence2", "label")


def save_text_model(folder: Path, model_type: str = "bert", **config: int) -> Path:
    """A BERT of two layers without a head, and a tokenizer of a few words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    tiny(model_type, **config).save_pretrained(folder)
    return folder


def save_image_model(folder: Path, labels: int = 10) -> Path:
    """A vision transformer of two layers for grey images of 8×8 pixels, random but sensitive to its input."""
    config = AutoConfig.for_model(
        "vit", image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_labels=labels, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return folder


def write_tsv(file: Path, rows: Sequence[Sequence[str]], *, encoding: str = "utf-8") -> Path:
    """Tab-separated rows, quotes as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding=encoding)
    return file


def write_sst2(folder: Path, repeats: int = 16) -> Path:
    """SST-2 of films that are good or bad, as `folder`/SST-2/{train,dev}.tsv; returns `folder`."""
    rows = [("the film is very good", "1"), ("a bad film", "0"), ("the film is good", "1"), ("the film is bad", "0")]
    for name, examples in (("train", rows * repeats), ("dev", rows * 5)):
        write_tsv(folder / "SST-2" / f"{name}.tsv", [("sentence", "label"), *examples])
    return folder


def save_hub_images(parent: Path, which: HubImages) -> Path:
    """Dark and bright images of several sizes, as `parent`/FOLDER in the layout of the repository on the hub."""
    generator = np.random.default_rng(0)
    features = Features(
        {which.image: Image(), which.label: ClassLabel(names=["dark", "bright"]), "more": Value("int64")}
    )
    folder = parent / which.folder / (which.config or "data")
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 12)):
        labels = [number % 2 for number in range(count)]
        images = [
            Pillow.fromarray(generator.integers(128 * label, 128 + 127 * label, (9 + number % 3, 12, 3), np.uint8))
            for number, label in enumerate(labels)
        ]
        rows = {which.image: images, which.label: labels, "more": labels}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    lines = [f"  - split: {split}\n    path: {folder.name}/{split}-*" for split in ("train", "test")]
    config = "\n".join([f"- config_name: {which.config or 'default'}", "  data_files:", *lines])
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n{config}\n---\n")
    return folder.parent


def bright_side_task(examples: int = 96, classes: int = 2) -> Task:
    """Images of 8×8 pixels whose upper or lower half is bright, with noise."""
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 0.4, (examples, 8, 8)).astype(np.float32)
    labels = generator.integers(0, 2, examples)
    images[labels == 0, :4] += 0.5
    images[labels == 1, 4:] += 0.5
    held_out = slice(examples // 2, None)
    names = tuple(f"class {number}" for number in range(classes))
    return Task.from_arrays("bright side", (images, labels), (images[held_out], labels[held_out]), label_names=names)
