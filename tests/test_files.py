"""Reading and writing whole files."""

import pytest
from whisper_meft.files import read_json


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_mark(tmp_path, encoding):
    (tmp_path / "o.json").write_text('{"labels": ["é"]}', encoding=encoding)
    assert read_json(tmp_path / "o.json") == {"labels": ["é"]}
