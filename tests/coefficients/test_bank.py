"""A bank gives every row of a batch exactly what the adapter of its task gives it alone."""

import threading

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

import spectralbasis as sb
from tests.coefficients.folders import load_base, save_adapter, save_base, tokens

CLOSE = {"rtol": 0, "atol": 2e-5}
KINDS = {
    "diagonal": ("bert", "classifier", {}),
    "core": ("bert", "classifier", {"coefficients": "core"}),
    "band": ("bert", "classifier", {"coefficients": "band", "bandwidth": 2}),
    "block": ("bert", "classifier", {"coefficients": "block", "block_size": 3}),
    "rotation": ("bert", "classifier", {"coefficients": "rotation", "block_size": 3}),
    "relative": ("bert", "classifier", {"scaling": "relative"}),
    "several ranks": ("bert", "classifier", {"rank_pattern": {"query": 3, "output.dense": 9}}),
    "random": ("bert", "classifier", {"basis": "random"}),
    "two layers of a head": (
        "distilbert",
        "classifier",
        {"target_modules": ["q_lin", "lin1"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "a head on every token": ("llama", "classifier", {}),
    "no head, Conv1D": ("gpt2", "causal", {"target_modules": ["c_attn", "c_proj"], "coefficients": "core"}),
    "no head": ("llama", "causal", {}),
}


def alone(base, folder, head="classifier"):
    """Logits of one adapter through PEFT."""
    model = PeftModel.from_pretrained(load_base(base, head), folder).eval()
    with torch.no_grad():
        return model(**tokens()).logits


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A base with three adapters a, b and c: the folder of each."""
    folder = tmp_path_factory.mktemp("bert")
    base = save_base(folder / "base")
    for seed, name in enumerate("abc"):
        save_adapter(folder / name, base, seed=seed)
    return {"base": base} | {name: folder / name for name in "abc"}


def bank_of(folders, names="abc", **options):
    return sb.CoefficientBank.from_adapters(
        load_base(folders["base"]), {name: folders[name] for name in names}, **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_gets_its_task(tmp_path, kind):
    model_type, head, config = KINDS[kind]
    base = save_base(tmp_path / "base", model_type, head)
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, base, head, seed=seed, **config)
    bank = sb.CoefficientBank.from_adapters(load_base(base, head), {name: tmp_path / name for name in "ab"})
    tasks = ["a", "b", "b", "a", "b"]
    logits = bank(**tokens(), tasks=tasks).logits
    expected = {name: alone(base, tmp_path / name, head) for name in "ab"}
    for row, name in enumerate(tasks):
        torch.testing.assert_close(logits[row], expected[name][row], **CLOSE)
    assert (expected["a"] - expected["b"]).abs().max() > 0.05


@pytest.mark.parametrize("config", [{}, {"coefficients": "core", "scaling": "relative"}])
def test_tall_and_wide_matrices(tmp_path, config):
    base = save_base(tmp_path / "base", intermediate_size=96)
    save_adapter(tmp_path / "a", base, **config)
    bank = sb.CoefficientBank.from_adapters(load_base(base), {"a": tmp_path / "a"})
    assert sum(len(module._forward_pre_hooks) for module in bank.model.modules()) == 2
    expected = alone(base, tmp_path / "a")
    torch.testing.assert_close(bank(**tokens(), tasks=["a"] * 5).logits, expected, **CLOSE)
    assert (expected - load_base(base)(**tokens()).logits).abs().max() > 0.05


def test_tasks_of_different_label_counts_share_a_batch(tmp_path):
    base = save_base(tmp_path / "base")
    counts = {"two": 2, "one": 1, "five": 5}
    for seed, (name, labels) in enumerate(counts.items()):
        save_adapter(tmp_path / name, base, seed=seed, labels=labels)
    bank = sb.CoefficientBank.from_adapters(load_base(base), {name: tmp_path / name for name in counts})
    logits = bank(**tokens(3), tasks=list(counts)).logits
    assert logits.shape == (3, 5)
    for row, (name, labels) in enumerate(counts.items()):
        model = PeftModel.from_pretrained(load_base(base, labels=labels), tmp_path / name).eval()
        expected = model(**tokens(3)).logits[row]
        torch.testing.assert_close(logits[row, :labels], expected, **CLOSE)
        assert bool((logits[row, labels:] == -torch.inf).all())
        assert bank.labels(name) == {"classifier": labels}
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(3))
    save_adapter(tmp_path / "seven", base, labels=7)
    with pytest.raises(sb.InputError, match="7 labels in classifier, but the bank holds at most 5"):
        bank.add("seven", tmp_path / "seven")
    sb.CoefficientBank.from_adapters(load_base(base), {"two": tmp_path / "two"}, labels=7).add(
        "seven", tmp_path / "seven"
    )


def test_outside_of_the_bank_the_model_is_what_it_was(bert):
    model = load_base(bert["base"])
    before = model(**tokens()).logits
    bank = sb.CoefficientBank.from_adapters(model, {"a": bert["a"]})
    assert not torch.equal(bank(**tokens(), tasks=["a"] * 5).logits, before)
    assert torch.equal(model(**tokens()).logits, before)
    with pytest.raises(RuntimeError), bank.serving(["a"] * 5):
        raise RuntimeError
    assert torch.equal(model(**tokens()).logits, before)
    bank.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_tasks_come_and_go_and_their_room_is_used_again(bert):
    bank = bank_of(bert, "ab")
    room, size = len(bank._rows), bank.nbytes
    first = bank(**tokens(1), tasks=["a"]).logits
    bank.remove("a")
    assert bank.tasks == ("b",)
    with pytest.raises(sb.InputError, match="no task 'a' among its 1"):
        bank(**tokens(1), tasks=["a"])
    bank.add("c", bert["c"])
    assert (len(bank), len(bank._rows), bank.nbytes) == (2, room, size)
    torch.testing.assert_close(bank(**tokens(5), tasks=["c"] * 5).logits, alone(bert["base"], bert["c"]), **CLOSE)
    bank.add("a", bert["a"])
    assert len(bank) == 3
    assert "a" in bank
    assert torch.equal(bank(**tokens(1), tasks=["a"]).logits, first)
    bank.add("a", bert["b"])
    assert len(bank) == 3
    assert torch.equal(bank(**tokens(1), tasks=["a"]).logits, bank(**tokens(1), tasks=["b"]).logits)


def test_tensors_of_a_model_in_memory_are_added_without_a_folder(bert, tmp_path):
    trained = save_adapter(tmp_path / "d", bert["base"], seed=9)
    bank = bank_of(bert, "a")
    bank.add("d", get_peft_model_state_dict(trained))
    torch.testing.assert_close(bank(**tokens(), tasks=["d"] * 5).logits, trained(**tokens()).logits, **CLOSE)


def test_a_bank_outgrows_its_first_rows_without_moving_them(bert):
    bank = bank_of(bert, "a")
    first = bank._rows._chunks[0]
    state = _tensors(bert["a"])
    for number in range(600):
        bank.add(f"t{number}", {name: T * number / 600 for name, T in state.items()})
    assert bank._rows._chunks[0] is first
    assert len(bank._rows._chunks) > 2
    chosen = [0, 1, 255, 256, 599]
    logits = bank(**tokens(), tasks=[f"t{number}" for number in chosen]).logits
    for row, number in enumerate(chosen):
        single = bank_of(bert, "a")
        single.add("only", {name: T * number / 600 for name, T in state.items()})
        torch.testing.assert_close(logits[row], single(**tokens(), tasks=["only"] * 5).logits[row], **CLOSE)


def test_an_adapter_of_fewer_matrices_leaves_the_others_as_they_are(bert, tmp_path):
    save_adapter(tmp_path / "few", bert["base"], seed=7, target_modules=["query"])
    bank = bank_of(bert, "a")
    bank.add("few", tmp_path / "few")
    torch.testing.assert_close(
        bank(**tokens(), tasks=["few"] * 5).logits, alone(bert["base"], tmp_path / "few"), **CLOSE
    )


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_numbers_in_16_bits_take_half_the_room(bert, dtype, error):
    exact, rounded = bank_of(bert), bank_of(bert, dtype=dtype)
    assert 2 * rounded.nbytes == exact.nbytes
    tasks = list("abcab")
    expected = exact(**tokens(), tasks=tasks).logits
    found = rounded(**tokens(), tasks=tasks).logits
    assert 0 < (found - expected).abs().max() < error * expected.abs().max()


def test_a_model_in_bfloat16(tmp_path):
    base = save_base(tmp_path / "base", dtype="bfloat16")
    model = load_base(base).bfloat16()
    save_adapter(tmp_path / "a", base)
    bank = sb.CoefficientBank.from_adapters(model, {"a": tmp_path / "a"})
    logits = bank(**tokens(), tasks=["a"] * 5).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), alone(base, tmp_path / "a").float(), atol=0.1, rtol=0.05)


def test_autocast(bert):
    bank = bank_of(bert)
    expected = bank(**tokens(), tasks=list("abcab")).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = bank(**tokens(), tasks=list("abcab")).logits
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


def test_generation(tmp_path):
    base = save_base(tmp_path / "base", "llama", "causal")
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, base, "causal", seed=seed)
    bank = sb.CoefficientBank.from_adapters(load_base(base, "causal"), {n: tmp_path / n for n in "ab"})
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with bank.serving(["a", "b", "a"]):
        found = bank.model.generate(**tokens(3), **options)
    for row, name in enumerate("aba"):
        single = PeftModel.from_pretrained(load_base(base, "causal"), tmp_path / name).eval()
        assert torch.equal(found[row], single.generate(**tokens(3), **options)[row])


def test_threads_serve_while_others_add_and_remove(bert):
    bank = bank_of(bert)
    expected = {name: bank(**tokens(), tasks=[name] * 5).logits for name in "abc"}
    wrong, stop = [], threading.Event()

    def serve(tasks):
        while not stop.is_set():
            logits = bank(**tokens(), tasks=tasks).logits
            wrong.extend(
                row for row, name in enumerate(tasks) if not torch.allclose(logits[row], expected[name][row], atol=1e-5)
            )

    threads = [threading.Thread(target=serve, args=(list(tasks),)) for tasks in ("abcab", "ccbaa")]
    for thread in threads:
        thread.start()
    for number in range(300):
        bank.add(f"extra{number}", bert["c"]) if number % 50 == 0 else bank.add("c", bert["c"])
        if number % 50 == 49:
            bank.remove(f"extra{number - 49}")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert bank.tasks == ("a", "b", "c")


def test_what_cannot_be_served_is_a_sentence(bert, tmp_path):
    bank = bank_of(bert)
    with pytest.raises(sb.InputError, match="5 rows but 2 tasks"):
        bank(**tokens(), tasks=["a", "b"])
    with pytest.raises(sb.InputError, match="leave labels out"):
        bank(**tokens(), tasks=["a"] * 5, labels=torch.zeros(5))
    bank.model.train()
    with pytest.raises(sb.InputError, match="training mode"):
        bank(**tokens(), tasks=["a"] * 5)
    bank.model.eval()
    with pytest.raises(sb.InputError, match="has no task 'z'"):
        bank.remove("z")
    with pytest.raises(sb.InputError, match="pass one or more"):
        bank_of(bert, "")
    with pytest.raises(sb.InputError, match=r"got torch\.int8"):
        bank_of(bert, dtype=torch.int8)
    with pytest.raises(sb.InputError, match="not finite"):
        bank.add("nan", {n: T * torch.nan for n, T in _tensors(bert["a"]).items()})
    with pytest.raises(sb.InputError, match="has no head classifier"):
        bank.add("headless", {n: T for n, T in _tensors(bert["a"]).items() if "spectral" in n})
    adapted = PeftModel.from_pretrained(load_base(bert["base"]), bert["a"])
    with pytest.raises(sb.InputError, match="plain base"):
        sb.CoefficientBank.from_adapters(adapted, {"a": bert["a"]})


def _tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": "diagonal"}, "one trains band coefficients, the other diagonal"),
        ({"basis": "minor"}, "the basis pretrained, the other minor"),
        ({"leading": 5}, "they train different ranks of"),
        ({"scaling": "relative"}, "scaling='normalized', the other 'relative'"),
        ({"bias": "all"}, "a bank serves only linear heads|which other tasks of the bank do not"),
        ({"modules_to_save": ["pooler"], "target_modules": ["query"]}, "which other tasks of the bank do not"),
    ],
)
def test_adapters_of_another_kind_are_refused(bert, tmp_path, change, message):
    save_adapter(tmp_path / "other", bert["base"], **change)
    with pytest.raises(sb.InputError, match=message):
        bank_of(bert).add("other", tmp_path / "other")


def test_heads_that_are_not_linear_are_refused(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "norms", base, target_modules=["query"], modules_to_save=["LayerNorm"])
    with pytest.raises(sb.InputError, match="a bank serves only linear heads"):
        sb.CoefficientBank.from_adapters(load_base(base), {"norms": tmp_path / "norms"})


def test_another_base_is_refused(bert, tmp_path):
    model = load_base(bert["base"])
    model.bert.encoder.layer[1].output.dense.weight.data += 1e-3
    with pytest.raises(sb.BaseMismatchError):
        sb.CoefficientBank.from_adapters(model, {"a": bert["a"]})
