"""No stored tensor vanishes: each is measured, listed with a reason, or the checkpoint is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectralbasis import SpectralBasis
from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from spectralbasis.errors import InputError

CLASHES = [
    {"x.weight": (8, 8), "x_weight": (8, 8), "x.weight.weight": (8, 8)},
    {"b.0.qkv.weight": (24, 8), "b.0.qkv.query.weight": (8, 8), "b.0.qkv.key.weight": (8, 8)},
    {"l.0.experts.down_proj": (2, 8, 8), "l.0.experts.0.down_proj.weight": (8, 8)},
    {"l.0.experts.gate_up_proj": (2, 16, 8), "l.0.experts.gate_up_proj.0.gate": (8, 8)},
    {"bert.x.weight": (8, 8), "x.weight": (8, 8)},
    {"a._orig_mod.x.weight": (8, 8), "a.x.weight": (8, 8)},
    {"model.x.weight": (8, 8), "x.weight": (8, 8), "model.base_layer.x.weight": (8, 8)},
]
PARTS = [
    "model",
    "bert",
    "0",
    "1",
    "qkv",
    "query",
    "experts",
    "gate_up_proj",
    "gate",
    "weight",
    "base_layer",
    "x_weight",
]


def values(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_nothing_lost(state):
    matrices, skipped = logical_matrices(open_checkpoint(state))
    measured = {matrix.cut.tensor for matrix in matrices.values()}
    listed = set(skipped)
    assert all(name in measured or listed & {name, *_matrices_of(name, state)} for name in state)
    whole = sum(state[name].numel() for name in measured if not any(name in reason for reason in skipped.values()))
    assert sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values()) >= whole


def _matrices_of(name, state):
    """Names that `logical_matrices` gives to the parts of one tensor that is alone."""
    matrices, skipped = logical_matrices(open_checkpoint({name: state[name]}))
    return {*matrices, *skipped}


@pytest.mark.parametrize("shapes", CLASHES)
def test_tensors_of_one_matrix_name(shapes):
    assert_nothing_lost(values(shapes))


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join), st.sampled_from([2, 3])),
        unique_by=lambda item: item[0],
        min_size=1,
        max_size=5,
    )
)
def test_tensors_of_drawn_names(named):
    state = {name: torch.ones((6, 2) if dimensions == 2 else (2, 6, 2)) for name, dimensions in named}
    try:
        assert_nothing_lost(state)
    except InputError:
        return


def test_two_tensors_that_are_one_matrix_are_listed_with_both_names():
    fused, alone = "b.0.qkv.weight", "b.0.qkv.query.weight"
    state = values({fused: (24, 8), alone: (8, 8), "b.0.fc.weight": (8, 8)})
    matrices, skipped = logical_matrices(open_checkpoint(state))
    assert set(matrices) == {"b.0.qkv.key", "b.0.qkv.value", "b.0.fc"}
    assert fused in skipped[alone]
    assert alone in skipped[fused]
    kept, _ = logical_matrices(open_checkpoint(state), exclude=[alone])
    assert set(kept) == {"b.0.qkv.query", "b.0.qkv.key", "b.0.qkv.value", "b.0.fc"}
    assert kept["b.0.qkv.query"].cut.tensor == fused


def test_a_comparison_says_what_it_left_out():
    one, other = values(CLASHES[1]), values(CLASHES[1])
    matching = match_matrices(open_checkpoint(one), open_checkpoint(other))
    assert [group.reason for group in matching.unpaired if "b.0.qkv.query.weight" in group.reason]
    assert matching.share < 1
    stacks = values(CLASHES[2] | {"l.0.experts.1.down_proj.weight": (8, 8)})
    matching = match_matrices(open_checkpoint(stacks), open_checkpoint(stacks))
    assert matching.pairs == []
    assert "stored more than once" in matching.unpaired[0].reason


@pytest.mark.parametrize(
    "extra", [{1: torch.eye(2)}, {("a", "b"): torch.eye(2)}, {"block": {"b.weight": torch.eye(2)}}]
)
def test_tensors_of_a_state_that_would_be_lost(extra, tmp_path):
    torch.save({"a.weight": torch.eye(2), **extra}, tmp_path / "run.pt")
    with pytest.raises(InputError, match=r"names a tensor|and more tensors in"):
        open_checkpoint(tmp_path / "run.pt")


def test_what_training_scripts_keep_beside_a_state_is_no_obstacle(tmp_path):
    state = {"a.weight": torch.eye(2), "a._extra_state": {"scale": torch.ones(1)}, "optim": {"m": torch.ones(2)}}
    torch.save(state, tmp_path / "run.pt")
    assert open_checkpoint(tmp_path / "run.pt").names() == ("a.weight",)


def shards(folder, weight_map, held):
    for file, names in held.items():
        save_file({name: torch.eye(3) for name in names}, folder / f"{file}.safetensors")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("weight_map", "held", "told"),
    [({"a": "1", "b": "2"}, {"1": "a", "2": "ba"}, "both 1.safetensors and 2.safetensors"),
     ({"a": "1", "b": "2"}, {"1": "ac", "2": "bc"}, "both 1.safetensors and 2.safetensors"),
     ({"a": "1", "b": "2"}, {"1": "a", "2": "c"}, "lacks")],
)  # fmt: skip
def test_shards_that_hold_other_tensors_than_their_index_says(weight_map, held, told, tmp_path):
    shards(tmp_path, weight_map, held)
    with pytest.raises(InputError, match=told):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_of_the_model(tmp_path):
    shards(tmp_path, {"a": "1", "b": "2"}, {"1": "ac", "2": "b"})
    assert sorted(open_checkpoint(tmp_path).names()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("file", "text"),
    [("model.safetensors.index.json", '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}'),
     ("config.json", '{"model_type": "bert", "model_type": "gpt2"}')],
)  # fmt: skip
def test_keys_that_are_given_twice(file, text, tmp_path):
    shards(tmp_path, {"a": "1"}, {"1": "a", "2": "a"})
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match="given twice"):
        open_checkpoint(tmp_path)


def test_tensor_that_a_header_names_twice(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}, path)
    path.write_bytes(path.read_bytes().replace(b'"b":', b'"a":'))
    with pytest.raises(InputError, match="given twice"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["a" * 5000, ".".join("a" * 100_000), "a\ud800.weight"])
def test_names_that_no_model_has(name):
    with pytest.raises(InputError, match="a tensor whose name"):
        open_checkpoint({name: torch.eye(2)})


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 4000, "0" * 12])
def test_long_digits_are_no_number_of_a_layer(digits):
    matrices, _ = logical_matrices(open_checkpoint({f"layers.{digits}.q.weight": torch.eye(2)}))
    (matrix,) = matrices.values()
    assert matrix.layer == -1


def test_names_that_differ_in_case_or_form_stay_apart():
    state = values({"a.Q.weight": (4, 4), "a.q.weight": (4, 4), "a.\u00e9.weight": (4, 4), "a.e\u0301.weight": (4, 4)})
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert len(matrices) == len(state) == 4


def test_more_experts_than_any_model_has_are_one_listed_stack():
    matrices, skipped = logical_matrices(open_checkpoint({"l.0.experts.down_proj": torch.ones(65_537, 1, 1)}))
    assert matrices == {}
    assert "65537 experts" in skipped["l.0.experts.down_proj"]


def test_large_tensor_of_a_sparse_file_is_not_read_into_memory(tmp_path):
    """A file of terabytes that takes no place on the disk; a machine that could hold it is not at hand."""
    side = 10**6
    header = json.dumps(
        {"a.weight": {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side**2]}}
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * side**2)
    with pytest.raises(InputError, match="of memory, and"):
        open_checkpoint(path).read("a.weight")
    with pytest.raises(InputError, match=r"decomposing a takes 8\.0TB|decomposing a takes 8TB"):
        SpectralBasis.compute(path, 2)
    assert open_checkpoint(path).read_rows("a.weight", 5, 6).shape == (1, side)
