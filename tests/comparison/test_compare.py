"""`compare` as a user calls it: verdicts on planted truths, files, skips, resumption, refusals."""

import json
import sqlite3

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import spectralbasis as sb
from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.comparison import measuring
from spectralbasis.comparison.pairing import Pairing
from tests.comparison.pairs import layered, random_updates
from tests.matrices import power_law, with_spectrum
from tests.models import tiny

CONTRACT = (
    "tuned, matrix, layer, kind, m, n, k, metric, side, index, value, null, null_mean, null_std, z, p_value, null_from"
)
SUMMARY = (
    "base, tuned, leading, matrices, skipped, unpaired, stability, coverage, versions, seed, seconds, peak_rss_bytes"
)
FINDING = {"value", "null_mean", "effect", "ci_low", "ci_high", "p_value", "verdict"}


def random_updates_of(size: float):
    base, tuned = random_updates(4, size)
    return base, [tuned]


def aligned_updates(kind: str, size: float = 0.3):
    """Updates that lie in the leading block of the base (turn nothing), or that push its leading vectors outwards."""
    base, tuned = {}, {}
    for layer in range(5):
        W0, U, V = with_spectrum(48, 40, power_law(40), seed=layer)
        inside = (U[:, :8] * torch.linspace(2, 1, 8, dtype=torch.float64)) @ V[:, :8].T
        outwards = U[:, 8:16] @ V[:, :8].T + U[:, :8] @ V[:, 8:16].T
        update = {"inside": inside, "outwards": outwards}[kind]
        base[f"{layer}.dense"], tuned[f"{layer}.dense"] = W0, W0 + size * update / update.norm()
    return layered(base), layered(tuned)


def test_an_update_inside_the_basis_supports_both_claims():
    base, tuned = aligned_updates("inside")
    summary = sb.compare(base, [tuned], leading=8).summary()
    assert summary["stability"]["verdict"] == "supported"
    assert summary["coverage"]["verdict"] == "supported"
    assert summary["coverage"]["value"] == pytest.approx(1, abs=1e-3)


def test_an_update_that_pushes_outwards_contradicts_stability():
    base, tuned = aligned_updates("outwards")
    summary = sb.compare(base, [tuned], leading=8).summary()
    assert summary["stability"]["verdict"] == "contradicted"
    assert summary["stability"]["relative_effect"] < 0
    assert summary["coverage"]["value"] == pytest.approx(0, abs=1e-3)


def test_an_unrelated_update_decides_nothing():
    base, tuned = random_updates(16, 0.3)
    summary = sb.compare(base, [tuned], leading=8).summary()
    assert summary["stability"]["verdict"] == "undecided"
    assert summary["coverage"]["verdict"] == "undecided"


def test_stability_that_a_small_step_forces_is_no_finding():
    base, tuned = random_updates(4, 1e-3)
    stability = sb.compare(base, [tuned], leading=8).summary()["stability"]
    assert stability["value"] > 0.99
    assert "only shows that the update is small" in stability["note"]
    assert stability["forced_by_size"] == {"matrices": 4, "of": 4}
    assert "In 4 of 4 matrices the size of the update alone" in stability["note"]


def test_a_large_step_forces_nothing():
    base, tuned = random_updates(4, 1.0)
    stability = sb.compare(base, [tuned], leading=8).summary()["stability"]
    assert stability["forced_by_size"] == {"matrices": 0, "of": 4}
    assert "size of the update alone" not in stability["note"]


def test_coverage_by_an_unrelated_model_is_no_sign_of_a_shared_basis():
    base, tuned = ({f"{i}.dense.weight": torch.randn(48, 40) for i in range(4)} for _ in range(2))
    coverage = sb.compare(base, [tuned], leading=8).summary()["coverage"]
    assert coverage["verdict"] == "supported"
    assert "times as large as the weights" in coverage["note"]
    assert sb.compare(*random_updates_of(0.3), leading=8).summary()["coverage"]["note"] == ""


def test_table_summary_and_files_keep_the_contract(tmp_path):
    base, one = random_updates(4, 0.3)
    _, two = random_updates(4, 0.3, seed=1)
    two = {name: base[name] + 0.1 * (two[name] - base[name]) for name in base}
    result = sb.compare(base, [one, two], leading=8, draws=3, seed=5, output=tmp_path)
    assert list(result.table.columns) == [*CONTRACT.split(", "), "q_value"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary()))
    assert set(SUMMARY.split(", ")) <= set(summary)
    for finding in (summary, *summary["per_tuned"].values()):
        assert set(finding["stability"]) >= FINDING
        assert set(finding["coverage"]) >= FINDING
    assert (summary["matrices"], summary["seed"], len(summary["tuned"])) == (4, 5, 2)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "comparison.parquet"), result.table)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".spectralbasis",
        "comparison.parquet",
        "sharing.parquet",
        "summary.json",
        "index.html",
        "store.sqlite",
    }


