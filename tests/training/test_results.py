"""What `tune` leaves beside a model is read back, or refused where it is damaged."""

import pytest

from spectralbasis.errors import InputError
from spectralbasis.training.outcomes import stored


def test_what_was_stored_is_read(tmp_path):
    (tmp_path / "tuning.json").write_text('{"settings": {"max_length": 32}}')
    assert stored(tmp_path) == {"settings": {"max_length": 32}}


def test_other_folders_have_no_settings(tmp_path):
    assert stored(tmp_path) == {}
    assert stored(tmp_path / "absent") == {}
    (tmp_path / "tuning.json").write_text('{"rows": []}')
    assert stored(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b'{"settings": {"max_le', b"\xff\xfe{}", b"[1]", b'{"settings": 3}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tuning.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tuning\.json.*tune again"):
        stored(tmp_path)
