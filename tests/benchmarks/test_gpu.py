"""`benchmarks/gpu.py` from end to end in Triton's interpreter, with the smallest sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _gpu_report
import gpu
import jsonschema
import pytest
import torch
from _bars import NotMeasuredError
from _gpu_common import BROKEN_DEVICE, Clock, Settings
from _gpu_sections import merge, run_section

_SCRIPT = Path(gpu.__file__)


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(_SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr and "--tiny" in done.stderr


@pytest.mark.parametrize(
    "reason", ["needs compute capability 8.0; NVIDIA T4 has 7.5", "Triton is not installed (pip install triton)", None]
)
def test_a_device_that_will_not_do_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, reason: str | None
) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: reason is None)
    monkeypatch.setattr(gpu, "refuse_device", _RefusedBecause(reason))
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(file)])
    assert gpu.main() == 2
    assert (reason or "add --tiny") in capsys.readouterr().err
    assert not file.exists()


class _RefusedBecause:
    """`refuse_device` of a machine that is not this one; goes to another process."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def __call__(self, device: str) -> str | None:
        return self.reason


def test_every_section_runs_tiny(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    file = tmp_path / "gpu.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(_SCRIPT), "--tiny", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.validate(report, json.loads((_SCRIPT.parent / "results" / "gpu.schema.json").read_text(encoding="utf-8")))
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
    assert {row["name"] for row in report["single"]} >= {"transformers BF16", "transformers BF16, static cache, torch.compile"}
    assert report["failures"]["gemlite-int4 is installed"].startswith("ModuleNotFoundError")
    assert {row["kind"] for row in report["cache"]} == {"none", "int8", "fp8", "int4"}
    assert len(report["predict"]) == len(report["batches"]) and any(row["given"] for row in report["predict"])
    assert "bar: correctness-worst-error" in done.stdout and "bar: int4-share" not in done.stdout


def test_bars_that_were_not_measured_fail_with_a_reason() -> None:
    empty = {"facts": {"interpreted": False}, "failures": {"gemlite-int4 is installed": "ModuleNotFoundError: No module named 'gemlite'"}}
    made = _gpu_report.bars(empty, ("kernels", "end-to-end", "cache"))
    assert len(made) > 20
    for bar in made:
        with pytest.raises(NotMeasuredError) as raised:
            bar.value()
        assert "gemlite" not in bar.name or "No module named" in str(raised.value)


def _settings() -> Settings:
    return Settings("cpu", True, torch.float32)


def test_a_section_that_breaks_loses_only_the_attempt_that_broke_it(tmp_path: Path) -> None:
    def work(settings: Settings) -> None:
        for number in range(4):

            def run(number: int = number) -> None:
                if number == 1:
                    os._exit(BROKEN_DEVICE)  # as after an illegal access
                if number == 2:
                    raise ValueError("two\nlines")
                settings.record("rows", {"number": number})

            settings.attempt(f"attempt {number}", run)

    report: dict[str, object] = {"failures": {}, "skipped": {}}
    merge(report, "section", run_section("section", work, _settings(), 60, tmp_path))
    assert report["rows"] == [{"number": 0}, {"number": 3}]
    assert report["failures"] == {
        "section section in 'attempt 1'": f"its process ended with {BROKEN_DEVICE}, the device in error",
        "attempt 2": "ValueError: two",
    }


def test_a_section_that_hangs_is_stopped_and_keeps_what_it_measured(tmp_path: Path) -> None:
    def work(settings: Settings) -> None:
        settings.record("rows", {"number": 0})
        settings.attempt("sleep", lambda: time.sleep(60))

    begin = time.monotonic()
    report: dict[str, object] = {"failures": {}, "skipped": {}}
    merge(report, "section", run_section("section", work, _settings(), 3, tmp_path))
    assert time.monotonic() - begin < 30
    assert report["rows"] == [{"number": 0}]
    assert report["failures"] == {"section section in 'sleep'": "stopped after 3 s"}


def test_what_has_no_time_is_listed(tmp_path: Path) -> None:
    def work(settings: Settings) -> None:
        assert not Clock(0.0, settings).allows("the rest")
        raise RuntimeError("and then this")

    report: dict[str, object] = {"failures": {}, "skipped": {}}
    merge(report, "section", run_section("section", work, _settings(), 60, tmp_path))
    assert report["skipped"] == {"section": ["the rest"]}
    assert report["failures"]["the section itself"] == "RuntimeError: and then this"  # type: ignore[index]
