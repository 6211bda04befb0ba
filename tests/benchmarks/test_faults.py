"""The short form of benchmarks/faults.py: three kills, a full disk where one can be made, and every kind of broken weights and inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from _bars import NotMeasuredError
from faults import BROKEN, Faults


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"), seed=3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has loaded torch, which only Linux takes well")
def test_killed_runs_give_the_same_bytes(faults: Faults) -> None:
    faults.kill(3)
    assert faults.killed >= 2 and not faults.differing


def test_a_full_disk_stops_it_cleanly(faults: Faults) -> None:
    try:
        assert not faults.full_disk()
    except NotMeasuredError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_weights_and_inputs(name: str, tmp_path: Path) -> None:
    assert not BROKEN[name](tmp_path)
