"""Verdicts of the ladder follow what was planted, over tasks and over pretraining seeds."""

import pandas as pd
import pytest

from spectralbasis.study.exchange import OTHER_TASKS
from spectralbasis.study.experiments import ladder
from spectralbasis.study.runs import Record, Results
from spectralbasis.study.trajectories import COLUMNS
from tests.study.experiments.planted import verdicts

SETTINGS = ladder.PRESETS["cpu"]
HALVINGS = {"scrambled": -1.0, "scrambled-left": -0.5, "scrambled-right": -0.5, "energy": 0.0}
TASKS = SETTINGS.groups[0].subjects[0].tasks


def measured(rotation, trailing, halvings):
    """Rows of a run in four matrices that turn by different amounts, all as far from each null."""
    rows = []
    for layer, factor in enumerate((1, 2, 4, 8)):
        place = 2, f"layer.{layer}", layer, "dense"
        for null, effect in halvings.items():
            chance = 1 - factor * rotation * 2.0**effect
            rows.append((*place, "subspace_overlap", "both", 1 - factor * rotation, chance, 0.0, null))
            rows.append((*place, "trailing_overlap", "both", 1 - trailing, 1 - trailing, 0.0, null))
        for metric, value, chance in (("left", 0.1, 0.05), ("right", 0.2, 0.1), ("core", 0.02, 0.005)):
            rows.append((*place, f"coverage_{metric}", "both", value, chance, 0.0, "scrambled"))
        rows.append((*place, "update_norm_relative", "both", 0.1, float("nan"), float("nan"), ""))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def planted(halvings=HALVINGS, spread=0.02, rotation=0.01, trailing=0.2, exchanged=0.3):
    """Records of all runs; tasks and seeds differ by `spread` in every effect."""
    records = {}
    for run in ladder.plan(SETTINGS, Results({})):
        if run.action == "tune":
            off = spread * (by_name(run.settings["task"]) + by_name(run.needs.get("model", run).key))
            table = measured(rotation, trailing, {null: effect + off for null, effect in halvings.items()})
        else:
            tables = [
                measured(rotation, trailing, {OTHER_TASKS: exchanged}).assign(tuned=number, task=task)
                for number, task in enumerate(run.settings["tasks"])
            ]
            table = pd.concat(tables).query("metric == 'subspace_overlap'")
        records[run.key] = Record({"score": 0.8}, table, 1.0, {}, run.seed)
    return Results(records)


def by_name(name):
    """-1, 0 or 1."""
    return sum(map(ord, name)) % 3 - 1


def claims(findings):
    return {claim.name: claim for claim in findings.claims}


def test_what_energy_explains():
    findings = ladder.analyse(SETTINGS, planted())
    assert set(verdicts(findings).values()) == {"supported"}
    found = claims(findings)
    assert abs(found["energy explains the rotation"].effect) < 0.05
    assert found["leading directions turn more than under scrambled updates"].effect == pytest.approx(1, abs=0.05)
    assert found["leading directions stay more than trailing ones"].effect == pytest.approx(0.2 - 0.01 * 15 / 4)
    assert all(claim.runs == len(TASKS) * 3 for claim in findings.claims)
    assert all(f"{len(TASKS)} tasks" in claim.units for claim in findings.claims)


@pytest.mark.parametrize(("effect", "verdict"), [(0.12, "supported"), (0.4, "contradicted"), (-0.4, "contradicted")])
def test_the_margin_decides_on_energy(effect, verdict):
    findings = ladder.analyse(SETTINGS, planted({**HALVINGS, "energy": effect}))
    assert verdicts(findings)["energy explains the rotation"] == verdict


def test_tasks_that_differ_leave_it_undecided():
    findings = ladder.analyse(SETTINGS, planted(spread=0.4))
    assert verdicts(findings)["energy explains the rotation"] == "undecided"


def test_the_opposite_is_seen():
    found = verdicts(ladder.analyse(SETTINGS, planted({**HALVINGS, "scrambled": 0.5}, trailing=0.001)))
    assert found["leading directions turn more than under scrambled updates"] == "contradicted"
    assert found["leading directions stay more than trailing ones"] == "contradicted"


def test_the_ladder_has_every_null_of_every_group_over_its_units():
    findings = ladder.analyse(SETTINGS, planted())
    table = findings.tables["Ladder"].set_index(["group", "null"])
    assert set(table.loc["MiniLM"].index) == {*HALVINGS, OTHER_TASKS}
    assert table.loc[("MiniLM", "scrambled-left"), "effect"] == pytest.approx(-0.5, abs=0.05)
    assert table.loc[("MiniLM", OTHER_TASKS), "effect"] == pytest.approx(0.3)
    assert table.loc["MiniLM", "units"].unique().tolist() == [len(TASKS)]
    assert table.loc["ViT", ["units", "of"]].drop_duplicates().to_numpy().tolist() == [[6, "pretraining seeds"]]
    covered = findings.tables["Where the energy of the update lies"].set_index("group").loc["BERT"]
    assert covered["left over chance"] == pytest.approx(2)
    assert covered["core over left × right"] == pytest.approx(1)
    assert len(findings.tables["Units"]) == len(TASKS) + 6 + 6
    plain = findings.tables["Leading and trailing directions"].set_index(["group", "update"])["difference"]
    assert plain["MiniLM", "energy"] == pytest.approx(plain["MiniLM", "observed"], abs=0.01)


def test_part_of_the_runs_and_none():
    assert set(verdicts(ladder.analyse(SETTINGS, Results({}))).values()) == {"undecided"}
    runs, known = ladder.plan(SETTINGS, Results({})), planted()
    findings = ladder.analyse(SETTINGS, Results({runs[0].key: known.get(runs[0])}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert "1 of " in findings.note


def test_the_runs_are_those_that_are_promised():
    runs = ladder.plan(SETTINGS, Results({}))
    tuned = [run for run in runs if run.action == "tune"]
    assert len(set(runs)) == len(runs)
    assert len(tuned) == 13 * 3 + 6 * 3 + 6 * 3
    assert all(run.settings["measure"]["steps"] == [run.settings["steps"]] for run in tuned)
    minilm = [run.settings for run in tuned if run.settings.get("model") == "minilm"]
    wanted = {"steps": 300, "batch_size": 16, "max_length": 64, "bf16": True}
    assert all(wanted.items() <= settings.items() for settings in minilm)
    seeds = {(run.needs["model"].seed, run.needs["model"].needs["model"].seed) for run in tuned if run.needs}
    assert seeds == {(seed, seed) for seed in range(6)}