def test_matrices_that_cannot_be_measured_are_listed_and_the_others_go_on():
    base, tuned = random_updates(4, 0.3)
    names = list(base)
    tuned[names[0]] = tuned[names[0]].clone()
    tuned[names[0]][0, :3] = float("nan")
    tuned[names[1]] = base[names[1]].clone()
    tuned[names[2]] = torch.ones(7, 7)
    summary = sb.compare(base, [tuned], leading=8).summary()
    reasons = list(summary["skipped"].values())
    assert summary["matrices"] == 1
    assert any("3 of 1920 values" in reason and "NaN" in reason for reason in reasons)
    assert measuring.UNCHANGED in reasons
    assert any("48×40" in reason and "7×7" in reason for reason in reasons)


def test_a_base_with_nan_is_listed_and_a_matrix_of_fewer_directions_gives_all_it_has():
    base, tuned = random_updates(3, 0.3)
    names = list(base)
    base[names[0]] = base[names[0]] * float("inf")
    base[names[1]], tuned[names[1]] = torch.eye(5), torch.eye(5) + 0.1 * torch.randn(5, 5)
    result = sb.compare(base, [tuned], leading=8)
    (reason,) = result.summary()["skipped"].values()
    assert "NaN or infinite" in reason
    assert result.table.groupby("matrix")["k"].max().to_dict() == {
        names[1].removesuffix(".weight"): 5,
        names[2].removesuffix(".weight"): 8,
    }
    summary = result.summary()
    sizes = [W.numel() for W in base.values()]
    assert summary["measured_share"] == pytest.approx(1 - sizes[0] / sum(sizes))
    assert "1 pair of matrices could not be measured, so 50 % of the model was measured" in summary["notes"][0]
    assert "k=8 exceeds the smaller side of 1 matrix" in summary["notes"][1]


def test_without_leading_k_is_64_or_half_of_the_smaller_side():
    sizes = {"layer.0.wide": (200, 140), "layer.1.narrow": (50, 9)}
    base = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    tuned = {name: W + 0.1 * torch.randn_like(W) for name, W in base.items()}
    result = sb.compare(base, [tuned], null=None)
    assert result.table.groupby("matrix")["k"].max().to_dict() == {"layer.0.wide": 64, "layer.1.narrow": 4}
    assert result.summary()["notes"] == []
    assert "64, or half of min(m, n) where that is less" in result.summary()["methods"]


def test_layers_that_are_numbered_from_another_number_are_told():
    base, _ = random_updates(4, 0.1, per_layer=1)
    name = "encoder.layer.{}.dense0.weight".format
    tuned = {name(i + 1): base[name(i)] + 0.01 * torch.randn(48, 40) for i in range(4)}
    shifted = sb.compare(base, [tuned], leading=4, null=None).summary()["notes"]
    assert any("In 3 of 3 matrices" in note and "number their layers in the same way" in note for note in shifted)
    equal = {name(i): base[name(i)] + 0.01 * torch.randn(48, 40) for i in range(4)}
    assert sb.compare(base, [equal], leading=4, null=None).summary()["notes"] == []


@pytest.mark.parametrize("module_first", [False, True])
def test_a_module_tells_the_layout_of_all_sides(module_first):
    model = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(6, 6, 3)})
    base = {name: W.detach().clone() for name, W in model.state_dict().items()}
    other = {name: W + 0.01 * torch.randn_like(W) for name, W in base.items()}
    with torch.no_grad():
        model["up"].weight += 0.01 * torch.randn_like(model["up"].weight)
    tuned = [model, other] if module_first else [other, model]
    table = sb.compare(base, tuned, leading=2, null=None).table
    W0 = base["up.weight"]
    expected = [float((one.detach() - W0).norm() / W0.norm()) for one in (model["up"].weight, other["up.weight"])]
    found = table[table["metric"] == "update_norm_relative"]["value"].tolist()
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-4)


def test_what_has_no_partner_is_named_in_groups_with_its_share_of_the_model():
    base = {f"blocks.{i}.proj.weight": torch.randn(8, 8) for i in range(3)} | {"first.weight": torch.randn(8, 16)}
    tuned = {"first.weight": base["first.weight"] + 0.1, "tower.0.query.weight": torch.randn(4, 4)}
    summary = sb.compare(base, [tuned], leading=2, draws=1).summary()
    assert summary["measured_share"] == pytest.approx(128 / (128 + 3 * 64))
    ours, theirs = summary["unpaired"]
    expected = {"side": "base", "group": "blocks.*", "matrices": 3, "parameters": 192, "share": pytest.approx(0.6)}
    assert {key: ours[key] for key in expected} == expected
    assert (theirs["side"], theirs["group"], theirs["share"]) == ("tuned", "tower.*", pytest.approx(16 / 144))
    assert "40 % of the model" in summary["notes"][0]


