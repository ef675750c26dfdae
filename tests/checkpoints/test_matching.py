"""Matrices of two checkpoints are paired by name, never by position; what is left over is listed with the reason."""

import pytest
import torch

from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from spectralbasis.errors import InputError
from tests.models import tiny


def layers(prefix, numbers, shape=(4, 3)):
    return {f"{prefix}layer.{number}.dense.weight": torch.full(shape, float(number)) for number in numbers}


def match(base, tuned, **globs):
    found = match_matrices(open_checkpoint(base), open_checkpoint(tuned), **globs)
    return found.pairs, found.skipped


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "phi3"])
def test_bare_base_and_task_model_on_disk(model_type, tmp_path):
    base, tuned = tiny(model_type), tiny(model_type, "classifier")
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")

    pairs, skipped = match(tmp_path / "base", tmp_path / "tuned")

    expected, _ = logical_matrices(open_checkpoint(base))
    assert [ours.name for ours, _ in pairs] == [ours.name for ours, theirs in pairs if ours.name == theirs.name]
    assert {ours.name for ours, _ in pairs} == set(expected)
    inner = dict(getattr(tuned, tuned.base_model_prefix).named_parameters())
    for _, theirs in pairs:
        if theirs.cut.rows is None and not theirs.cut.transposed:
            assert torch.equal(theirs.read(), inner[f"{theirs.name}.weight"])
    assert all("task head" in reason or "embedding" in reason for reason in skipped.values())


def test_order_of_storage_does_not_matter():
    base = layers("", [0, 1, 2])
    pairs, skipped = match(base, dict(reversed(base.items())))
    assert [(ours.read()[0, 0], theirs.read()[0, 0]) for ours, theirs in pairs] == [(0, 0), (1, 1), (2, 2)]
    assert skipped == {}


def test_one_more_layer_on_either_side_is_listed_and_shifts_nothing():
    pairs, skipped = match(layers("", [1, 2]), layers("", [0, 1]))
    assert [ours.name for ours, _ in pairs] == ["layer.1.dense"]
    assert skipped == {"layer.2.dense": "absent in state_dict", "layer.0.dense": "absent in state_dict"}


def test_shapes_that_differ_are_listed_with_both():
    base = layers("", [0, 1]) | {"pooler.weight": torch.ones(2, 6)}
    pairs, skipped = match(base, layers("", [0, 1]) | {"pooler.weight": torch.ones(5, 6)})
    assert len(pairs) == 2
    assert "2×6" in skipped["pooler"]
    assert "5×6" in skipped["pooler"]


@pytest.mark.parametrize("prefix", ["backbone.", "language_model.model.", "my.own.wrapper."])
@pytest.mark.parametrize("base_is_wrapped", [False, True])
def test_one_more_prefix_on_all_names_is_ignored(prefix, base_is_wrapped):
    bare, wrapped = layers("", [0, 1]), layers(prefix, [0, 1])
    pairs, skipped = match(wrapped, bare) if base_is_wrapped else match(bare, wrapped)
    assert [ours.layer for ours, _ in pairs] == [theirs.layer for _, theirs in pairs] == [0, 1]
    assert skipped == {}


def test_a_name_that_fits_two_prefixes_is_not_guessed():
    two_towers = layers("text.", [0, 1]) | layers("vision.", [0, 1])
    with pytest.raises(InputError, match="share no matrix"):
        match(layers("", [0, 1]), two_towers)


def test_two_towers_of_different_width_are_told_apart_by_shape():
    two_towers = layers("text.", [0, 1]) | layers("vision.", [0, 1], shape=(8, 6))
    pairs, skipped = match(layers("", [0, 1]), two_towers)
    assert [theirs.name for _, theirs in pairs] == ["text.layer.0.dense", "text.layer.1.dense"]
    assert set(skipped) == {"vision.layer.0.dense", "vision.layer.1.dense"}


