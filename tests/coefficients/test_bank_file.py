"""A bank is one file, mapped when it is opened, whole or absent when it is written, and never trusted."""

import json

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

import spectralbasis as sb
from spectralbasis.coefficients.bank_file import read_bank
from tests.coefficients.folders import load_base, save_adapter, save_base, tokens
from tests.damage import data_start, flipped


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapters(base):
    """The folder of an adapter by the name of its task; the number of labels differs."""
    folders = {name: base.parent / f"adapter{seed}" for seed, name in enumerate(("a", "b", "ü/c"))}
    for seed, folder in enumerate(folders.values()):
        save_adapter(folder, base, seed=seed, labels=2 + seed)
    return folders


@pytest.fixture
def bank(base, adapters):
    return sb.CoefficientBank.from_adapters(load_base(base), adapters)


@pytest.fixture(scope="module")
def saved(base, adapters):
    """The bytes of the bank's file."""
    file = base.parent / "bank.safetensors"
    sb.CoefficientBank.from_adapters(load_base(base), adapters).save(file)
    return file.read_bytes()


@pytest.fixture
def file(saved, tmp_path):
    """The bank's file, for this test to change."""
    path = tmp_path / "bank.safetensors"
    path.write_bytes(saved)
    return path


def logits(bank, tasks):
    return bank(**tokens(len(tasks)), tasks=tasks).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_opened_bank_is_the_one_that_was_saved(base, adapters, tmp_path, dtype):
    kept = sb.CoefficientBank.from_adapters(load_base(base), {name: adapters[name] for name in ("a", "b")}, dtype=dtype)
    kept.save(tmp_path / "bank.safetensors")
    opened = sb.CoefficientBank.open(tmp_path / "bank.safetensors", load_base(base))
    assert opened.tasks == kept.tasks
    assert opened.nbytes == kept.nbytes
    assert torch.equal(logits(opened, ["b", "a"]), logits(kept, ["b", "a"]))


@pytest.mark.parametrize(
    "config", [{"coefficients": "band"}, {"coefficients": "rotation"}, {"coefficients": "core", "scaling": "relative"}]
)
def test_the_record_of_every_kind_is_in_the_file(base, tmp_path, config):
    save_adapter(tmp_path / "one", base, **config)
    kept = sb.CoefficientBank.from_adapters(load_base(base), {"one": tmp_path / "one"})
    kept.save(tmp_path / "bank.safetensors")
    opened = sb.CoefficientBank.open(tmp_path / "bank.safetensors", load_base(base))
    assert torch.equal(logits(opened, ["one"]), logits(kept, ["one"]))
    opened.add("two", tmp_path / "one")
    assert torch.equal(logits(opened, ["two"]), logits(kept, ["one"]))


def test_the_file_holds_the_numbers_and_little_else(bank, tmp_path):
    bank.save(tmp_path / "bank.safetensors")
    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        assert file.get_tensor("numbers").shape == (3, bank.layout.width)
        assert json.loads(file.metadata()["tasks"]) == ["a", "b", "ü/c"]
        assert file.metadata()["spectralbasis"] == sb.__version__
        record = json.loads(file.metadata()["config"])
        header = sum(len(text.encode()) for text in file.metadata().values())
    assert record["base_hashes"] == bank.layout.config.base_hashes
    assert bank.nbytes <= (tmp_path / "bank.safetensors").stat().st_size <= bank.nbytes + 2 * header + 500


def test_an_opened_bank_changes_and_is_saved_over_itself(bank, base, adapters, tmp_path):
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    opened = sb.CoefficientBank.open(file, load_base(base))
    opened.remove("b")
    opened.add("new", adapters["b"])
    opened.add("more", adapters["ü/c"])
    expected = logits(opened, ["new", "more", "a"])
    untouched = sb.CoefficientBank.open(file, load_base(base))
    assert untouched.tasks == ("a", "b", "ü/c")
    opened.save(file)
    assert torch.equal(logits(opened, ["new", "more", "a"]), expected)
    again = sb.CoefficientBank.open(file, load_base(base))
    assert again.tasks == ("a", "ü/c", "new", "more")
    assert torch.equal(logits(again, ["new", "more", "a"]), expected)
    assert torch.equal(logits(untouched, ["b", "a"]), logits(bank, ["b", "a"]))