def test_equal_pairs_beside_others_that_found_no_partner_are_not_called_the_same_weights():
    base = {f"layer.{i}.query.weight": torch.randn(16, 16) for i in range(4)} | {"patch.weight": torch.randn(16, 8)}
    tuned = {f"layers.{i}.q_proj.weight": torch.randn(16, 16) for i in range(4)} | {
        "patch.weight": base["patch.weight"]
    }
    with pytest.raises(sb.InputError, match=r"11 % of the model.*layer\.\* of the base \(4 matrices") as caught:
        sb.compare(base, [tuned], leading=4)
    assert "hold the same weights" not in str(caught.value)


@pytest.mark.parametrize(("stored", "narrow"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_a_matrix_that_is_the_rounded_base_is_listed_as_rounding(stored, narrow):
    base = {f"layer.{i}.dense.weight": torch.randn(24, 16).to(stored) for i in range(3)}
    tuned = {name: W.to(narrow) for name, W in base.items()}
    tuned["layer.0.dense.weight"] = (base["layer.0.dense.weight"] + 0.1).to(narrow)
    summary = sb.compare(base, [tuned], leading=4, draws=1).summary()
    assert summary["matrices"] == 1
    assert all(reason.startswith(measuring.ROUNDED) for reason in summary["skipped"].values())
    assert len(summary["skipped"]) == 2
    with pytest.raises(sb.InputError, match="same weights apart from rounding"):
        sb.compare(base, [{name: W.to(narrow) for name, W in base.items()}], leading=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leading": "all"}, "leading='all' is not a number of directions"),
        ({"null": "shuffled"}, "null='shuffled' is unknown; pass one of scrambled, scrambled-left"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"device": "cuda:99"}, "pass device='cpu'"),
        ({"leading": 0}, "leading=0 is not a number of directions"),
        ({"include": ["nothing*"]}, "nothing"),
    ],
)
def test_wrong_settings_are_a_sentence(change, message):
    base, tuned = random_updates(2, 0.3)
    with pytest.raises(sb.InputError, match=message):
        sb.compare(base, [tuned], **{"leading": 8, **change})


def test_where_nothing_could_be_measured_a_matrix_that_was_tried_says_why():
    base, tuned = random_updates(2, 0.3)
    for state in (base, tuned):
        state["embeddings.word_embeddings.weight"] = torch.ones(50, 40)
    tuned = {name: W * float("nan") for name, W in tuned.items()}
    with pytest.raises(sb.InputError, match=r"encoder\.layer\.0\.dense0: 1920 of 1920 values"):
        sb.compare(base, [tuned], leading=8)


def test_the_same_weights_twice_is_an_error_not_a_finding():
    base, _ = random_updates(2, 0.3)
    with pytest.raises(sb.InputError, match="the same weights"):
        sb.compare(base, [dict(base)], leading=8)


def test_no_checkpoint_to_compare_is_an_error():
    with pytest.raises(sb.InputError, match="at least one finetuned checkpoint"):
        sb.compare(random_updates(2, 0.3)[0], [])


def folders(tmp_path):
    base, one = random_updates(6, 0.3)
    for name, state in {"base": base, "one": one}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "one.safetensors"


