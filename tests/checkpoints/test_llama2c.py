"""llama2.c's files, version 0: every float has one place, and damage is an InputError."""

import pickle
import struct
from math import prod

import numpy as np
import pytest
import torch
from benchmarks.instructions import save_model
from transformers import LlamaForCausalLM

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError

HEADER = (8, 12, 2, 4, 2, 5, 6)  # width, hidden, layers, heads, key heads, vocabulary, positions


def size_of(header):
    """Numbers after the header, counted from the model's own parts."""
    width, hidden, layers, heads, key_heads, vocabulary, positions = header
    keys = width * key_heads // heads
    attention = 2 * width * width + 2 * width * keys
    layer = attention + 3 * width * hidden + 2 * width
    vocabularies = 1 if vocabulary > 0 else 2
    return abs(vocabulary) * width * vocabularies + layers * layer + width + positions * width // heads


def write(path, header, numbers=None):
    numbers = np.arange(size_of(header) if numbers is None else numbers, dtype="<f4")
    path.write_bytes(struct.pack("<7i", *header) + numbers.tobytes())
    return path


@pytest.mark.parametrize("header", [HEADER, (*HEADER[:5], -5, 6), (8, 12, 1, 2, 2, 3, 4)])
def test_every_number_is_in_one_tensor_in_the_order_of_the_file(header, tmp_path):
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(write(tmp_path / "model.bin", header))))
    read = torch.cat([checkpoint.read(name).flatten() for name in checkpoint.names()])
    assert torch.equal(read, torch.arange(size_of(header), dtype=torch.float32))
    assert all(tuple(checkpoint.read(name).shape) == checkpoint.shape(name) for name in checkpoint.names())
    assert ("output.weight" in checkpoint.names()) == (header[5] < 0)


def test_rows(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "model.bin", HEADER))
    name = "layers.1.feed_forward.w3.weight"
    assert torch.equal(checkpoint.read_rows(name, 2, 4), checkpoint.read(name)[2:4])


@pytest.mark.parametrize("numbers", [0, size_of(HEADER) - 1, size_of(HEADER) + 1])
def test_wrong_size(numbers, tmp_path):
    with pytest.raises(InputError, match=r"llama2\.c file of 2 layers of width 8.*download it again"):
        open_checkpoint(write(tmp_path / "model.bin", HEADER, numbers))


def test_later_version(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("<Ii", 0x616B3432, 2) + bytes(248))
    with pytest.raises(InputError, match=r"version 2.*--version 0"):
        open_checkpoint(tmp_path / "model.bin")


def test_torch_files_of_the_same_suffix_stay_torch_files(tmp_path):
    for zipped in (True, False):
        torch.save({"a.weight": torch.eye(3)}, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
        assert open_checkpoint(tmp_path / "model.bin").names() == ("a.weight",)


@pytest.mark.data
def test_stories260k(data_dir):
    checkpoint = open_checkpoint(data_dir / "stories260K" / "stories260K.bin")
    assert sum(prod(checkpoint.shape(name)) for name in checkpoint.names()) == 264_128
    matrices, skipped = logical_matrices(checkpoint)
    assert len(matrices) == 5 * 7
    assert list(skipped) == ["tok_embeddings"]
    assert matrices["layers.4.attention.wk"].read().shape == (32, 64)
    # The tables of rotary angles close the file: where they are right, everything before them is in its place.
    angles = torch.outer(torch.arange(512.0), 10000 ** -(torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(checkpoint.read("freqs_cos"), angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(checkpoint.read("freqs_sin"), angles.sin(), atol=1e-4, rtol=0)


@pytest.mark.data
@torch.no_grad()
def test_stories260k_tells_a_story(data_dir, tmp_path):
    folder = save_model(data_dir / "stories260K", tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokens = model.generate(torch.tensor([[1]]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 1:]
    words = vocabulary(data_dir / "stories260K" / "tok512.bin")
    assert b"".join(words[token] for token in tokens).decode().strip().startswith("Once upon a time, there was a")


def vocabulary(path):
    content, words, position = path.read_bytes(), [], 4
    while position < len(content):
        _, length = struct.unpack_from("<fi", content, position)
        words.append(content[position + 8 : position + 8 + length])
        position += 8 + length
    return words
