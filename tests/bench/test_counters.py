"""perf's output is read whatever the machine allows it to say."""

from __future__ import annotations

import shutil

import pytest

from fewbit.bench import counters

FULL = """1000,,cycles:u,100,100.00,,
4000,,instructions:u,100,100.00,4.00,insn per cycle
20.50,msec,task-clock,20500000,100.00,0.9,CPUs utilized
"""
VIRTUAL = """<not supported>,,cycles,0,100.00,,
<not supported>,,instructions,0,100.00,,
8.00,msec,task-clock,4063400,100.00,0.034,CPUs utilized
49,,page-faults,4063400,100.00,12.059,K/sec
"""


def test_values_are_per_step() -> None:
    result = counters.parse_perf_stat(FULL, steps=10)
    assert result.values == {"cycles": 100.0, "instructions": 400.0, "task-clock": 2.05}
    assert result.note == ""


def test_a_virtual_machine_without_hardware_counters() -> None:
    result = counters.parse_perf_stat(VIRTUAL, steps=2)
    assert result.values == {"task-clock": 4.0, "page-faults": 24.5}
    assert "no hardware counters" in result.note
    assert "cycles" in result.note


def test_refused() -> None:
    result = counters.parse_perf_stat("Error:\nAccess to performance monitoring is limited.\n", steps=2)
    assert result.values == {}
    assert "counts nothing" in result.note


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = counters.measure_counters(lambda: pytest.fail("no step without perf"), steps=1)
    assert result.values == {}
    assert "not installed" in result.note


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_attached_to_this_process() -> None:
    ran = []
    result = counters.measure_counters(lambda: ran.append(sum(range(10_000))), steps=5)
    assert len(ran) == 5
    assert result.values or result.note
