"""The machine's figures are finite and labelled; how large they are is the machine's business."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from fewbit.bench import machine
from fewbit.results import MachineResult


def test_figures_and_json_round_trip() -> None:
    result = machine.measure_machine(quick=True)
    assert result.read_bandwidth_gb_s > 0
    assert result.gemm_gflop_s > 0
    assert result.time_per_null_op_us > 0
    assert result.gemm_dtype == "bfloat16"
    assert "MiB" in result.bandwidth_method
    adapter = TypeAdapter(MachineResult)
    assert adapter.validate_json(json.dumps(dataclasses.asdict(result))) == result


def test_without_the_native_probe_a_torch_sum_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fewbit._native", None)
    bandwidth, method = machine.measure_read_bandwidth(passes=1)
    assert bandwidth > 0
    assert method.startswith("torch sum")


def test_the_native_probe_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, float]] = []

    def read_bandwidth(size: int, threads: int, seconds: float) -> float:
        asked.append((size, threads, seconds))
        return 12.5

    probe = types.ModuleType("fewbit._native")
    probe.read_bandwidth = read_bandwidth  # type: ignore[attr-defined]
    probe.instruction_set = lambda: "avx2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fewbit._native", probe)
    assert machine.measure_read_bandwidth(passes=2) == (12.5, "native avx2 read of 512 MiB, 1 threads, best pass")
    assert asked[0][0] >= 8 * min(machine.last_level_cache_bytes(), 64 * 2**20)


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "96M", "weird")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.last_level_cache_bytes(tmp_path) == 96 * 2**20
    assert machine.last_level_cache_bytes(tmp_path / "missing") == 32 * 2**20
