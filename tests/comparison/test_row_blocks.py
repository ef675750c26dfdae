"""A matrix that exceeds the memory budget is measured in row blocks: the same table, or a sentence."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.checkpoints import match_matrices, open_checkpoint
from spectralbasis.comparison import compare, distributing, measuring
from spectralbasis.comparison.measuring import MatrixTask, Outcome, Settings, measure_matrix, read_matrix
from spectralbasis.comparison.nulls import ENERGY, NULLS, draw_generator, parse_null
from spectralbasis.errors import InputError
from spectralbasis.linalg import row_blocks
from spectralbasis.sizes import parse_size
from spectralbasis.triplets import matrix_hash
from tests.matrices import power_law, with_spectrum

IN_BLOCKS = [name for name, null in NULLS.items() if not null.in_base]
SHAPES = [(620, 530), (530, 620), (90, 120)]
K = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small matrices take many."""
    monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", 8_000)


def partners(folder, shape, count=1, dtype=torch.float32, size=0.3):
    """A base's matrix on disk and those finetuned from it."""
    generator = torch.Generator().manual_seed(7)
    W0 = with_spectrum(*shape, power_law(min(shape)))[0].float()
    updates = [torch.randn(shape, generator=generator) for _ in range(count)]
    states = {"base": W0} | {f"tuned{i}": W0 + size * U / U.norm() for i, U in enumerate(updates)}
    for name, W in states.items():
        save_file({"layer.0.dense.weight": W.to(dtype)}, folder / f"{name}.safetensors")
    base, *tuned = (open_checkpoint(folder / f"{name}.safetensors") for name in states)
    pairs = [match_matrices(base, one).pairs[0] for one in tuned]
    return pairs[0][0], {f"tuned{i}": after for i, (_, after) in enumerate(pairs)}


def budget(shape, k=K, kept=0, trailing=False):
    """What row blocks need; the whole matrix does not fit into that."""
    found = measuring.row_block_memory(*shape, k, kept=kept, trailing=trailing)
    assert found < measuring.working_memory(*shape, k, trailing=trailing)
    return found


def measured(before, after, settings, memory_budget):
    return measure_matrix(MatrixTask(before, after, settings, "base", {}, {}, memory_budget))


def assert_same_rows(found, expected, *, tolerance=1e-6, rounding=2e-8):
    """The same rows in the same order; figures are equal to the tolerance, z-scores and p-values to what follows of it.

    Args:
        tolerance: of values and of the null's mean, relative or absolute, and of its standard deviation.
        rounding: error of one value or draw, by the spread of the draws, that z-scores and p-values may show.
    """
    assert len(found) == len(expected) > 0
    given = tolerance
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(other):
            a, b = getattr(one, field.name), getattr(other, field.name)
            # Of a matrix in memory, singular values beyond the leading ones are found in float32.
            tolerance = 2e-5 if "_rank_" in other.metric else given
            allowed = tolerance
            if field.name in ("z", "p_value") and other.null_std > 0:
                allowed += rounding * (2 + abs(other.z)) / other.null_std
            same = a == pytest.approx(b, rel=tolerance, abs=allowed, nan_ok=True) if isinstance(b, float) else a == b
            assert same, (field.name, a, b, other)


