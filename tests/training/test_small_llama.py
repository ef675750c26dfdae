"""A Llama that writes children's stories learns to answer questions about sentences that it has not seen."""

import pytest

pytest.importorskip("tokenizers", reason="the extra `tune` is not installed")
from benchmarks.instructions import save_model, save_questions, scored, trained


@pytest.mark.slow
@pytest.mark.data
def test_answers_to_unseen_questions_become_right(data_dir, tmp_path):
    base = save_model(data_dir / "stories260K", tmp_path / "model")
    train, test = save_questions(tmp_path)
    before = scored(base, None, test)
    assert before["exact"] == 0
    assert before["log_likelihood"] < -3
    after = trained(base, train, test, tmp_path / "adapter", 150, {})
    assert after["exact"] > 0.9
    assert after["log_likelihood"] > -0.5
