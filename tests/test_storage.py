"""Files are written whole or not at all, and what is held is held by one."""

from pathlib import Path
from typing import NoReturn

import pytest
from etils import epath

from gddim.storage import free_bytes, locked, write_whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    file = epath.Path(tmp_path / "results.jsonl")
    write_whole(file, b"old")
    (tmp_path / ".results.jsonl.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"results\.jsonl: No space left on device; what was there before remains$"):
        write_whole(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert file.read_bytes() == b"old"


def test_what_is_locked_is_held_by_one_and_let_go(tmp_path):
    def refuse() -> NoReturn:
        raise RuntimeError("held")

    for path in (tmp_path, tmp_path / "lock"):  # a folder that is there, a file that is made
        with locked(path), pytest.raises(RuntimeError, match="held"):
            locked(path, refuse).__enter__()
        with locked(path, refuse):
            pass
    with locked(epath.Path("gs://bucket/run"), refuse), locked(epath.Path("gs://bucket/run"), refuse):
        pass


def test_a_bucket_has_room(tmp_path):
    assert 0 < free_bytes(tmp_path) < free_bytes(epath.Path("gs://bucket/run")) == float("inf")
