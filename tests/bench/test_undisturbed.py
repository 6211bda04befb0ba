"""Passes that waited for a core do not count while enough others are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.bench import undisturbed
from fewbit.bench.undisturbed import Passes, waited_seconds


def test_passes_that_waited_do_not_count() -> None:
    passes = Passes([1.0, 9.0, 1.2, 8.0], [0.0, 0.5, 0.01, 0.3])
    assert sorted(passes.undisturbed()) == [1.0, 1.2]
    assert passes.median() == pytest.approx(1.1)


def test_where_all_waited_those_that_waited_least_count() -> None:
    passes = Passes([3.0, 1.0, 2.0, 4.0, 5.0, 6.0], [0.3, 0.1, 0.2, 0.4, 0.5, 0.6])
    assert sorted(passes.undisturbed()) == [1.0, 2.0]


def test_a_pass_is_timed_or_gives_its_own_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 0.0, 1.0, 100.0])
    monkeypatch.setattr(undisturbed, "waited_seconds", lambda: next(waited))
    passes = Passes()
    passes.run(lambda: None)
    passes.run(lambda: 42.0)
    assert len(passes) == 2
    assert passes.values[0] > 0
    assert passes.waiting[0] == 0
    assert passes.undisturbed() == [passes.values[0]]


def test_waiting_is_the_second_field_of_every_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, line in (("7", "100 2000000000 3"), ("8", "100 500000000 3"), ("9", "gone")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(line)
    monkeypatch.setattr(undisturbed, "_TASKS", tmp_path)
    assert waited_seconds() == pytest.approx(2.5)
    monkeypatch.setattr(undisturbed, "_TASKS", tmp_path / "nowhere")
    assert waited_seconds() == 0.0
