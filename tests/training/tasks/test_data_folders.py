"""Where tasks find their data below one folder."""

from pathlib import Path

import pytest

from spectralbasis.training import load_task
from spectralbasis.training.image_tasks import HUB_IMAGES
from spectralbasis.training.known_tasks import TASKS, folder_of, task_key


@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion_mnist", "fashion_mnist"), ("FashionMNIST", "fashion_mnist"), ("CIFAR-10", "cifar10_jpg"),
     ("Shakespeare", "wikitext2_shakespeare"), ("novels", "english_novels"), ("motionsense", "motionsense")],
)  # fmt: skip
def test_a_task_has_one_folder_however_it_is_spelt(name, folder):
    assert folder_of(name, Path("data")) == Path("data") / folder


@pytest.mark.parametrize(("name", "folder"), [("SST-2", "glue"), ("sst2", "glue"), ("Pets", "oxford-iiit-pet")])
def test_what_the_hub_has_is_taken_from_there_where_its_folder_is_absent(tmp_path, name, folder):
    assert folder_of(name, tmp_path) is None
    (tmp_path / folder).mkdir()
    assert folder_of(name, tmp_path) == tmp_path / folder


def test_every_set_of_images_has_its_folder():
    records = [TASKS[task_key(which.name)] for which in HUB_IMAGES]
    assert [(one.folder, one.hub) for one in records] == [(which.folder, which.repository) for which in HUB_IMAGES]


def test_bundled_tasks_and_those_from_the_hub_have_none():
    assert folder_of("digits-rotated", Path("data")) is None
    assert folder_of("descriptions", Path("data")) is None
    assert folder_of("SST-2", None) is None


@pytest.mark.data
@pytest.mark.parametrize("name", ["MNIST", "USPS", "Fashion-MNIST", "MotionSense", "SST-2", "Shakespeare"])
def test_the_folder_is_what_the_loader_takes(data_dir, name):
    task = load_task(name, folder_of(name, data_dir))
    assert len(task.train) > 1000
    assert len(task.evaluation) > 400
