"""Writing a report's files: whole or not at all, and nothing in the place of what is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fewbit.errors import OutputError
from fewbit.report.files import ensure_writable, write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.csv"
    assert write_text(path, "one\n") == path
    write_text(path, "two é\n")
    assert path.read_text(encoding="utf-8") == "two é\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "target.csv").write_text("old")
    link = tmp_path / "link.csv"
    link.symlink_to("target.csv")
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "target.csv").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    try:
        write_text(path, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(OutputError, match=r"cannot write /dev/full: No space left"):
        write_text(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="it is a directory"):
        write_text(tmp_path, "text")
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "file" / "a.csv", "text")
    with pytest.raises(OutputError, match="with --out"):
        ensure_writable(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
