"""Reading and writing whole files."""

import pytest
from whisper_meft.errors import UserError
from whisper_meft.files import check_writable, read_json


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_mark(tmp_path, encoding):
    (tmp_path / "o.json").write_text('{"labels": ["é"]}', encoding=encoding)
    assert read_json(tmp_path / "o.json") == {"labels": ["é"]}


@pytest.mark.parametrize("place", ["config.json", "new/config.json", "a/b/c/config.json"])
def test_a_folder_of_any_other_name_is_not_in_the_way(place, tmp_path):
    for name in ("probe", ".probe", "config", "test"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder: it is a folder, a file name is needed"):
        check_writable(tmp_path / "folder")
    for place in ("file/config.json", "file/more/config.json"):
        with pytest.raises(UserError, match=r"cannot write .*config.json: .*file is not a folder"):
            check_writable(tmp_path / place)