def test_a_stray_suffix_does_not_outweigh_equal_names():
    base = layers("", [0, 1]) | {"extra.weight": torch.ones(2, 2)}
    pairs, skipped = match(base, layers("", [0, 1]) | {"head_of.extra.weight": torch.ones(2, 2)})
    assert len(pairs) == 2
    assert set(skipped) == {"extra", "head_of.extra"}


def test_other_architecture_names_examples_of_both_sides():
    with pytest.raises(InputError) as caught:
        match(tiny("bert"), tiny("gpt2"))
    message = str(caught.value)
    for expected in ("BertModel", "GPT2Model", "encoder.layer.0.attention.self.query (32×32)", "h.0.attn.c_attn.query"):
        assert expected in message


def test_tuned_without_a_config_is_read_with_the_base_config():
    base = tiny("gpt_neox")
    pairs, _ = match(base, {name: tensor.clone() for name, tensor in base.state_dict().items()})
    assert "layers.0.attention.query_key_value.key" in {ours.name for ours, _ in pairs}
    assert all(torch.equal(ours.read(), theirs.read()) for ours, theirs in pairs)


def test_include_and_exclude():
    base = layers("", [0, 1, 10])
    pairs, skipped = match(base, base, include=["layer.1*"], exclude=["*.10.*"])
    assert [ours.name for ours, _ in pairs] == ["layer.1.dense"]
    assert skipped == {"layer.0.dense": "not named by include", "layer.10.dense": "left out by exclude"}


def test_include_that_names_nothing_shows_what_there_is():
    with pytest.raises(InputError, match=r"include=\['attention'\].*layer\.0\.dense"):
        match(layers("", [0]), layers("", [0]), include=["attention"])


def stacks(prefix, numbers, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}encoder.layer.{number}.dense.weight": torch.randn(4, 3, generator=generator) for number in numbers
    }


@pytest.mark.parametrize("swapped", [False, True])
def test_a_stack_that_two_prefixes_hold_is_paired_by_its_whole_name(swapped):
    text = stacks("bert.", range(4), 0)
    both = stacks("vit.", range(4), 1) | {name: W for name, W in text.items() if ".0." in name or ".1." in name}
    pairs, _ = match(both, text) if swapped else match(text, both)
    assert len(pairs) == 2
    assert all(torch.equal(before.read(), after.read()) for before, after in pairs)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_name_with_and_without_its_prefix_in_one_checkpoint_is_paired_with_the_same_name(swapped):
    one = stacks("model.", [0], 0)
    both = stacks("", [0], 1) | one
    ((before, after),), _ = match(both, one) if swapped else match(one, both)
    assert torch.equal(before.read(), after.read())


def test_a_stack_that_is_held_twice_under_other_names_is_refused_with_what_to_do():
    twice = stacks("student.", [0, 1], 0) | stacks("teacher.", [0, 1], 1)
    with pytest.raises(InputError, match=r"more than once \(student\..*, teacher\..*state_dict of that part"):
        match(stacks("", [0, 1], 0), twice)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_transposed_convolution_of_a_file_is_read_as_the_module_says(swapped):
    model = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(6, 6, 3), "out": torch.nn.Linear(5, 4)})
    sides = [model, model.state_dict()]
    pairs, _ = match(*(reversed(sides) if swapped else sides))
    expected = model["up"].weight.detach().transpose(0, 1).flatten(1)
    found = {before.name: (before.read(), after.read()) for before, after in pairs}
    assert all(torch.equal(matrix, expected) for matrix in found["up"])


def test_the_projection_of_the_original_clip_is_the_transpose_of_that_of_transformers():
    projection = torch.randn(4, 4)
    pairs, _ = match({"text_projection": projection}, {"text_projection.weight": projection.T.contiguous()})
    ((before, after),) = pairs
    assert torch.equal(before.read(), projection.T)
    assert torch.equal(before.read(), after.read())
