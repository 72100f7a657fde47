import os

import pytest

from involution.files import replacing, write_json, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    write_json(path, {"a": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]
