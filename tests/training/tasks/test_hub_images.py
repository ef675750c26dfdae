"""Sets of encoded images in the layout of their repositories on the hub."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from spectralbasis.errors import InputError
from spectralbasis.training import load_model, load_task
from spectralbasis.training.image_tasks import HUB_IMAGES, HubImages
from tests.training.examples import save_hub_images, save_image_model

PETS, CIFAR_100 = (next(one for one in HUB_IMAGES if one.name == name) for name in ("Pets", "CIFAR-100"))


@pytest.mark.parametrize("which", [PETS, CIFAR_100])
def test_a_copy_of_the_repository_is_read_from_it_or_from_its_parent(tmp_path, which: HubImages):
    save_hub_images(tmp_path, which)
    for place in (tmp_path, tmp_path / which.folder):
        task = load_task(which.name, place)
        assert task.label_names == ("dark", "bright")
        assert (len(task.train), len(task.evaluation)) == (24, 12)
        assert set(task.train.column_names) == {"image", "label"}
    halves = task.halved()
    assert halves.selection is not None
    assert len(halves.selection) == len(halves.evaluation) == 6


def test_images_of_any_size_become_what_the_model_reads(tmp_path):
    save_hub_images(tmp_path, PETS)
    loaded = load_model(save_image_model(tmp_path / "model", labels=2), load_task("Pets", tmp_path))
    rows = [loaded.task.train[row] for row in range(6)]
    assert len({row["image"].size for row in rows}) > 1
    pixels = loaded.collator(rows)["pixel_values"]
    assert pixels.shape == (6, 1, 8, 8)
    means = pixels.mean((1, 2, 3)) * 0.5 + 0.5
    assert means.tolist() == pytest.approx([0.75 if row["label"] else 0.25 for row in rows], abs=0.05)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Pets cannot be loaded from .*pass --data with the parent of oxford-iiit-p"):
        load_task("Pets", tmp_path)
    folder = tmp_path / PETS.folder
    folder.mkdir()
    grey = Pillow.fromarray(np.zeros((4, 4), np.uint8))
    plain = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [grey] * 2, "label": [0, 1]}, features=plain)
    rows.to_parquet(folder / "train.parquet")
    with pytest.raises(InputError, match="has no column 'label' of the type ClassLabel; its columns are image, label"):
        load_task("Pets", tmp_path)
    named = plain.copy() | {"label": ClassLabel(names=["a", "b"])}
    rows.cast(Features(named)).to_parquet(folder / "train.parquet")
    with pytest.raises(InputError, match="has no split 'test'; it has train"):
        load_task("Pets", tmp_path)