def test_a_bank_without_tasks_is_kept_too(bank, base, adapters, tmp_path):
    for task in bank.tasks:
        bank.remove(task)
    bank.save(tmp_path / "bank.safetensors")
    opened = sb.CoefficientBank.open(tmp_path / "bank.safetensors", load_base(base))
    opened.add("a", adapters["a"])
    bank.add("a", adapters["a"])
    assert torch.equal(logits(opened, ["a"]), logits(bank, ["a"]))


def test_saving_that_fails_leaves_the_old_file(bank, tmp_path, monkeypatch):
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    before = file.read_bytes()
    bank.remove("a")
    monkeypatch.setattr(type(bank._rows), "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.save(file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".bank*"))


def test_another_base_is_refused(bank, base, tmp_path):
    bank.save(tmp_path / "bank.safetensors")
    model = load_base(base)
    model.bert.encoder.layer[0].attention.self.key.weight.data *= 1.001
    with pytest.raises(sb.BaseMismatchError):
        sb.CoefficientBank.open(tmp_path / "bank.safetensors", model)


def _rewritten(content, **changes):
    """The file with other metadata; None takes a field away."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, value in changes.items():
        header["__metadata__"].pop(name)
        if value is not None:
            header["__metadata__"][name] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    "damage",
    {
        "cut short": lambda content: content[:-10],
        "empty": lambda content: b"",
        "no bank": lambda content: _rewritten(content, bank=None),
        "another version": lambda content: _rewritten(content, bank="0"),
        "no config": lambda content: _rewritten(content, config=None),
        "a config of nothing": lambda content: _rewritten(content, config="{}"),
        "a config of another type": lambda content: _rewritten(content, config="[1]"),
        "no tasks": lambda content: _rewritten(content, tasks=None),
        "one task too many": lambda content: _rewritten(content, tasks='["a", "b", "c", "d"]'),
        "one name twice": lambda content: _rewritten(content, tasks='["a", "b", "b"]'),
        "names that are none": lambda content: _rewritten(content, tasks="[1, 2, 3]"),
        "heads of another size": lambda content: _rewritten(content, heads='{"classifier": [9, 32]}'),
        "heads that are none": lambda content: _rewritten(content, heads='{"classifier": 3}'),
        "heads below zero": lambda content: _rewritten(content, heads='{"classifier": [-4, -32]}'),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_a_damaged_file_is_a_sentence(file, base, damage):
    file.write_bytes(damage[1](file.read_bytes()))
    with pytest.raises(sb.InputError, match="bank"):
        sb.CoefficientBank.open(file, load_base(base))


def test_a_file_with_a_turned_bit_is_a_sentence(file):
    content, start = file.read_bytes(), data_start(file)
    for damaged in [
        *flipped(content, 60, 1, start),
        *(head + content[start:] for head in flipped(content[:start], 60)),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(sb.InputError, match="bank"):
            read_bank(file)


def test_a_file_of_another_version_or_without_a_checksum_is_refused(file, base):
    content = file.read_bytes()
    for changes, said in (({"bank": "1"}, "not a bank of version 4"), ({"checksum": None}, "lacks its checksum")):
        file.write_bytes(_rewritten(content, **changes))
        with pytest.raises(sb.InputError, match=said):
            sb.CoefficientBank.open(file, load_base(base))


def _forged(file, **changes):
    """Change the metadata of a bank as whoever forges one would: with a right checksum."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rows = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header["__metadata__"]
    for name, change in changes.items():
        value = json.loads(metadata[name])
        metadata[name] = json.dumps(change(value))
    digest = xxhash.xxh3_128(json.dumps([metadata[name] for name in ("config", "heads", "tasks")]).encode())
    digest.update(rows)
    metadata["checksum"] = digest.hexdigest()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rows)


