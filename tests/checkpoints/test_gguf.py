"""GGUF files: weights of transformers come back under their names, in their order and as they were quantized."""

import pickle
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GemmaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectralbasis import SpectralBasis, compare, extract
from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from spectralbasis.checkpoints.gguf_names import ARCHITECTURES
from spectralbasis.errors import InputError
from tests.models import sizes_of, tiny

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
from benchmarks.gguf_files import CONVERTED, converted, write  # noqa: E402


def model_of(model_type, head="causal", **config):
    """A tiny model whose every number is random, so that none hides another."""
    torch.manual_seed(0)
    model = tiny(model_type, head, **config)
    if model_type == "bert":
        model.pooler = None  # which llama.cpp leaves out
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def llama():
    """With half as many heads of keys as of queries, and rows of a whole block of every type."""
    return model_of("llama", hidden_size=256, intermediate_size=512)


def blocks_of_q4_k(shape):
    """Random blocks: two scales in float16, 12 bytes of scales and minima of six bits, and 128 bytes of numbers."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144), dtype=np.uint8)
    blocks[..., :4] = generator.uniform(0.001, 0.01, (*blocks.shape[:-1], 2)).astype("<f2").view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def turned_back(W, heads):
    """The inverse of llama.cpp's order of the rows of queries and keys, by the axes of the matrix."""
    return W.reshape(heads, -1, 2, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "gpt_neox", "phi3", "qwen2_moe", "bert"])
def test_every_matrix_comes_back_as_it_was(model_type, tmp_path):
    config = {"attention_bias": True} if model_type == "llama" else {}
    model = model_of(model_type, "" if model_type == "bert" else "causal", **config)
    write(model, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    matching = match_matrices(open_checkpoint(model), checkpoint)
    assert (matching.share, matching.unpaired) == (1.0, ())
    assert all(torch.equal(before.read(), after.read()) for before, after in matching.pairs)
    state = model.state_dict()
    plain = [name for name in checkpoint.names() if ".experts." not in name]
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in plain)
    assert {name for name in set(state) - set(plain) if ".experts." not in name} <= {"lm_head.weight"}  # where tied


