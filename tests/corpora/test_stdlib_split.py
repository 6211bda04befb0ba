"""The split of the standard library: whole modules, no leaks, independent of what a distribution leaves out."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from fewbit.corpora.stdlib import ALWAYS_TRAIN, is_held_out, stdlib_documents, stdlib_files, unit_of
from fewbit.errors import CorpusError


def test_units() -> None:
    assert unit_of(PurePosixPath("json/decoder.py")) == "json"
    assert unit_of(PurePosixPath("queue.py")) == "queue"
    assert unit_of(PurePosixPath("test/test_json/test_dump.py")) == "json"
    assert unit_of(PurePosixPath("test/test_queue.py")) == "queue"


def test_the_split_never_changes() -> None:
    """The bundled model was trained on this split: another one would measure it on what it has seen."""
    units = ["json", "logging", "inspect", "dataclasses", "queue", "operator", "asyncio", "email", "argparse", "typing", "os"]
    assert [unit for unit in units if is_held_out(unit)] == ["json", "logging", "inspect", "dataclasses", "queue", "operator"]
    assert not any(is_held_out(unit) for unit in ALWAYS_TRAIN)


def test_no_unit_is_on_both_sides_and_no_test_of_a_held_out_unit_is_trained_on() -> None:
    train, held_out = set(stdlib_files("train")), set(stdlib_files("held-out"))
    root = next(path.parent for path in held_out if path.name == "queue.py")
    held_out_units = {unit_of(PurePosixPath(path.relative_to(root).as_posix())) for path in held_out}
    train_units = {unit_of(PurePosixPath(path.relative_to(root).as_posix())) for path in train}
    assert held_out_units and train_units
    assert not held_out_units & train_units


def test_documents_come_in_a_fixed_order() -> None:
    names = [name for name, _ in stdlib_documents("held-out")]
    assert names == sorted(names)


def test_an_interpreter_without_sources_gets_an_error_that_names_text(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("x = 1\n")
    with pytest.raises(CorpusError, match="has no source text") as caught:
        stdlib_documents("held-out", tmp_path)
    assert "--text" in caught.value.remedy
