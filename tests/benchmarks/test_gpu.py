"""`benchmarks/gpu.py` from end to end in Triton's interpreter, with the smallest sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from _bars import NotMeasuredError

_SCRIPT = Path(gpu.__file__)


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(_SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr and "--tiny" in done.stderr


def test_every_section_runs_tiny(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    file = tmp_path / "gpu.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(_SCRIPT), "--tiny", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["facts"]["interpreted"] is True
    assert {row["kernel"] for row in report["correctness"]} >= {
        "triton-weight-only",
        "triton-w8a8",
        "triton-llm-int8",
        "triton-unfused",
        "attention",
    }
    assert {row["contender"] for row in report["kernels"]} == {"BF16", "W4A16", "W8A8"}
    assert {row["name"] for row in report["single"]} >= {"fewbit BF16", "fewbit INT4 fused", "fewbit NF4 unfused", "fewbit LLM.int8()"}
    assert {row["kind"] for row in report["cache"]} == {"none", "int8", "fp8", "int4"}
    assert len(report["predict"]) == len(report["batches"]) and any(row["given"] for row in report["predict"])
    assert "bar: correctness-worst-error" in done.stdout and "bar: int4-share" not in done.stdout


def test_bars_that_were_not_measured_fail_with_a_reason() -> None:
    empty = {"facts": {"interpreted": False}, "kernels": [], "single": [], "cache": [], "correctness": [], "failures": {}}
    made = gpu.bars(empty, ("kernels", "end-to-end", "cache"))
    assert len(made) > 20
    for bar in made:
        with pytest.raises(NotMeasuredError):
            bar.value()
