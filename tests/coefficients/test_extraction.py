"""`extract`: an adapter that turns a base into a checkpoint that was finetuned from it."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast
from typer.testing import CliRunner

import spectralbasis as sb
from spectralbasis import InputError
from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.cli import app
from spectralbasis.coefficients import decomposing, extraction
from spectralbasis.coefficients.decomposing import intruder_directions, without_directions
from spectralbasis.coefficients.extraction import share_out
from spectralbasis.linalg import row_blocks
from tests.coefficients.folders import AUTO_MODELS, tokens
from tests.matrices import orthonormal, power_law, with_spectrum
from tests.models import tiny

PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
LAYOUTS = {
    "a new head": ("bert", "", "classifier", {"num_labels": 3}),
    "a head of several layers": ("roberta", "", "classifier", {}),
    "a head whose name ends another's": ("distilbert", "", "classifier", {}),
    "a table that is read without its layer": ("deberta-v2", "", "classifier", {}),
    "Conv1D and a tied table": ("gpt2", "causal", "causal", {}),
    "untied": ("llama", "causal", "causal", {}),
    "tied": ("llama", "causal", "causal", {"tie_word_embeddings": True}),
    "fused": ("phi3", "causal", "causal", {}),
    "fused by heads": ("gpt_neox", "causal", "causal", {}),
    "convolutions": ("resnet", "", "", {}),
}
LEFT_OUT = {
    "experts": ("mixtral", "causal", "several experts"),
    "parameters of no layer": ("convnext", "", "a parameter of no layer"),
}


def save_pair(folder, kind, base_head="causal", head="causal", scale=0.05, only="", dtype=torch.float32, **config):
    """A base, and a model finetuned from it in every parameter, or in those whose name has a word in it."""
    torch.manual_seed(0)
    ties = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    tiny(kind, base_head, initializer_range=0.2, **ties).save_pretrained(folder / "base")
    tuned = AUTO_MODELS[head].from_pretrained(folder / "base", **config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if only in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    tuned.to(dtype).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@torch.no_grad()
def outputs(model, kind):
    found = model.eval()(**(PICTURES if kind in ("resnet", "convnext") else tokens()))
    logits = getattr(found, "logits", None)
    return found[0] if logits is None else logits


def adapted(base, adapter, head="causal", **config):
    torch.manual_seed(7)  # of a new head, which the adapter replaces
    return PeftModel.from_pretrained(AUTO_MODELS[head].from_pretrained(base, **config), adapter)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_full_rank_base_and_adapter_are_the_finetuned_model(layout, tmp_path):
    kind, base_head, head, config = LAYOUTS[layout]
    base, tuned = save_pair(tmp_path, kind, base_head, head, **config)
    found = sb.extract(base, tuned, tmp_path / "out", rank=64)
    assert found.exact
    assert not found.left_out
    wanted = outputs(AUTO_MODELS[head].from_pretrained(tuned), kind)
    model = adapted(base, tmp_path / "out", head, **config)
    assert (outputs(model, kind) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    merged = outputs(model.merge_and_unload(), kind)
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_peft_cannot_carry_is_listed_and_nothing_is_called_exact(case, tmp_path):
    if case == "experts" and not transformers.__version__.startswith("5"):
        pytest.skip("transformers 4 has a linear layer for each expert")
    kind, head, reason = LEFT_OUT[case]
    base, tuned = save_pair(tmp_path, kind, head, head)
    found = sb.extract(base, tuned, tmp_path / "out", rank=64)
    assert not found.exact
    assert any(reason in one for one in found.left_out.values())
    assert any("not the whole of the finetuning" in note for note in found.notes)
    said = CliRunner().invoke(app, ["extract", str(base), str(tuned), "-o", str(tmp_path / "again")])
    assert said.exit_code == 0
    assert said.stderr.count("left out: ") == len(found.left_out)


@pytest.mark.slow
def test_it_loads_without_this_package(tmp_path):
    base, tuned = save_pair(tmp_path, "bert", "", "classifier", num_labels=3)
    sb.extract(base, tuned, tmp_path / "out", rank=64)
    wanted = outputs(AUTO_MODELS["classifier"].from_pretrained(tuned), "bert")
    save_file({**tokens(), "wanted": wanted}, tmp_path / "batch.safetensors")
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "batch = load_file('batch.safetensors')\n"
        "wanted = batch.pop('wanted')\n"
        "model = PeftModel.from_pretrained(Auto.from_pretrained('base', num_labels=3), 'out').eval()\n"
        "assert (model(**batch).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()\n"
        "assert 'spectralbasis' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True, capture_output=True)


def test_each_update_is_the_best_of_its_rank(tmp_path):
    base, tuned = save_pair(tmp_path, "gpt2")
    found = sb.extract(base, tuned, tmp_path / "out", rank=4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    model = adapted(base, tmp_path / "out")
    for module, one in found.matrices.items():
        delta = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        share = float(S[:4].square().sum() / S.square().sum())
        assert one.energy == pytest.approx(share, rel=1e-6)
        assert share <= one.best_energy * (1 + 1e-9)
        assert one.best_energy == pytest.approx(share, rel=1e-4)
        assert one.error_bound <= 1e-4
        written = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach().double()
        assert (written - (U[:, :4] * S[:4]) @ Vh[:4]).norm() < 1e-5 * delta.norm()
    record = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert record["energy"] == found.energy
    assert not found.exact


def test_a_share_of_the_energy_takes_the_smallest_rank_that_reaches_it(tmp_path):
    base, tuned = save_pair(tmp_path, "gpt2", only="mlp")
    found = sb.extract(base, tuned, tmp_path / "out", energy=0.8)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    for module, one in found.matrices.items():
        squares = torch.linalg.svdvals((after[f"{module}.weight"] - before[f"{module}.weight"]).double()).square()
        shares = squares.cumsum(0) / squares.sum()
        assert one.rank == int((shares >= 0.8).nonzero()[0]) + 1
        assert one.energy >= 0.8
    assert len({one.rank for one in found.matrices.values()}) > 1
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert set(config.rank_pattern.values()) | {config.r} == {one.rank for one in found.matrices.values()}
    assert config.rank_pattern == config.alpha_pattern
    model = adapted(base, tmp_path / "out")
    for module, one in found.matrices.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert (layer.r["default"], layer.scaling["default"]) == (one.rank, 1)


def test_a_share_is_reached_in_large_matrices_too():
    W = torch.randn(560, 520, generator=torch.Generator().manual_seed(0))
    delta = with_spectrum(560, 520, power_law(520, 0.9))[0].float()
    task = decomposing.UpdateTask
    squares = torch.linalg.svdvals(delta.double()).square()
    for share in (0.5, 0.95):
        settings = decomposing.UpdateSettings("lora", share, False, 5e-5)
        before, after = (
            logical_matrices(open_checkpoint({"layer.0.dense.weight": one}))[0]["layer.0.dense"]
            for one in (W, W + delta)
        )
        found = task(before, {"tuned": after}, settings, 16, "layer.0.dense", "layer.0.dense", "base").perform()
        expected = int((squares.cumsum(0) >= share * squares.sum()).nonzero()[0]) + 1
        assert abs(found.facts["rank"] - expected) <= 1
        assert found.facts["held"] >= share * found.facts["total"] * (1 - 1e-6)


def test_ranks_under_one_total_hold_the_most_energy(tmp_path):
    values = {"a": torch.tensor([5.0, 2.0, 1.0]), "b": torch.tensor([4.0, 3.0, 0.5]), "c": torch.tensor([0.1, 0.1])}
    for total in range(1, 9):
        ranks = share_out(values, total)
        splits = (split for split in product(range(4), range(4), range(3)) if sum(split) == total)
        best = max(sum(float(v[:k].sum()) for v, k in zip(values.values(), split, strict=True)) for split in splits)
        assert sum(float(values[name][:k].sum()) for name, k in ranks.items()) == pytest.approx(best)
    base, tuned = save_pair(tmp_path, "gpt2", only="mlp")
    found = sb.extract(base, tuned, tmp_path / "out", total_rank=80)
    assert sum(one.rank for one in found.matrices.values()) == 80
    each = sb.extract(base, tuned, tmp_path / "each", rank=20)
    assert found.energy > each.energy
    smallest = []
    for module, one in found.matrices.items():
        delta = load_file(tuned / "model.safetensors")[f"{module}.weight"]
        delta = delta - load_file(base / "model.safetensors")[f"{module}.weight"]
        values = torch.linalg.svdvals(delta.double())
        smallest.append((float(values[one.rank - 1]), float(values[one.rank])))
    assert min(kept for kept, _ in smallest) > max(lost for _, lost in smallest)


def test_a_spectral_adapter_is_the_projection_on_the_directions_of_the_base(tmp_path):
    base, tuned = save_pair(tmp_path, "gpt2", only="mlp")
    found = sb.extract(base, tuned, tmp_path / "out", to="spectral", rank=8)
    table = sb.compare(base, [tuned], leading=8, null=None).table
    for module, one in found.matrices.items():
        name = module.removeprefix("transformer.")
        rows = table[(table.metric == "coverage_core") & (table.matrix == name) & (table.k == 8)]
        assert one.energy == pytest.approx(float(rows.value.iloc[0]), rel=1e-3)
        assert one.energy < one.best_energy
    model = adapted(base, tmp_path / "out")
    for module in found.matrices:
        W0, W1 = (load_file(folder / "model.safetensors")[f"{module}.weight"].T for folder in (base, tuned))
        U, _, Vh = torch.linalg.svd(W0.double())
        U, V = U[:, :8], Vh[:8].T
        expected = U @ (U.T @ (W1 - W0).double() @ V) @ V.T
        layer = model.get_submodule(f"base_model.model.{module}")
        written = layer.get_delta_weight("default").detach().double().T
        assert (written - expected).norm() < 1e-4 * expected.norm()


def test_intruders_are_left_out(tmp_path):
    W0 = with_spectrum(60, 40, power_law(40))[0]
    new = orthonormal(60, 60, 5)
    outside = new[:, :1] - torch.linalg.svd(W0)[0][:, :40] @ (torch.linalg.svd(W0)[0][:, :40].T @ new[:, :1])
    u, v = outside / outside.norm(), orthonormal(40, 1, 9)
    update = 2.0 * u @ v.T + 0.01 * torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).double()
    U = intruder_directions(W0, W0 + update, 1e-4)
    assert U.shape == (60, 1)
    assert float((U.T @ u).abs()) > 0.99
    left = without_directions(update, U)
    assert (U.T @ left).abs().max() < 1e-12
    assert torch.allclose(U.T @ (W0 + left), U.T @ W0)  # what the base does there stays
    base, tuned = ({"layer.0.dense.weight": W.float()} for W in (W0, W0 + update))
    found = sb.extract(base, tuned, tmp_path / "out", rank=40, drop_intruders=True)
    one = found.matrices["layer.0.dense"]
    assert (one.intruders, one.intruders_left) == (1, 0)
    assert one.removed_energy == pytest.approx(float((U.T @ update).square().sum() / update.square().sum()), rel=1e-4)
    assert one.energy == pytest.approx(1 - one.removed_energy, rel=1e-4)
    assert not found.exact


def test_an_adapter_as_the_finetuned_side(tmp_path):
    base, _ = save_pair(tmp_path, "llama")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AUTO_MODELS["causal"].from_pretrained(base), config)
    model.save_pretrained(tmp_path / "lora")
    found = sb.extract(base, tmp_path / "lora", tmp_path / "out", rank=8)
    assert found.energy == pytest.approx(1, abs=1e-9)
    assert sorted(found.matrices) == sorted(
        f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    wanted = outputs(model, "llama")
    assert (outputs(adapted(base, tmp_path / "out"), "llama") - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_checkpoint_that_was_rounded_has_changed_where_it_was_trained(tmp_path):
    base, tuned = save_pair(tmp_path, "llama", only="q_proj", dtype=torch.bfloat16)
    found = sb.extract(base, tuned, tmp_path / "out", rank=64)
    assert sorted(found.matrices) == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert not found.whole


def test_rows_that_were_added_to_the_vocabulary(tmp_path):
    base, _ = save_pair(tmp_path, "llama")
    model = AUTO_MODELS["causal"].from_pretrained(tmp_path / "tuned")
    model.resize_token_embeddings(53)
    model.save_pretrained(tmp_path / "tuned")
    found = sb.extract(base, tmp_path / "tuned", tmp_path / "out")
    assert "resize_token_embeddings(53)" in found.left_out["model.embed_tokens.weight"]
    assert not found.exact
    adapted(base, tmp_path / "out")  # which loads all the same


def test_the_rank_of_vllm(tmp_path):
    base, tuned = save_pair(tmp_path, "llama", only="proj")
    found = sb.extract(base, tuned, tmp_path / "out", rank=3, vllm=True)
    assert found.rank == 8
    found = sb.extract(base, tuned, tmp_path / "share", energy=0.3, vllm=True)
    config = LoraConfig.from_pretrained(tmp_path / "share")
    assert (config.r, config.lora_alpha, config.rank_pattern) == (8, 8, {})
    tensors = load_file(tmp_path / "share" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {8}
    assert any("--max-lora-rank 8" in note for note in found.notes)
    with pytest.raises(InputError, match="largest that vLLM takes"):
        sb.extract(base, tuned, tmp_path / "large", rank=600, vllm=True)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    base, tuned = save_pair(tmp_path, "llama", only="proj")
    sb.extract(base, tuned, tmp_path / "whole", rank=4)
    done = []

    def stopping(task):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(task.module)
        return decompose(task)

    decompose = decomposing.decompose
    monkeypatch.setattr(decomposing, "decompose", stopping)
    with pytest.raises(KeyboardInterrupt):
        sb.extract(base, tuned, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished").exists()
    anew = []

    def counting(task):
        update = decompose(task)
        if update.facts is not None:
            anew.append(task.module)
        return update

    monkeypatch.setattr(decomposing, "decompose", counting)
    with pytest.raises(InputError, match="made with rank=4, not 5"):
        sb.extract(base, tuned, tmp_path / "out", rank=5, resume=True)
    sb.extract(base, tuned, tmp_path / "out", rank=4, resume=True)
    assert not set(anew) & set(done[:4])
    assert not (tmp_path / "out.unfinished").exists()
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_little_memory_reads_in_row_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", 2000)
    W0 = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    W1 = W0 + with_spectrum(700, 600, power_law(600))[0].float()
    for name, W in {"base": W0, "tuned": W1}.items():
        save_file({"layer.0.dense.weight": W}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    whole = sb.extract(*files, tmp_path / "whole", rank=16)
    blocks = sb.extract(*files, tmp_path / "blocks", rank=16, memory_budget="10MB")
    assert blocks.matrices["layer.0.dense"].solver.endswith("(row blocks)")
    assert blocks.energy == pytest.approx(whole.energy, rel=1e-5)
    with pytest.raises(InputError, match="--memory-budget"):
        sb.extract(*files, tmp_path / "none", rank=16, memory_budget="1MB")


@pytest.mark.slow
def test_processes_give_the_same(tmp_path):
    base, tuned = save_pair(tmp_path, "llama")
    one = sb.extract(base, tuned, tmp_path / "one", rank=4)
    two = sb.extract(base, tuned, tmp_path / "two", rank=4, workers=2)
    assert one.matrices.keys() == two.matrices.keys()
    assert two.energy == pytest.approx(one.energy, rel=1e-6)


def test_outputs_on_texts(tmp_path):
    base, tuned = save_pair(tmp_path, "bert", "", "classifier", scale=0.02, num_labels=3)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    (tuned / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tuned / "vocab.txt"), model_max_length=16).save_pretrained(tuned)
    (tmp_path / "texts.csv").write_text("text,label\na good film,1\nbad,0\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": "bad"}\n')
    exact = sb.extract(base, tuned, tmp_path / "out", rank=64, check=tmp_path / "texts.csv").check
    small = sb.extract(base, tuned, tmp_path / "small", rank=1, check=tmp_path / "texts.jsonl").check
    assert (exact.texts, exact.output) == (2, "logits")
    assert exact.largest < 1e-5 * exact.scale < small.largest
    assert exact.agreement == 1
    model = adapted(base, tmp_path / "small", "classifier", num_labels=3).eval()
    tuned_model = AUTO_MODELS["classifier"].from_pretrained(tuned).eval()
    ids = torch.tensor([[2, 5, 6, 8, 3], [2, 7, 3, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    with torch.no_grad():
        difference = (model(**batch).logits - tuned_model(**batch).logits).abs()
    assert small.largest == pytest.approx(float(difference.max()), rel=1e-3)
    assert small.mean == pytest.approx(float(difference.mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.csv", "sentence\na\n", "row 1 has no column 'text'; it has sentence"),
        ("texts.csv", "text\n", "no rows"),
        ("texts.jsonl", '{"text": ""}\n', "row 1 has no text"),
        ("texts.jsonl", "[1]\n", "line 1 is not an object"),
        ("texts.tsv", "text\n", "expected .csv or .jsonl"),
    ],
)
def test_a_file_of_texts_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    W = torch.randn(24, 16)
    pair = {"layer.0.dense.weight": W}, {"layer.0.dense.weight": W + 0.1}
    with pytest.raises(InputError, match=message):
        sb.extract(*pair, tmp_path / "out", check=tmp_path / name)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "energy": 0.5}, "one of rank, energy and total_rank"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"energy": 1.5}, "at most 1, got 1.5"),
        ({"energy": float("nan")}, "got nan"),
        ({"to": "dora"}, "'lora' or 'spectral'"),
        ({"to": "spectral", "energy": 0.5}, "no rank can choose"),
        ({"device": "tpu"}, "cannot be used here"),
        ({"workers": 0}, "workers must be from 1"),
        ({"include": ["*.nothing"]}, "matches no tensor"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tmp_path):
    W = torch.randn(24, 16)
    pair = {"layer.0.dense.weight": W}, {"layer.0.dense.weight": W + 0.1}
    with pytest.raises(InputError, match=message):
        sb.extract(*pair, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_to_extract(tmp_path):
    W = torch.randn(24, 16)
    base = {"layer.0.dense.weight": W}
    with pytest.raises(InputError, match="the same weights: there is no update"):
        sb.extract(base, base, tmp_path / "out")
    with pytest.raises(InputError, match="nothing that finetuning changed"):
        sb.extract(base, {"layer.0.dense.weight": W * torch.nan}, tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        sb.extract(base, {"layer.0.dense.weight": W + 1}, tmp_path / "used")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    save_pair(tmp_path, "llama")
    get_peft_model(AUTO_MODELS["causal"].from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(InputError, match="BASE must be a model"):
        sb.extract(tmp_path / "lora", tmp_path / "base", tmp_path / "out")


def test_both_in_the_wrong_order_is_noted(tmp_path):
    base, tuned = save_pair(tmp_path, "bert", "", "classifier", num_labels=3)
    found = sb.extract(tuned, base, tmp_path / "out")
    assert any("Check that the base was given first" in note for note in found.notes)


def test_one_bad_matrix_is_left_out(tmp_path):
    base = {f"layer.{n}.dense.weight": torch.randn(24, 16) for n in range(2)}
    tuned = {name: W + 0.1 * torch.randn(24, 16) for name, W in base.items()}
    tuned["layer.1.dense.weight"][0, 0] = torch.nan
    found = sb.extract(base, tuned, tmp_path / "out")
    assert "NaN" in found.left_out["layer.1.dense"]
    assert list(found.matrices) == ["layer.0.dense"]
    assert not found.exact


def test_the_command(tmp_path):
    base, tuned = save_pair(tmp_path, "bert", "", "classifier", num_labels=3)
    command = ["extract", str(base), str(tuned), "-o", str(tmp_path / "out"), "--drop-intruders", "--rank", "2"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0
    shown = " ".join(found.stdout.split())
    assert "best possible" in shown
    assert "intruders left out" in shown
    assert "num_labels=3" in shown
    found = CliRunner().invoke(app, [*command, "--overwrite", "--json"])
    assert json.loads(found.stdout)["rank"] == 2
    assert extraction.Extraction.__dataclass_fields__.keys() == json.loads(found.stdout).keys()