def test_an_interrupted_comparison_resumes_to_the_same_table(tmp_path, monkeypatch):
    base, one = folders(tmp_path)
    whole = sb.compare(base, [one], leading=8, output=tmp_path / "whole").table
    measured = []
    measure = measuring.measure_pair

    def dies_at_the_fourth(*arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments)

    monkeypatch.setattr(measuring, "measure_pair", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        sb.compare(base, [one], leading=8, output=tmp_path / "part")
    assert {path.name for path in (tmp_path / "part").iterdir()} == {".spectralbasis", "store.sqlite"}

    again = []
    monkeypatch.setattr(measuring, "measure_pair", lambda *arguments: again.append(1) or measure(*arguments))
    resumed = sb.compare(base, [one], leading=8, output=tmp_path / "part", resume=True).table
    assert len(again) == 3
    pd.testing.assert_frame_equal(resumed, whole)


def test_resuming_measures_again_what_has_changed_on_disk(tmp_path):
    base, one = folders(tmp_path)
    first = sb.compare(base, [one], leading=8, output=tmp_path / "out").table
    _, other = random_updates(6, 0.5)
    save_file(other, one)
    second = sb.compare(base, [one], leading=8, output=tmp_path / "out", resume=True).table
    fresh = sb.compare(base, [one], leading=8).table
    pd.testing.assert_frame_equal(second, fresh)
    assert not second.equals(first)


def test_resuming_with_other_settings_is_refused_and_loses_nothing(tmp_path):
    base, one = folders(tmp_path)
    sb.compare(base, [one], leading=8, output=tmp_path / "out")
    before = (tmp_path / "out" / "store.sqlite").read_bytes()
    with pytest.raises(sb.InputError, match="made with leading=8, not 4"):
        sb.compare(base, [one], leading=4, output=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "store.sqlite").read_bytes() == before


def test_bad_input_leaves_earlier_results_alone(tmp_path):
    base, one = folders(tmp_path)
    sb.compare(base, [one], leading=8, output=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(sb.InputError):
        sb.compare(base, [tmp_path / "missing.safetensors"], leading=8, output=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_store_is_a_sentence(tmp_path):
    base, one = folders(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store.sqlite").write_bytes(b"not a database, and long enough to be read as one" * 50)
    with pytest.raises(sb.InputError, match="remove it, or choose another output folder"):
        sb.compare(base, [one], leading=8, output=tmp_path / "out", resume=True)


def test_checkpoints_are_told_apart_by_the_shortest_end_of_their_paths(tmp_path):
    base, one = random_updates(2, 0.3)
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save_file(one, tmp_path / run / "model.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    tuned = [tmp_path / run / "model.safetensors" for run in ("a", "b")]
    summary = sb.compare(tmp_path / "base.safetensors", tuned, leading=4).summary()
    assert summary["tuned"] == ["a/model.safetensors", "b/model.safetensors"]


def test_the_store_can_be_read_by_others(tmp_path):
    base, one = folders(tmp_path)
    sb.compare(base, [one], leading=8, output=tmp_path / "out")
    with sqlite3.connect(tmp_path / "out" / "store.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM pairs").fetchone() == (6,)


def test_where_no_weight_of_either_side_can_be_read_the_result_says_so_and_has_no_verdict(tmp_path):
    state = {}
    for layer in ("layers.0.q_proj", "layers.1.q_proj"):
        state[f"{layer}.weight"] = torch.ones(128, 64, dtype=torch.uint32)
        state |= {f"{layer}.{part}": torch.ones(128, 8).half() for part in ("scales", "biases")}
    result = sb.compare(state, [dict(state)])
    assert result.table.empty
    summary = result.summary()
    assert (summary["stability"]["verdict"], summary["coverage"]["verdict"]) == ("undecided", "undecided")
    assert summary["measured_share"] == 0
    assert {group["group"] for group in summary["unpaired"]} == {"layers.*"}
    assert "Nothing was compared: layers.* of the base (2 matrices" in summary["notes"][0]
    with pytest.raises(sb.InputError, match=r"no weight of state_dict and state_dict can be read.*MLX"):
        sb.compare(state, [dict(state)], output=tmp_path / "out")
    with pytest.raises(sb.InputError, match="nothing to plan"):
        sb.plan_comparison(state, [dict(state)])


def test_an_adapter_that_fits_its_base_in_part_is_refused_unless_asked_for(tmp_path):
    torch.manual_seed(0)
    deep, shallow = tiny("llama", num_hidden_layers=3), tiny("llama", num_hidden_layers=2)
    shallow.load_state_dict(deep.state_dict(), strict=False)
    shallow.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    get_peft_model(deep, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(sb.InputError, match=r"mlp\.up_proj \(1 of 3\).*partial=True \(--partial\)"):
        sb.compare(tmp_path / "base", [tmp_path / "adapter"], null=None)
    summary = sb.compare(tmp_path / "base", [tmp_path / "adapter"], null=None, partial=True).summary()
    assert summary["matrices"] == 4
    assert "adapted, but absent" in summary["skipped"]["layers.2.mlp.up_proj"]


def test_reasons_name_the_checkpoint_where_there_are_several():
    base = open_checkpoint({"a.weight": torch.eye(3), "b.weight": torch.eye(3)})
    alone, two = Pairing(base, {"one": base}), Pairing(base, {"one": base, "two": base})
    for pairing in (alone, two):
        pairing.fail("one", "a", "it holds NaN")
    assert alone.skipped == {"a": "it holds NaN"}
    assert two.skipped == {"a [one]": "it holds NaN"}
    assert alone.failed == two.failed == {"one": {"a": "it holds NaN"}}