def test_the_norms_of_gemma_lose_the_one_that_llama_cpp_added(tmp_path):
    model = AutoModelForCausalLM.from_config(GemmaConfig(**sizes_of("llama"), head_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write(model, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    norms = [name for name in checkpoint.names() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.allclose(checkpoint.read(name), model.state_dict()[name], atol=1e-6) for name in norms)


def test_queries_and_keys_are_stored_in_another_order(llama):
    """What the other tests rely on: a file that was read as it is would not be the model."""
    stored, state = converted(llama), llama.state_dict()
    for kind, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        W = state[f"model.layers.0.self_attn.{name}.weight"].numpy()
        assert not np.array_equal(stored[f"blk.0.{kind}.weight"], W)
        assert np.array_equal(turned_back(stored[f"blk.0.{kind}.weight"], heads), W)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_numbers_are_those_of_the_package(kind, llama, tmp_path):
    stored = converted(llama)
    blocks = {n: blocks_of_q4_k(W.shape) for n, W in stored.items() if W.ndim == 2} if kind == "Q4_K" else None
    write(llama, tmp_path / "model.gguf", kind, blocks)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    named = gguf.GGMLQuantizationType[kind]
    for place, name, heads in (
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", 2),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 0),
        ("token_embd.weight", "model.embed_tokens.weight", 0),
    ):
        packed = blocks[place] if blocks else gguf.quantize(stored[place], named)
        expected = gguf.dequantize(packed, named)
        expected = torch.tensor(turned_back(expected, heads) if heads else expected)
        W = checkpoint.read(name)
        assert torch.equal(W.float(), expected)
        assert checkpoint.dtype(name) == W.dtype
        rows = torch.randperm(len(W))[:7]
        assert torch.equal(checkpoint.take_rows(name, rows, W.shape[1]), W[rows])
        assert torch.equal(checkpoint.read_rows(name, 3, 9), W[3:9])
        alone = pickle.loads(pickle.dumps(checkpoint.alone(name)))
        assert torch.equal(alone.read(name), W)
        assert alone.evidence(name) == checkpoint.evidence(name)


def test_the_header_is_read_as_the_package_reads_it(llama, tmp_path):
    write(llama, tmp_path / "model.gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config == {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 50, "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert len(reader.tensors) == len(checkpoint.names())
    for stored, name in zip(reader.tensors, checkpoint.names(), strict=True):
        found, _ = checkpoint._tensors[name]
        assert (found.start, found.size, found.shape) == (
            stored.data_offset, stored.n_bytes, tuple(map(int, reversed(stored.shape)))
        )  # fmt: skip


def test_compare_and_basis_take_a_file(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    write(llama, tmp_path / "tuned.gguf", "Q8_0")
    summary = compare(tmp_path / "base", [tmp_path / "tuned.gguf"], leading=4, null=None).summary()
    assert (summary["matrices"], summary["unpaired"]) == (14, [])
    basis = SpectralBasis.compute(tmp_path / "tuned.gguf", leading=4)
    assert "layers.0.self_attn.q_proj" in basis


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", False), ("llama", True), ("gpt2", True), ("gpt_neox", False), ("phi3", False), ("bert", False)],
)
def test_an_adapter_turns_one_file_into_the_other(model_type, tied, tmp_path):
    sizes = {"n_embd": 64, "n_inner": 64} if model_type == "gpt2" else {"hidden_size": 64, "intermediate_size": 64}
    head = "" if model_type == "bert" else "causal"
    model = model_of(model_type, head, tie_word_embeddings=tied, **sizes)
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("Q8_0", "Q4_0")}
    for kind, path in files.items():
        write(model, path, kind)
    result = extract(files["Q8_0"], files["Q4_0"], tmp_path / "adapter", rank=64)
    assert (result.left_out, result.energy) == ({}, pytest.approx(1.0))
    before, after = map(open_checkpoint, files.values())
    missing, unexpected = model.load_state_dict({name: before.read(name) for name in before.names()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    model.tie_weights()
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    state = {name: W for name, W in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert state.keys() == set(after.names())
    assert any(not torch.equal(before.read(name), after.read(name)) for name in state)
    for name, W in state.items():
        torch.testing.assert_close(W, after.read(name), rtol=0, atol=1e-5 * float(W.abs().max()))


def test_an_architecture_whose_order_is_not_known_keeps_its_names(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(CONVERTED, "llama", "minicpm")
    write(llama, tmp_path / "one.gguf")
    write(llama, tmp_path / "two.gguf", "Q8_0")
    one, two = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert one.config == {}
    matching = match_matrices(one, two)
    assert [before.name for before, _ in matching.pairs][:2] == ["blk.0.attn_q", "blk.0.attn_k"]
    assert "embedding table" in matching.skipped["token_embd"]
    with pytest.raises(InputError, match="share no matrix"):
        match_matrices(open_checkpoint(llama), one)


def test_a_matrix_of_one_row_has_its_row_again(tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, "general.architecture", "qwen2moe")
    row = described("blk.0.ffn_gate_inp_shexp.weight", (8,))  # as llama.cpp's own tools leave it
    (tmp_path / "model.gguf").write_bytes(file_of([row], DATA))
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert torch.equal(checkpoint.read(name), torch.arange(8.0)[None])
    assert torch.equal(checkpoint.take_rows(name, torch.tensor([0]), 8), torch.arange(8.0)[None])


def test_experts_of_an_unknown_architecture_are_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(CONVERTED, "mixtral", "arctic")
    write(model_of("mixtral"), tmp_path / "model.gguf")
    _, skipped = logical_matrices(open_checkpoint(tmp_path / "model.gguf"))
    assert "3 dimensions" in skipped["blk.0.ffn_gate_exps"]


def test_every_architecture_is_one_of_the_package_and_of_transformers():
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())
    types = {name for one in ARCHITECTURES.values() for name in (one.model_type, one.with_experts) if name}
    assert types <= set(CONFIG_MAPPING)


# --- files made by hand -----------------------------------------------------------------------------------------

FACTS = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.embedding_length": 8}


def text(value):
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def fact(key, value):
    if isinstance(value, bytes):  # the number of its type and its bytes
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + struct.pack("<II", 4, value)


def described(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def file_of(tensors, data=b"", facts=(), version=3, counts=None):
    """A file; `tensors` are described ones, and `data` follows them at a multiple of 32 bytes."""
    facts = [fact(key, value) for key, value in [*FACTS.items(), *facts]]
    count = counts or (len(tensors), len(facts))
    head = struct.pack("<4sIQQ", b"GGUF", version, *count) + b"".join([*facts, *tensors])
    return head + bytes(-len(head) % 32) + data


SQUARE = described("blk.0.attn_q.weight", (8, 8))
DATA = np.arange(64, dtype="<f4").tobytes()
DAMAGE = [
    (file_of([SQUARE], DATA)[:40], "announced at byte"),
    (file_of([SQUARE], DATA[:-1]), "claims 256 bytes .* beyond the end"),
    (file_of([SQUARE], DATA, counts=(2**60, 1)), f"claims {2**60} tensors, expected at most"),
    (file_of([SQUARE], DATA, counts=(1, 2**60)), f"claims {2**60} entries of metadata"),
    (file_of([SQUARE], DATA, counts=(2, 3)), "the name of a tensor has|damaged"),
    (file_of([SQUARE, SQUARE], DATA), "has the tensor blk.0.attn_q.weight twice"),
    (file_of([SQUARE], DATA, [("general.architecture", "x")]), "has the key general.architecture twice"),
    (file_of([described("x", (8, 8), offset=2**63)], DATA), "beyond the end"),
    (file_of([SQUARE, described("other", (8, 8), offset=32)], DATA + DATA), "in another tensor"),
    (file_of([described("x", (2**62, 2**62))], DATA), "beyond the end"),
    (file_of([described("x", (1,) * 5)], DATA), "5 dimensions, expected at most 4"),
    (file_of([described("x", (8, 8), kind=8)], DATA), "no whole blocks of Q8_0"),
    (file_of([described("layer\x1b[31m", (8, 8))], DATA), r"\\x1b.* not printable"),
    (file_of([described(b"\xff\xfe", (8, 8))], DATA), "not valid UTF-8"),
    (file_of([described("", (8, 8))], DATA), "has 0 bytes, expected 1"),
    (file_of([described("x" * 5000, (8, 8))], DATA), "has 5000 bytes"),
    (file_of([SQUARE], DATA, [("long", struct.pack("<IIQ", 9, 0, 2**62))]), "announced at byte"),
    (file_of([SQUARE], DATA, [("texts", struct.pack("<IIQ", 9, 8, 2**62))]), "texts, expected at most"),
    (file_of([SQUARE], DATA, [("deep", struct.pack("<IIQ", 9, 9, 1))]), "values of the type 9"),
    (file_of([SQUARE], DATA, [("odd", struct.pack("<I", 77))]), "values of the type 77"),
    (file_of([SQUARE], DATA, [("general.alignment", 0)]), "general.alignment is 0"),
    (file_of([SQUARE], DATA, [("general.alignment", 24)]), "general.alignment is 24"),
    (file_of([SQUARE], DATA, version=1), "version 1, expected 2 or 3"),
    (file_of([SQUARE], DATA, version=3 << 24), "big-endian"),
    (file_of([SQUARE], DATA, [("split.count", 3)]), "one of 3 parts .*llama-gguf-split --merge"),
    (file_of([SQUARE], DATA, [("general.type", "adapter")]), "of the type 'adapter', not of a model"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damage_is_a_sentence(content, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_large_hole_in_a_file_is_not_walked_through(tmp_path):
    """A list that claims a terabyte of numbers in a file that has them all, as zeros that take no room."""
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("long") + struct.pack("<IIQ", 9, 0, 2**40))
        file.truncate(2**40 + 100)
    assert open_checkpoint(tmp_path / "model.gguf").names() == ()


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ([described("blk.0.ffn_up.weight", (8, 8), kind=1000)], {}, "type 1000, which the installed package"),
        ([described("blk.0.ffn_up.weight", (1, 256), kind=15)], {}, "type Q8_K, which the package gguf cannot"),
        ([SQUARE, described("blk.0.attn_q.scale", (1,), offset=256)], {}, "only together with blk.0.attn_q.scale"),
        ([SQUARE], {"llama.attention.key_length": 3}, "states 2 heads of 3 rows for its 8 rows"),
        ([SQUARE], {"llama.attention.head_count": 0}, "does not state its heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_listed(tensors, facts, message, tmp_path, monkeypatch):
    for key, value in facts.items():
        monkeypatch.setitem(FACTS, key, value)
    rest = described("blk.0.ffn_down.weight", (8, 8), offset=512)
    (tmp_path / "model.gguf").write_bytes(file_of([*tensors, rest], DATA * 4))
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    matrices, skipped = logical_matrices(checkpoint)
    assert list(matrices) == ["layers.0.mlp.down_proj"]
    ((name, reason),) = skipped.items()
    with pytest.raises(InputError, match=message):
        checkpoint.read(next(one for one in checkpoint.names() if name in one))
    assert re.search(message, reason)


@pytest.mark.parametrize("number", list(gguf.GGMLQuantizationType))
def test_random_blocks_of_every_type_are_read_or_listed(number, tmp_path):
    size, held = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (4, 512 // size * held), dtype=np.uint8)
    tensor = described("blk.0.ffn_up.weight", (4, 512), kind=number)
    (tmp_path / "model.gguf").write_bytes(file_of([tensor], data.tobytes()))
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    (name,) = checkpoint.names()
    if checkpoint.unreadable(name) is None:
        assert checkpoint.read(name).shape == (4, 512)
    else:
        assert number.name in {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64"}  # whole numbers alone are no weights


@pytest.fixture(scope="module")
def whole(llama):
    model = model_of("llama", hidden_size=16, intermediate_size=16, vocab_size=4)
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder) / "model.gguf", "F16")
        return (Path(folder) / "model.gguf").read_bytes()


def read_all(content):
    """Whether the file is read; False where it is refused with a sentence, and any other error is the test's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(content)
        try:
            for matrix in logical_matrices(open_checkpoint(path))[0].values():
                assert tuple(matrix.read().shape) == matrix.shape
        except InputError:
            return False
        return True


@settings(max_examples=100)
@given(st.data())
def test_changed_bytes_are_refused_or_read(whole, data):
    """Of the header mostly, whose numbers are eight bytes wide."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2000) | st.integers(0, len(content) - 8))
        value = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1]) | st.integers(0, 255))
        content[place : place + 8] = struct.pack("<Q", value)
    read_all(bytes(content))


@settings(max_examples=30)
@given(st.data())
def test_cut_files_are_refused(whole, data):
    """The last tensor may be followed by up to 32 bytes that fill its room."""
    assert read_all(whole)
    assert not read_all(whole[: data.draw(st.integers(0, len(whole) - 33))])


def test_without_the_package_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(file_of([SQUARE], DATA))
    with pytest.raises(InputError, match=r"needs the package gguf.*pip install 'spectralbasis\[gguf\]'"):
        open_checkpoint(tmp_path / "model.gguf")
