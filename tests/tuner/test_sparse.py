"""Sparse coefficients through everything that an adapter can do, and how calibration picks them."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.tuner import SpectralConfig, SpectralLayer
from spectralbasis.tuner.calibration import calibrate, pick_entries
from spectralbasis.tuner.forms import unpack_positions
from tests.tuner.cases import CASES

BERT, GPT2, MLP = CASES["bert"], CASES["gpt2"], CASES["mlp, both layers"]
TARGETS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "init_weights": False}


def batches(seed=0, sizes=(3, 2)):
    draws = torch.Generator().manual_seed(seed)
    for rows in sizes:
        ids = torch.randint(1, 50, (rows, 7), generator=draws)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def calibrated(seed=0, base=None, **changes):
    options = {"coefficients": "sparse", "leading": 6, "budget": 0.004, **TARGETS, **changes}
    return calibrate(base or BERT.base(), batches(seed), SpectralConfig(**options))


def adapted(**changes):
    torch.manual_seed(1)
    return get_peft_model(BERT.base(), calibrated(**changes)).eval()


def dense_gradients(base, names):
    """∂L/∂W over all rows by autograd."""
    base.requires_grad_(True)
    for batch in batches():
        (base(**batch).loss * len(batch["labels"])).backward()
    modules = dict(base.named_modules())
    return {name: modules[name].weight.grad / 5 for name in names}


@pytest.fixture(scope="module")
def model():
    return adapted()


def test_the_entries_are_the_largest_of_the_dense_gradient():
    base = BERT.base()
    config = calibrated()
    total = sum(parameter.numel() for parameter in base.parameters())
    keys = [key for key in dict(base.named_modules()) if key.endswith(("query", "value", "dense"))]
    cores = {}
    for name, G in dense_gradients(base, keys).items():
        U, _, Vh = torch.linalg.svd(base.get_submodule(name).weight.detach())
        cores[name.removeprefix("bert.")] = (U[:, :6].T @ G @ Vh[:6].T).abs()
    count = int(0.004 * total)
    threshold = torch.cat([core.flatten() for core in cores.values()]).sort(descending=True).values[count - 1]
    for name, core in cores.items():
        expected = (core.flatten() >= threshold * (1 - 1e-4)).nonzero().squeeze(1)
        found = unpack_positions(config.entries[name], 6) if name in config.entries else torch.tensor([])
        assert found.tolist() == expected.tolist()
    assert sum(len(text.split()) for text in config.entries.values()) == count


def test_calibration_leaves_the_model_as_it_was():
    base = BERT.base().train()
    base.bert.embeddings.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    calibrated(base=base)
    assert base.training
    assert flags == {name: p.requires_grad for name, p in base.named_parameters()}
    assert all(p.grad is None for p in base.parameters())
    assert not any(module._forward_hooks for module in base.modules())


def test_a_frozen_base_gives_the_same_entries():
    assert calibrated(base=BERT.base().requires_grad_(False)).entries == calibrated().entries


def test_without_a_budget_as_many_as_a_diagonal():
    config = calibrated(budget=None, leading=3)
    modules = sum(key.endswith(("query", "value", "dense")) for key, _ in BERT.base().named_modules())
    assert sum(len(text.split()) for text in config.entries.values()) == 3 * modules


def test_rank_pattern_limits_the_window():
    config = calibrated(rank_pattern={"query": 2}, budget=0.01)
    assert {k for name, k in config.ranks.items() if name.endswith("query")} == {2}
    assert {k for name, k in config.ranks.items() if name.endswith("value")} == {6}


@pytest.mark.parametrize(("leading", "window"), [(3, 3), (0.25, 8)])
def test_leading_limits_the_window(leading, window):
    config = calibrated(leading=leading, target_modules=["query"])
    assert set(config.ranks.values()) == {window}


@pytest.mark.parametrize("rule", ["mp", "gd"])
def test_rules_limit_the_window_of_each_matrix(rule):
    config = calibrated(leading=rule)
    diagonal = get_peft_model(BERT.base(), SpectralConfig(**TARGETS, leading=rule)).peft_config["default"]
    assert config.ranks.items() <= diagonal.ranks.items()


def test_what_is_retrained_takes_no_entries():
    options = {"target_modules": ["query", "classifier"], "budget": 0.001, "leading": 2}
    assert "classifier" in calibrated(**options).entries
    assert "classifier" not in calibrated(**options, modules_to_save=["classifier"]).entries


def test_matrices_without_entries_are_left_out():
    config = calibrated(budget=1e-4)
    assert len(config.entries) == 1
    model = get_peft_model(BERT.base(), config)
    assert sum(isinstance(module, SpectralLayer) for module in model.modules()) == 1


def test_a_loss_function_in_place_of_labels():
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches()]
    labels = iter([batch["labels"] for batch in batches()])

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(**batch).logits, next(labels))

    options = {"coefficients": "sparse", "leading": 6, "budget": 0.004, **TARGETS}
    assert calibrate(BERT.base(), unlabelled, SpectralConfig(**options), loss=loss).entries == calibrated().entries


def test_ties_and_zeros():
    gradients = {"a": torch.tensor([[0.0, -3.0], [1.0, 0.0]]), "b": torch.tensor([[2.0]]), "c": torch.zeros(1, 1)}
    picked = pick_entries(gradients, 2)
    assert {name: found.tolist() for name, found in picked.items()} == {"a": [1], "b": [0]}
    assert {name: found.tolist() for name, found in pick_entries(gradients, 99).items()} == {"a": [1, 2], "b": [0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficients": "core", "budget": None}, "coefficients='core' need no calibration"),
        ({"budget": 1e-9}, "is less than one entry; pass budget>="),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        calibrated(**changes)


@pytest.mark.parametrize(
    ("found", "message"),
    [([], "no batch"), ([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], "gave no loss for a batch of input_ids")],
)
def test_batches_that_say_nothing(found, message):
    with pytest.raises(InputError, match=message):
        calibrate(BERT.base(), found, SpectralConfig(coefficients="sparse", **TARGETS))


def test_an_uncalibrated_config_says_what_to_do():
    with pytest.raises(InputError, match=r"spectralbasis\.calibrate"):
        get_peft_model(BERT.base(), SpectralConfig(coefficients="sparse", **TARGETS))


def test_another_base_is_refused():
    other = BERT.base()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.value.weight[0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match="has hash"):
        get_peft_model(other, calibrated())


def test_the_update_is_u_c_v_at_the_entries():
    model = adapted(scaling="absolute")
    expected, count = BERT.base(), 0
    for key, layer in model.base_model.model.named_modules():
        if isinstance(layer, SpectralLayer):
            stored = layer.stored("default").detach()
            name, k = key.removeprefix("bert."), 6
            C = torch.zeros(k * k)
            C[unpack_positions(model.peft_config["default"].entries[name], k)] = stored
            U, V = layer.factors("default").first(k)
            expected.get_submodule(key).weight.data += U @ C.reshape(k, k) @ V.T
            count += stored.numel()
    torch.testing.assert_close(BERT.output(model), BERT.output(expected), atol=1e-5, rtol=1e-4)
    assert model.base_model.allocation().trained == count


def test_merging(model):
    expected = BERT.output(model)
    model.merge_adapter()
    torch.testing.assert_close(BERT.output(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(BERT.output(model), expected)


@pytest.mark.parametrize("scaling", ["absolute", "relative", "normalized"])
def test_saved_loaded_and_read_as_a_checkpoint(scaling, tmp_path):
    model = adapted(scaling=scaling)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.base(), tmp_path)
    assert loaded.peft_config["default"].entries == model.peft_config["default"].entries
    assert torch.equal(BERT.output(loaded), BERT.output(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.ndim == 1 for name, tensor in tensors.items() if "spectral" in name)
    checkpoint = open_checkpoint(tmp_path, base=BERT.base())
    for name, merged in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(checkpoint.read(name), merged.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [0.004, 0.02])
def test_the_default_unit_counts_the_entries_that_meet_in_a_direction(budget):
    config = adapted(budget=budget, scaling="normalized").peft_config["default"]
    entries = sum(len(text.split()) for text in config.entries.values())
    fan_in = entries / sum(config.ranks.values())
    for unit in config.scales.values():
        assert unit == pytest.approx([min(1.0, fan_in**-0.5)])


def test_loaded_under_another_prefix(model, tmp_path):
    model.save_pretrained(tmp_path)
    bare = PeftModel.from_pretrained(BERT.base().bert, tmp_path)
    inner = {key: value for key, value in model.state_dict().items() if "spectral_coefficients" in key}
    found = {key: value for key, value in bare.state_dict().items() if "spectral_coefficients" in key}
    assert [value.tolist() for value in found.values()] == [value.tolist() for value in inner.values()]


def test_damaged_entries_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for entries in (None, {}, dict.fromkeys(saved["entries"], "0 9999"), dict.fromkeys(saved["entries"], "0")):
        path.write_text(json.dumps(saved | {"entries": entries}))
        with pytest.raises(InputError, match=r"restore adapter_config\.json|belong to different adapters"):
            open_checkpoint(tmp_path, base=BERT.base())


@torch.no_grad()
def test_mixed_batches_and_weighted_sums_of_other_entries():
    model = adapted(task_type=None)
    model.add_adapter("other", calibrated(seed=5, task_type=None))
    model.add_adapter("band", SpectralConfig(**TARGETS | {"task_type": None}, coefficients="band", leading=4))
    model.base_model.add_weighted_adapter(["default", "other"], [2.0, -1.0], "sum")
    first, second = (model.peft_config[name].entries for name in ("default", "other"))
    assert first != second
    for layer in model.modules():
        if isinstance(layer, SpectralLayer) and "sum" in layer.spectral_coefficients:
            terms = {"default": 2.0, "other": -1.0}
            found = [w * layer.get_delta_weight(n) for n, w in terms.items() if n in layer.spectral_coefficients]
            torch.testing.assert_close(layer.get_delta_weight("sum"), sum(found))
    names = ["default", "sum", "band"]
    mixed = BERT.output(model.eval(), adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], BERT.output(model)[row], atol=1e-5, rtol=1e-4)


def test_sparse_adapters_of_other_windows_are_not_added():
    model = adapted(task_type=None)
    model.add_adapter("other", calibrated(leading=5, task_type=None))
    with pytest.raises(InputError, match="differ in ranks"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_transposed_layers():
    ids = GPT2.inputs["input_ids"]
    config = SpectralConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], coefficients="sparse",
                            leading=8, init_weights=False)  # fmt: skip
    base = GPT2.base()
    config = calibrate(base, [{"input_ids": ids, "labels": ids}], config)
    base.requires_grad_(True)(input_ids=ids, labels=ids).loss.backward()
    name = next(iter(config.entries))
    W = base.transformer.get_submodule(name).weight
    U, _, Vh = torch.linalg.svd(W.detach().T)
    core = (U[:, :8].T @ W.grad.T @ Vh[:8].T).abs().flatten()
    chosen = unpack_positions(config.entries[name], 8)
    assert core[chosen].min() > torch.cat([core[[i]] for i in range(64) if i not in chosen.tolist()]).max()


def test_training_moves_the_entries_alone():
    model = adapted(init_weights=True)
    batch = next(batches())
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "spectral_" in n], lr=1.0)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss.item() < before.item()
