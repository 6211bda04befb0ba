"""An output directory is whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fewbit.checkpoints.directory import output_directory
from fewbit.errors import OutputError


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with output_directory(out) as partial:
        assert partial.name == "out.partial" and not out.exists()
        (partial / "config.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["config.json"] and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), output_directory(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("old")
    with output_directory(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_directories_are_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with output_directory(out) as partial:  # empty: nothing to lose
        (partial / "config.json").write_text("old")
    with pytest.raises(OutputError, match="not empty"), output_directory(out):
        pass
    with pytest.raises(ValueError), output_directory(out, overwrite=True):
        raise ValueError
    assert (out / "config.json").read_text() == "old"
    with output_directory(out, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="something else than a checkpoint"), output_directory(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out.*part of the path is a file"), output_directory(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputError, match="is a file"), output_directory(tmp_path / "file"):
        pass


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No space.*free some space"), output_directory(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_the_root_of_the_file_system_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot be replaced"), output_directory("/", overwrite=True):
        pass
