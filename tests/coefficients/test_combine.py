"""Arithmetic on coefficients is the arithmetic of the updates, and its result is an ordinary adapter."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import spectralbasis as sb
from spectralbasis.coefficients.combination import ties, trim
from tests.coefficients.folders import load_base, save_adapter, save_base, tokens

CORE = {"coefficients": "core"}
CASES = [
    ({}, "sum", None, (1, 1)),
    (CORE, "sum", (2, -0.5), (2, -0.5)),
    ({"coefficients": "band"}, "mean", None, (0.5, 0.5)),
    ({"coefficients": "block", "block_size": 3}, "mean", None, (0.5, 0.5)),
    ({"coefficients": "rotation", "block_size": 3}, "sum", (0.5, -2), (0.5, -2)),
    ({"scaling": "relative"}, "mean", (3, 1), (0.75, 0.25)),
    ({**CORE, "scaling": "relative"}, "difference", None, (1, -1)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("combine") / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """Saves an adapter without a head; gives its folder."""

    def save(name, seed=0, **config):
        save_adapter(tmp_path / name, base, "", seed=seed, **{"target_modules": ["query", "dense"], **config})
        return tmp_path / name

    return save


def updates(folder, base):
    """ΔW of every matrix that the adapter changes."""
    tuned, start = sb.open_checkpoint(folder), sb.open_checkpoint(base)
    return {name: tuned.read(name) - start.read(name) for name in tuned.edits}


@pytest.mark.parametrize(("config", "method", "weights", "factors"), CASES)
def test_updates_are_combined_exactly(adapter, base, tmp_path, config, method, weights, factors):
    folders = [adapter("a", 1, **config), adapter("b", 2, **config)]
    found = sb.combine(folders, weights, output=tmp_path / "out", method=method)
    one, two, combined = (updates(folder, base) for folder in (*folders, tmp_path / "out"))
    assert found.matrices == len(combined) == len(one)
    kind = config.get("coefficients", "band")
    assert found.coefficients == ("core" if kind == "rotation" else kind)
    for name, update in combined.items():
        assert float(update.norm()) > 0
        torch.testing.assert_close(update, factors[0] * one[name] + factors[1] * two[name], rtol=0, atol=1e-5)


def test_adapters_that_store_their_coefficients_differently_give_a_full_core(adapter, base, tmp_path):
    folders = [
        adapter("a", 1, coefficients="band"),
        adapter("b", 2, coefficients="core", scaling="normalized"),
        adapter("c", 3, coefficients="band", bandwidth=3),
        adapter("d", 4, coefficients="block"),
        adapter("e", 5, coefficients="rotation", scaling="relative"),
    ]
    assert sb.combine(folders, output=tmp_path / "out").coefficients == "core"
    found = [updates(folder, base) for folder in (*folders, tmp_path / "out")]
    for name, update in found[-1].items():
        torch.testing.assert_close(update, sum(one[name] for one in found[:-1]), rtol=0, atol=1e-5)


def test_one_adapter_is_scaled_and_an_adapter_less_itself_is_nothing(adapter, base, tmp_path):
    folder = adapter("a")
    sb.combine([folder], [0.5], output=tmp_path / "half")
    sb.combine([folder, folder], output=tmp_path / "nothing", method="difference")
    whole, half, nothing = (updates(one, base) for one in (folder, tmp_path / "half", tmp_path / "nothing"))
    for name, update in half.items():
        torch.testing.assert_close(update, 0.5 * whole[name], rtol=0, atol=1e-6)
        assert not nothing[name].any()


@torch.no_grad()
def test_the_result_loads_in_peft(adapter, base, tmp_path):
    sb.combine([adapter("a", 1), adapter("b", 2)], [1, 2], output=tmp_path / "out")
    combined = PeftModel.from_pretrained(load_base(base, ""), tmp_path / "out").eval()
    combined.load_adapter(str(tmp_path / "a"), "one")
    combined.load_adapter(str(tmp_path / "b"), "two")
    expected = combined(**tokens()).last_hidden_state
    combined.base_model.set_adapter("default")
    combined.add_weighted_adapter(["one", "two"], [1, 2], "total")
    combined.base_model.set_adapter("total")
    torch.testing.assert_close(combined(**tokens()).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_basis_file_goes_along(base, tmp_path):
    torch.manual_seed(0)
    sb.SpectralBasis.compute(base, leading=6).save(tmp_path / "basis.safetensors")
    for seed, name in enumerate("ab"):
        save_adapter(
            tmp_path / name, base, "", seed=seed, target_modules=["query"], basis=str(tmp_path / "basis.safetensors")
        )
    sb.combine([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    (tmp_path / "basis.safetensors").unlink()
    assert updates(tmp_path / "out", base)


HEADS = {"refuse": None, "first": (1, 0), "mean": (0.25, 0.75), "none": ()}


@pytest.mark.parametrize("heads", HEADS)
def test_heads_need_a_rule(base, tmp_path, heads):
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, base, seed=seed)
    folders = [tmp_path / "a", tmp_path / "b"]
    arguments = {"weights": [1, 3], "output": tmp_path / "out", "heads": heads}
    if heads == "refuse":
        with pytest.raises(sb.InputError, match=r"a has classifier\.(weight|bias).*heads='first', 'mean' or 'none'"):
            sb.combine(folders, **arguments)
        assert not (tmp_path / "out").exists()
        return
    sb.combine(folders, **arguments)
    a, b, out = (load_file(folder / "adapter_model.safetensors") for folder in (*folders, tmp_path / "out"))
    found = {name: tensor for name, tensor in out.items() if "classifier" in name}
    assert len(found) == (0 if heads == "none" else 2)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, HEADS[heads][0] * a[name] + HEADS[heads][1] * b[name])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["modules_to_save"] is None) == (heads == "none")
    assert PeftModel.from_pretrained(load_base(base), tmp_path / "out")(**tokens()).logits.isfinite().all()


def test_heads_of_other_sizes_have_no_mean(base, tmp_path):
    for labels in (2, 3):
        save_adapter(tmp_path / str(labels), base, labels=labels)
    with pytest.raises(sb.InputError, match="heads of different sizes"):
        sb.combine([tmp_path / "2", tmp_path / "3"], output=tmp_path / "out", heads="mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": "diagonal"}, "one trains band coefficients, the other diagonal"),
        ({"basis": "minor"}, "the basis pretrained, the other minor"),
        ({"leading": 5}, "different ranks"),
        ({"target_modules": ["query"]}, "different matrices"),
    ],
)
def test_adapters_of_another_kind_are_refused(adapter, tmp_path, change, message):
    folders = [adapter("a"), adapter("b", **change)]
    with pytest.raises(sb.InputError, match=message):
        sb.combine(folders, output=tmp_path / "out")


def test_another_base_or_other_directions_are_refused(adapter, base, tmp_path):
    a, b = adapter("a"), adapter("b")
    config = json.loads((b / "adapter_config.json").read_text())
    for field, message, value in (("probes", "different directions", [9.0] * 4), ("base_hashes", "bases differs", "0")):
        name = next(iter(config[field]))
        (b / "adapter_config.json").write_text(json.dumps({**config, field: {**config[field], name: value}}))
        with pytest.raises(sb.InputError, match=message):
            sb.combine([a, b], output=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "product"}, "method='product' is unknown"),
        ({"weights": [1]}, "must be one finite number for each of 2"),
        ({"weights": [1, float("nan")]}, "must be one finite number"),
        ({"weights": [1, -1], "method": "mean"}, "add up to 0"),
        ({"method": "ties", "density": 0}, "density must be above 0 and at most 1, got 0"),
        ({"heads": "last"}, "heads='last' is unknown"),
    ],
)
def test_wrong_settings_are_sentences(adapter, tmp_path, settings, message):
    folders = [adapter("a"), adapter("b", 1)]
    with pytest.raises(sb.InputError, match=message):
        sb.combine(folders, output=tmp_path / "out", **settings)


def test_counts_are_sentences(adapter, tmp_path):
    a = adapter("a")
    with pytest.raises(sb.InputError, match="nothing to combine"):
        sb.combine([], output=tmp_path / "out")
    with pytest.raises(sb.InputError, match="method='difference' needs two adapters, got 3"):
        sb.combine([a, a, a], output=tmp_path / "out", method="difference")
    sb.combine([a, a], output=tmp_path / "out")
    with pytest.raises(sb.InputError, match="not empty"):
        sb.combine([a, a], output=tmp_path / "out")


def test_ties_on_an_example_worked_by_hand():
    X = torch.tensor([[4.0, -1.0, 0.5, 3.0], [-1.0, -2.0, 0.1, 5.0], [-1.0, 3.0, 2.0, 0.2]])
    keep = torch.tensor([3, 3, 3])
    # Trimmed: [4 -1 0 3], [-1 -2 0 5], [-1 3 2 0]; sums [2 0 2 8]; agreeing: 4 | none | 2 | 3, 5.
    assert ties(X, torch.ones(3), keep=keep).tolist() == [4, 0, 2, 4]
    assert ties(X, torch.tensor([1.0, 5.0, 5.0]), keep=keep).tolist() == [-5, 15, 10, 14]


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 5), numbers=st.integers(1, 20), data=st.data())
def test_trimming_keeps_the_largest(tasks, numbers, data):
    values = st.floats(-10, 10, width=32)
    X = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=numbers, max_size=numbers), min_size=tasks, max_size=tasks))
    )
    keep = torch.tensor(data.draw(st.lists(st.integers(1, numbers), min_size=tasks, max_size=tasks)))
    kept = trim(X, keep)
    for row, numbers_of, count in zip(kept, X, keep.tolist(), strict=True):
        assert row.count_nonzero() <= count
        assert torch.equal(row[row != 0], numbers_of[row != 0])
        assert float(row.abs().sum()) == pytest.approx(
            float(numbers_of.abs().sort(descending=True).values[:count].sum()), rel=1e-5
        )


def test_density_counts_what_was_trained(adapter, base, tmp_path):
    folder = adapter("a")
    sb.combine([folder], output=tmp_path / "out", method="ties", density=0.25)
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "out"))
    total = sum(T.numel() for T in before.values())
    assert sum(int(T.count_nonzero()) for T in after.values()) == round(0.25 * total)


def with_basis_of(folder, basis):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"basis": basis}))


@pytest.mark.parametrize("named", ["{elsewhere}", "../elsewhere.safetensors", "x/../../elsewhere.safetensors"])
def test_a_basis_that_an_adapter_names_outside_of_its_folder_is_not_copied(base, tmp_path, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = sb.SpectralBasis.compute(base, leading=6).save(tmp_path / "elsewhere.safetensors")
    for name in "ab":
        save_adapter(tmp_path / name, base, "", target_modules=["query"])
        with_basis_of(tmp_path / name, named.format(elsewhere=elsewhere))
    sb.combine([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()} - {".spectralbasis"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(sb.InputError, match=r"no basis file at .*out"):
        updates(tmp_path / "out", base)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("basis.safetensors", "leads out of"),
        ("x/adapter_model.safetensors", "no basis"),
        ("adapter_config.json", "cannot be read"),
    ],
)
def test_what_is_no_basis_of_the_adapter_is_refused(base, tmp_path, named, message):
    (tmp_path / "secret").write_text("secret")
    for name in "ab":
        save_adapter(tmp_path / name, base, "", target_modules=["query"])
        with_basis_of(tmp_path / name, named)
        if named == "basis.safetensors":
            (tmp_path / name / named).symlink_to(tmp_path / "secret")
    with pytest.raises(sb.InputError, match=message):
        sb.combine([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
