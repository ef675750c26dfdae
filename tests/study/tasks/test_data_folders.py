"""Where tasks find their data below one folder."""

from pathlib import Path

import pytest

from spectralbasis.study import load_task, task_names
from spectralbasis.study.tasks.data_folders import FOLDERS, folder_of
from spectralbasis.study.tasks.task import same_name


@pytest.mark.parametrize(
    ("name", "folder"),
    [("SST-2", "glue"), ("sst2", "glue"), ("fashion_mnist", "fashion_mnist"), ("CIFAR-10", "cifar10_jpg"),
     ("Shakespeare", "wikitext2_shakespeare"), ("novels", "english_novels"), ("motionsense", "motionsense")],
)  # fmt: skip
def test_a_task_has_one_folder_however_it_is_spelt(name, folder):
    assert folder_of(name, Path("data")) == Path("data") / folder


def test_bundled_tasks_and_those_from_the_hub_have_none():
    assert folder_of("digits-rotated", Path("data")) is None
    assert folder_of("descriptions", Path("data")) is None
    assert folder_of("SST-2", None) is None


def test_every_name_is_that_of_a_task():
    for names in FOLDERS.values():
        for name in names:
            assert any(same_name(name, known) for known in task_names())


@pytest.mark.data
@pytest.mark.parametrize("name", ["MNIST", "USPS", "Fashion-MNIST", "MotionSense", "SST-2", "Shakespeare"])
def test_the_folder_is_what_the_loader_takes(data_dir, name):
    task = load_task(name, folder_of(name, data_dir))
    assert len(task.train) > 1000
    assert len(task.evaluation) > 400