def _config(**fields):
    return {"config": lambda config: {**config, **fields}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (_config(basis="/etc/passwd"), "basis is '/etc/passwd', expected 'pretrained', 'minor', 'random' or 'file'"),
        (_config(basis="file"), r"needs the basis file bank.basis.safetensors beside it"),
        (_config(rank_pattern={"(a+)+b": 2}), "rank_pattern is not known"),
        (_config(target_modules=["q"]), "target_modules is not known"),
        (_config(scaling="x"), "scaling is 'x', expected"),
        (_config(base_hashes=None), "base_hashes is None, expected an object"),
        (_config(bandwidth=-1), "bandwidth is -1, expected at least 0"),
        (_config(tolerance=float("nan")), "tolerance is nan, expected a finite number"),
        ({"config": lambda c: {**c, "ranks": dict.fromkeys(c["ranks"], 10**9)}}, "expected at most 65536"),
        ({"config": lambda c: {**c, "ranks": dict.fromkeys(c["ranks"], 60_000)}}, "expected 3 tasks of"),
        ({"heads": lambda _: {"classifier": [10**12, 10**12]}}, "expected 3 tasks of"),
        ({"heads": lambda _: {"classifier": [-1, 3]}}, r"classifier\[0\] is -1, expected at least 1"),
        ({"heads": lambda _: {"classifier": [float("inf"), 3]}}, r"classifier\[0\] is inf, expected a valid integer"),
        ({"heads": lambda _: ["classifier"]}, "expected an object"),
        ({"tasks": lambda _: ["a", "b", "b"]}, "has the task 'b' twice"),
        ({"tasks": lambda _: {"a": 1}}, "expected a list"),
    ],
)
def test_what_no_bank_says_is_refused_in_a_sentence_before_anything_is_made_of_it(file, changes, said):
    _forged(file, **changes)
    with pytest.raises(sb.InputError, match=said):
        read_bank(file)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, float("nan"), "not finite among the coefficients of"),
        (0, -float("inf"), "not finite among the coefficients of"),
        (-4, -float("inf"), "no label, a gap between labels"),
        (-3, -float("inf"), "no label, a gap between labels"),
        (-1, float("inf"), "among the bias of classifier"),
    ],
)
def test_rows_that_no_adapter_gives_are_refused(file, place, value, said):
    content = file.read_bytes()
    rows = load_file(file)["numbers"].clone()
    rows[2, place] = value
    file.write_bytes(content[: -rows.numel() * 4] + rows.numpy().tobytes())
    _forged(file)
    with pytest.raises(sb.InputError, match=f"the task 'ü/c' of the bank .* {said}"):
        read_bank(file)


def test_a_basis_file_goes_with_the_bank_and_is_found_nowhere_else(base, tmp_path):
    basis = sb.SpectralBasis.compute(base, leading=4).save(tmp_path / "elsewhere.safetensors")
    save_adapter(tmp_path / "one", base, basis=str(basis), leading=4)
    kept = sb.CoefficientBank.from_adapters(load_base(base), {"one": tmp_path / "one"})
    kept.save(tmp_path / "moved" / "bank.safetensors")
    basis.unlink()
    opened = sb.CoefficientBank.open(tmp_path / "moved" / "bank.safetensors", load_base(base))
    assert torch.equal(logits(opened, ["one"]), logits(kept, ["one"]))
    opened.save(tmp_path / "moved" / "bank.safetensors")
    (tmp_path / "moved" / "bank.basis.safetensors").unlink()
    with pytest.raises(sb.InputError, match=r"needs the basis file bank\.basis\.safetensors beside it"):
        read_bank(tmp_path / "moved" / "bank.safetensors")


def test_a_file_that_is_not_there_is_a_sentence(base, tmp_path):
    with pytest.raises(sb.InputError, match="cannot be read as a bank"):
        sb.CoefficientBank.open(tmp_path / "none.safetensors", load_base(base))
