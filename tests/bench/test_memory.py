"""Memory figures: arithmetic, scaling, and a peak that is really measured in another process."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewbit.bench import peak_worker
from fewbit.bench.memory import PeakMeter, PeakRequest, memory_result, sequences_that_fit
from fewbit.bench.scaling import LayerScale
from fewbit.checkpoints.sources import DirectorySource
from fewbit.errors import MeasurementError
from fewbit.formats.spec import get_scheme
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import LoadedModel, load_model

MIB = 2**20
STACK_WEIGHTS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)


@pytest.fixture(scope="module")
def meter() -> Iterator[PeakMeter]:
    with PeakMeter(timeout_s=300) as meter:
        yield meter


def load(directory: Path, scheme: str) -> LoadedModel:
    return load_model(DirectorySource(directory), QuantizationConfig(get_scheme(scheme), kernel=None))


def test_a_peak_is_seen_and_does_not_stay(meter: PeakMeter) -> None:
    large, baseline = meter.measure_call("torch:ones", [50_000_000])
    assert 190 * MIB <= large - baseline <= 260 * MIB
    small, _ = meter.measure_call("torch:ones", [1000])
    assert small < large - 150 * MIB  # a process of its own: the large peak is not remembered


def test_a_variant_is_loaded_and_run(meter: PeakMeter, tiny_llama_dir: Path) -> None:
    peak, baseline = meter.measure(PeakRequest(scheme="W8A16", model=str(tiny_llama_dir), prompt_tokens=16, decode_steps=2))
    assert peak > baseline > 0


def test_failures_name_the_reason_and_the_worker_survives(meter: PeakMeter) -> None:
    with pytest.raises(MeasurementError, match="no-such-model"):
        meter.measure(PeakRequest(scheme="BF16", model="./no-such-model"))
    with pytest.raises(MeasurementError, match="JSONDecodeError: Expecting property name"):
        meter.measure_call("json:loads", ["{"])
    if sys.platform == "linux":
        with pytest.raises(MeasurementError, match="killed by signal 9"):
            meter.measure_call("signal:raise_signal", [9])
        with pytest.raises(MeasurementError, match="exited with 3"):
            meter.measure_call("os:_exit", [3])
    assert meter.measure_call("torch:ones", [10])[0] > 0


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'no torch here' >&2\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with PeakMeter() as meter, pytest.raises(MeasurementError, match=r"without an answer: no torch here"):
        meter.measure_call("json:loads", ["1"])


def test_a_worker_that_does_not_answer() -> None:
    with PeakMeter(timeout_s=0.05) as meter, pytest.raises(MeasurementError, match="did not answer"):
        meter.measure_call("time:sleep", [60])


def test_the_answer_is_json() -> None:
    document = peak_worker.answer(json.dumps({"call": "builtins:len", "arguments": [[1, 2]]}))
    assert document["peak_bytes"] >= document["baseline_bytes"] > 0
    assert "JSONDecodeError" in peak_worker.answer("not json")["error"]


def test_sequences_that_fit() -> None:
    fit = sequences_that_fit(budget_bytes=1000, weight_bytes=400, context=10, kv_bytes_per_token=9.5, kv_constant_bytes=5)
    assert fit == 6
    assert sequences_that_fit(budget_bytes=100, weight_bytes=400, context=10, kv_bytes_per_token=9.5, kv_constant_bytes=5) == 0


def test_memory_of_bf16(tiny_llama_dir: Path) -> None:
    loaded = load(tiny_llama_dir, "BF16")
    result = memory_result(loaded, context=100, budget_bytes=10 * MIB, disk_bytes=7, peak=(900, 600))
    assert result.resident_weight_bytes == loaded.resident_weight_bytes
    assert result.quantized_linear_bytes == 0
    assert result.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2  # keys and values, layers, heads, head_dim, BF16
    assert result.kv_constant_bytes == 0
    assert result.kv_sequences_that_fit == (10 * MIB - loaded.resident_weight_bytes) // (100 * 512)
    assert (result.peak_rss_bytes, result.baseline_rss_bytes, result.disk_bytes) == (900, 600, 7)


def test_scaled_memory_is_that_of_a_deeper_model(tiny_llama_dir: Path) -> None:
    for scheme in ("BF16", "W4A16", "KV-INT4"):
        loaded = load(tiny_llama_dir, scheme)
        whole = memory_result(loaded, context=100, budget_bytes=100 * MIB, peak=(900 * MIB, 600 * MIB))
        scaled = memory_result(loaded, context=100, budget_bytes=100 * MIB, peak=(900 * MIB, 600 * MIB), scale=LayerScale(2, 20))
        assert scaled.kv_bytes_per_token == 10 * whole.kv_bytes_per_token
        assert scaled.kv_constant_bytes == 10 * whole.kv_constant_bytes
        assert scaled.quantized_linear_bf16_bytes == 10 * whole.quantized_linear_bf16_bytes
        assert scaled.quantized_linear_bytes == 10 * whole.quantized_linear_bytes
        assert scaled.effective_bits_per_weight == whole.effective_bits_per_weight
        missing = scaled.resident_weight_bytes - whole.resident_weight_bytes
        assert scaled.peak_rss_bytes is not None and scaled.peak_rss_bytes - 900 * MIB == missing
        norms = 2 * 2 * 128 * 2
        if loaded.quantized_linear_bytes:
            assert missing == 9 * (loaded.quantized_linear_bytes + norms)
            assert whole.effective_bits_per_parameter > scaled.effective_bits_per_parameter > 4.125  # a deep model is mostly layers
        else:
            assert missing == 9 * (2 * STACK_WEIGHTS + norms)
            assert scaled.effective_bits_per_parameter == pytest.approx(16.0)


def test_kv_bytes_are_read_off_the_cache(tiny_llama_dir: Path) -> None:
    plain, quantized = (memory_result(load(tiny_llama_dir, s), context=10, budget_bytes=MIB) for s in ("BF16", "KV-INT4"))
    assert quantized.kv_bytes_per_token < 0.35 * plain.kv_bytes_per_token
    assert quantized.kv_constant_bytes > 0


def test_requests_are_json() -> None:
    request = PeakRequest(scheme="W4A16", shapes="qwen2.5-0.5b", num_layers=2)
    assert json.loads(json.dumps(dataclasses.asdict(request))) == dataclasses.asdict(request)
    assert torch.get_num_threads() >= request.threads