@pytest.mark.parametrize("null", [*IN_BLOCKS, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rows_are_those_of_the_matrix_in_memory(tmp_path, monkeypatch, shape, null):
    before, after = partners(tmp_path, shape)
    settings = Settings(leading=K, null=parse_null(null), draws=3)
    whole = measured(before, after, settings, None).measured["tuned0"]
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(type(before), "read", lambda self: pytest.fail("the whole matrix was read"))
    blocks = measured(before, after, settings, budget(shape)).measured["tuned0"]
    assert blocks[0] == whole[0]
    assert_same_rows(blocks[1], whole[1])


def test_a_null_that_needs_all_singular_vectors_of_the_base_is_refused(tmp_path):
    before, after = partners(tmp_path, SHAPES[0])
    skipped = measured(before, after, Settings(leading=K, null=ENERGY), budget(SHAPES[0])).skipped["tuned0"]
    assert "the null energy needs all singular vectors of the base" in skipped
    needed = parse_size(skipped.split("--memory-budget ")[1].split(" or more")[0])
    assert measured(before, after, Settings(leading=K, null=ENERGY, draws=2), needed).measured


@pytest.mark.parametrize("leading", [0.1, "mp", "gd"])
def test_every_rule_for_the_number_of_directions(tmp_path, leading):
    before, after = partners(tmp_path, (300, 200), dtype=torch.bfloat16, size=3.0)
    settings = Settings(leading=leading, draws=2)
    whole = measured(before, after, settings, None).measured["tuned0"]
    blocks = measured(before, after, settings, budget((300, 200), 100)).measured["tuned0"]
    assert_same_rows(blocks[1], whole[1])


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_what_checkpoints_share_and_trailing_directions(tmp_path, shape):
    before, after = partners(tmp_path, shape, count=3)
    settings = Settings(leading=K, draws=2, trailing=True)
    whole = measured(before, after, settings, None)
    blocks = measured(before, after, settings, budget(shape, kept=9, trailing=True))
    for label in after:
        assert_same_rows(blocks.measured[label][1], whole.measured[label][1])
    assert len(blocks.shared) == 3
    for pair, (content, rows) in whole.shared.items():
        assert blocks.shared[pair][0] == content
        assert_same_rows(blocks.shared[pair][1], rows)


def test_intruders_are_settled_without_a_full_decomposition(tmp_path, monkeypatch):
    before, after = partners(tmp_path, (300, 200), size=30.0)
    settings = Settings(leading=K, null=None)
    whole = measured(before, after, settings, None).measured["tuned0"][1]
    assert next(row.value for row in whole if row.metric == "intruders") > 0
    monkeypatch.setattr(torch.linalg, "svd", small_only(torch.linalg.svd))
    assert_same_rows(measured(before, after, settings, budget((300, 200))).measured["tuned0"][1], whole)


def small_only(svd):
    def checked(A, **options):
        assert min(A.shape) < 100, "a matrix was decomposed in full"
        return svd(A, **options)

    return checked


@pytest.mark.parametrize("null", IN_BLOCKS)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 3), (40, 1), (3, 1000)])
def test_draws_of_row_sources_are_those_of_tensors(null, shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    source = row_blocks.RowSource(shape, lambda rows: update[rows].clone(), update.device)
    one, other = draw_generator(3, "W", 1), draw_generator(3, "W", 1)
    expected, found = NULLS[null].draw(update, one), NULLS[null].draw(source, other)
    drawn = torch.cat([found[rows] for rows in row_blocks.row_slices(found)])
    assert torch.equal(drawn, expected)
    assert torch.equal(found[1:3], expected[1:3])
    assert torch.equal(one.get_state(), other.get_state())


def test_hashes_are_equal_exactly(tmp_path):
    before, _ = partners(tmp_path, (620, 530), dtype=torch.float16)
    whole, source = (read_matrix(before, "cpu", by_rows, "base") for by_rows in (False, True))
    assert matrix_hash(whole) == matrix_hash(source)


def test_what_cannot_be_read_by_rows_is_held_in_its_stored_dtype(tmp_path):
    W0 = with_spectrum(200, 300, power_law(200))[0].bfloat16()
    state = {"h.0.attn.c_attn.weight": torch.randn(30, 90), "h.0.mlp.c_fc.weight": W0}
    changed = state | {"h.0.mlp.c_fc.weight": W0 + 0.01 * torch.randn(200, 300).bfloat16()}
    for name, tensors in {"base": state, "tuned": changed}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    base, tuned = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    before, after = next(pair for pair in match_matrices(base, tuned).pairs if pair[0].name == "h.0.mlp.c_fc")
    assert before.shape == (300, 200)
    settings, held = Settings(leading=K, draws=2), 2 * 2 * 60_000
    whole = measured(before, {"tuned": after}, settings, None).measured["tuned"]
    blocks = measured(before, {"tuned": after}, settings, budget((300, 200)) + held).measured["tuned"]
    assert blocks[0] == whole[0]
    assert_same_rows(blocks[1], whole[1])
    refused = measured(before, {"tuned": after}, settings, budget((300, 200))).skipped["tuned"]
    assert "240kB of it for what cannot be read by rows" in refused


def test_where_not_even_row_blocks_fit_a_sentence_says_what_to_type(tmp_path):
    before, after = partners(tmp_path, (300, 200), count=2)
    refused = measured(before, after, Settings(leading=K), 100_000).skipped
    assert list(refused) == list(after)
    message = refused["tuned0"]
    assert message.startswith("measuring 300×200 values in row blocks takes ")
    typed = message.partition("--memory-budget ")[2].removesuffix(" or more")
    assert "the memory budget is 100kB" in message
    assert not measured(before, after, Settings(leading=K, draws=5), parse_size(typed)).skipped


def test_values_that_are_not_finite_are_a_reason(tmp_path):
    before, after = partners(tmp_path, (300, 200))
    W = before.read().clone()
    W[7, 3], W[250, 0] = math.inf, math.nan
    save_file({"layer.0.dense.weight": W}, tmp_path / "tuned0.safetensors")
    found = measured(before, after, Settings(leading=K), budget((300, 200)))
    assert "2 of 60000 values in tuned0 are NaN or infinite" in found.skipped["tuned0"]


def test_equal_matrices_are_left_out(tmp_path):
    before, _ = partners(tmp_path, (300, 200))
    found = measured(before, {"tuned0": before}, Settings(leading=K), budget((300, 200)))
    assert "did not change it" in found.skipped["tuned0"]


def test_compare_takes_a_budget_as_people_write_it(tmp_path, caplog):
    partners(tmp_path, (620, 530))
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned0")]
    options = {"leading": K, "draws": 2}
    whole = compare(files[0], files[1:], **options)
    assert "row blocks" not in caplog.text
    small = compare(files[0], files[1:], **options, memory_budget=budget((620, 530)), output=tmp_path / "out")
    assert "layer.0.dense takes more than the memory budget" in caplog.text
    exact = ["tuned", "matrix", "k", "metric", "side", "index", "null"]
    assert small.table[exact].equals(whole.table[exact])
    tolerance = np.where(whole.table["metric"].str.contains("_rank_"), 2e-5, 1e-6)
    assert (abs(small.table["value"] - whole.table["value"]) <= tolerance * (1 + abs(whole.table["value"]))).all()
    np.testing.assert_allclose(small.table["null_mean"], whole.table["null_mean"], rtol=1e-6, atol=1e-6)
    again = compare(files[0], files[1:], **options, memory_budget="8GB", output=tmp_path / "out", resume=True)
    assert again.table.equals(small.table)
    with pytest.raises(InputError, match="'much' is not an amount of memory"):
        compare(files[0], files[1:], memory_budget="much")
    with pytest.raises(InputError, match=r"takes \S+, and the memory budget is 20kB; pass --memory-budget"):
        compare(files[0], files[1:], **options, memory_budget="20kB")


def test_without_a_budget_the_free_memory_is_the_limit(tmp_path, monkeypatch):
    partners(tmp_path, (620, 530))
    budgets = []
    monkeypatch.setattr(distributing, "available_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(distributing, "perform_task", lambda task: budgets.append(task.memory_budget) or Outcome())
    for given in (None, "5MB"):
        with pytest.raises(InputError, match="no matrix could be measured"):
            compare(tmp_path / "base.safetensors", [tmp_path / "tuned0.safetensors"], memory_budget=given)
    assert budgets == [2_000_000_000, 5_000_000]


@pytest.mark.slow
def test_a_process_stays_within_the_budget(tmp_path):
    """Of a matrix of real size: the process grows by less than it may, and less than by the matrix itself."""
    shape, allowed = (9000, 1600), 126_000_000
    partners(tmp_path, shape)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned0")]
    small = write_small_pair(tmp_path)
    grown = {given: peak_growth(small, files, given, tmp_path) for given in (None, allowed)}
    assert grown[allowed] < allowed < 3 * 4 * shape[0] * shape[1] < grown[None]


def write_small_pair(folder):
    files = [folder / "small_base.safetensors", folder / "small_tuned.safetensors"]
    for file in files:
        save_file({"layer.0.dense.weight": torch.randn(300, 200)}, file)
    return list(map(str, files))


def peak_growth(small, files, memory_budget, folder):
    """Bytes by which comparing `files` raises the most resident memory of a process that has compared `small`."""
    code = """
import json, pathlib, sys
import spectralbasis as sb

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

small, files, budget = json.loads(sys.argv[1])
sb.compare(small[0], small[1:], leading=8, draws=2, memory_budget=10_000_000)
before = peak()
sb.compare(files[0], files[1:], leading=8, draws=2, memory_budget=budget)
print(peak() - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SPECTRALBASIS_CACHE": str(folder / f"cache{memory_budget}")}
    command = [sys.executable, "-c", code, json.dumps([small, files, memory_budget])]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)
