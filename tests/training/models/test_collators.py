"""From rows to tensors."""

import numpy as np
import pytest
import torch

from spectralbasis.errors import InputError
from spectralbasis.training import load_model, load_task
from spectralbasis.training.collators import ImageCollator
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2


def batch_of(collator, image, label=3):
    return collator([{"image": np.asarray(image), "label": label}])


def test_whole_numbers_are_scaled_and_all_pixels_normalised():
    collator = ImageCollator(size=None, channels=1, mean=(0.5,), std=(0.25,))
    batch = batch_of(collator, np.array([[[0, 255]]], dtype=np.uint8))
    assert batch["pixel_values"].flatten().tolist() == pytest.approx([-2, 2])
    assert batch["labels"].tolist() == [3]
    floats = batch_of(collator, np.array([[[0.25, 0.75]]], dtype=np.float32))
    assert floats["pixel_values"].flatten().tolist() == pytest.approx([-1, 1])


def test_grey_becomes_colour_by_repetition_with_each_channels_own_mean():
    collator = ImageCollator(size=(2, 2), channels=3, mean=(0.0, 0.1, 0.2), std=(1.0, 1.0, 1.0))
    pixels = batch_of(collator, np.full((1, 2, 2), 0.5, dtype=np.float32))["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_colour_becomes_grey_by_the_mean():
    collator = ImageCollator(size=None, channels=1, mean=(0.0,), std=(1.0,))
    colour = np.array([0.0, 0.3, 0.6], dtype=np.float32)[:, None, None]
    assert batch_of(collator, colour)["pixel_values"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("size", [(4, 4), (16, 12)])
def test_resizing_keeps_a_linear_ramp_between_its_ends(size):
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None, :, None].repeat(8, axis=2)
    collator = ImageCollator(size=size, channels=1, mean=(0.0,), std=(1.0,))
    pixels = batch_of(collator, ramp)["pixel_values"]
    assert pixels.shape == (1, 1, *size)
    middle = pixels[0, 0, 1:-1]
    expected = ((torch.arange(size[0]) + 0.5) * 8 / size[0] - 0.5) / 7
    assert torch.allclose(middle, expected[1:-1, None].expand_as(middle), atol=0.02)


def test_texts_are_cut_at_max_length_and_padded_to_the_longest_of_the_batch(tmp_path):
    source = save_text_model(tmp_path / "model")
    collator = load_model(source, load_task("sst2", write_sst2(tmp_path)), max_length=6).collator
    batch = collator([{"sentence": "good", "label": 1}, {"sentence": "the film is very very good", "label": 0}])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert collator([{"sentence": "good", "label": 1}])["input_ids"].shape == (1, 3)


def test_the_largest_length_is_what_the_model_reads(tmp_path):
    source = save_text_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"max_length=64 for .* reads up to 16 tokens; pass 1 to 16"):
        load_model(source, load_task("sst2", write_sst2(tmp_path)), max_length=64)


def test_image_settings_are_saved_with_a_model_and_read_back(tmp_path):
    source = save_image_model(tmp_path / "model", labels=2)
    loaded = load_model(source, bright_side_task())
    assert loaded.collator == ImageCollator(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    changed = ImageCollator(size=(8, 8), channels=1, mean=(0.2,), std=(0.4,))
    changed.save(source)
    assert load_model(source, bright_side_task()).collator == changed
