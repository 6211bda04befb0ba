"""`fewbit predict`: the worked examples, the axes, and input that cannot be meant."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fewbit.cli import main
from fewbit.errors import FewbitError, UnsupportedModelError, UsageError
from fewbit.predict.prediction import PredictResults
from fewbit.report.predict_table import predict_csv, render_predict
from fewbit.workflows.predict import predict_model

ORIN = {"hardware": "agx-orin-64gb", "bandwidth_gb_s": 200}


def by_scheme(results: PredictResults) -> dict[str, Any]:
    return {p.point.scheme: p for p in results.predictions}


def test_worked_example_of_the_bandwidth_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "7e9", "--hardware", "agx-orin-64gb", "--bandwidth", "200", "--estimator", "bandwidth", "--json", "--measured"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "bf16 decode 94 ms"])
    assert not stop.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["calibration_scale"] == 1.34
    times = {p["format"]: p["milliseconds"]["value"] for p in document["predictions"]}
    assert times == {"BF16": 94.0, "INT8": 47.0, "INT4": 23.5}
    assert document["predictions"][0]["floor_milliseconds"] == 70.0


def test_the_full_model_is_slower_and_has_an_interval() -> None:
    int4 = by_scheme(predict_model("7e9", measured=["bf16 decode 94 ms"], **ORIN))["W4A16"].milliseconds  # type: ignore[arg-type]
    assert 23.5 < int4.low < int4.value < int4.high  # not even its fast end reads 4-bit weights at more of the bandwidth than BF16's


def test_worked_example_of_the_prefill() -> None:
    results = predict_model("7e9", measured=["bf16 prefill 16 x 1024 13.38 s"], **ORIN)  # type: ignore[arg-type]
    (measured,) = results.measured
    assert round(measured.operations / 1e12) == 229
    assert round(measured.tflop_s) == 17
    assert measured.bound == "compute"
    assert any("229 TFLOP" in line and "compute-bound" in line for line in results.conclusions)
    w4a16 = by_scheme(results)["W4A16"]
    assert (w4a16.point.phase, w4a16.point.batch, w4a16.point.context) == ("prefill", 16, 1024)
    assert w4a16.speedup_over_bf16.value <= 1.0
    assert any(line.startswith("W4A16 prefill") and "compute-bound" in line for line in results.conclusions)


def test_impossible_measurements_do_not_calibrate() -> None:
    impossible = predict_model("7e9", measured=["bf16 decode 9 ms"], **ORIN)  # type: ignore[arg-type]
    assert any("impossible" in text for text in impossible.warnings)
    assert impossible.calibration_scale is None
    assert by_scheme(impossible)["BF16"].milliseconds == by_scheme(predict_model("7e9", **ORIN, contexts=[0]))["BF16"].milliseconds  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="impossible"):
        predict_model("7e9", measured=["bf16 decode 9 ms"], estimator="bandwidth", **ORIN)  # type: ignore[arg-type]


def test_points_that_contradict_each_other_widen_the_intervals() -> None:
    texts = ["bf16 decode 94 ms", "bf16 decode 190 ms"]
    results = predict_model("7e9", measured=texts, **ORIN)  # type: ignore[arg-type]
    assert any("contradict" in text for text in results.warnings)
    bf16, alone = (by_scheme(r)["BF16"].milliseconds for r in (results, predict_model("7e9", measured=texts[:1], **ORIN)))  # type: ignore[arg-type]
    assert bf16.high / bf16.low > alone.high / alone.low


def test_batch_and_context_are_axes() -> None:
    results = predict_model("qwen2.5-7b", hardware="h100-sxm", batches=[1, 64], contexts=[128, 8192], kv=["BF16", "KV-INT8"])
    times = {(p.point.scheme, p.point.kv, p.point.batch, p.point.context): p.milliseconds.value for p in results.predictions}
    assert len(times) == len(results.predictions) == 2 * 2 * 2 * len({p.point.scheme for p in results.predictions})
    assert times["BF16", "BF16", 64, 8192] > times["BF16", "BF16", 64, 128] > times["BF16", "BF16", 1, 128]
    assert times["BF16", "KV-INT8", 64, 8192] < times["BF16", "BF16", 64, 8192]
    assert {"FP8", "W8A8"} <= {p.point.scheme for p in results.predictions}
    assert any("BF16 decode" in line and "compute-bound" in line for line in results.bounds)
    assert results.suggestion is not None and results.suggestion.width_after <= results.suggestion.width_before


def test_a_small_model_on_a_fast_device_is_overhead_bound() -> None:
    results = predict_model("qwen2.5-0.5b", hardware="h100-sxm")
    assert by_scheme(results)["BF16"].bound == "overhead"
    assert any("overhead-bound" in line for line in results.conclusions)


def test_prints_every_term(capsys: pytest.CaptureFixture[str]) -> None:
    results = predict_model("qwen2.5-7b", hardware="h100-sxm", schemes=["BF16", "INT4"], kv=["KV-INT8"])
    buffer = io.StringIO()
    render_predict(results, Console(file=buffer, width=200), explain=True)
    text = buffer.getvalue()
    for word in ("down_proj", "lm_head", "attention", "overhead", "Measure next", "operator_us", "Where decode turns"):
        assert word in text, word
    rows = list(csv.DictReader(io.StringIO(predict_csv(results))))
    assert [row["format"] for row in rows] == ["BF16", "INT4"]
    assert float(rows[0]["ms"]) == results.predictions[0].milliseconds.value


def test_its_own_json_is_a_list_of_measurements(tmp_path: Path) -> None:
    from pydantic import TypeAdapter

    first = predict_model("7e9", measured=["bf16 decode 94 ms"], **ORIN)  # type: ignore[arg-type]
    file = tmp_path / "predicted.json"
    file.write_bytes(TypeAdapter(PredictResults).dump_json(first))
    again = predict_model("7e9", measured=[str(file)], **ORIN)  # type: ignore[arg-type]
    assert again.predictions == first.predictions


def test_a_measured_machine_is_a_device(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    figures = {
        "read_bandwidth_gb_s": 20.0,
        "bandwidth_method": "x",
        "gemm_gflop_s": 100.0,
        "gemm_dtype": "bfloat16",
        "time_per_null_op_us": 2.0,
    }
    file.write_text(json.dumps(figures))
    results = predict_model("qwen2.5-0.5b", hardware="this-machine", machine=file)
    assert results.bandwidth_gb_s == 20.0
    file.write_text("{}")
    with pytest.raises(UsageError, match="no measurement of a machine"):
        predict_model("qwen2.5-0.5b", hardware="this-machine", machine=file)


def test_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['fewbit', 'predict', 'llama-3-70b', '--hardware', 'h100-sxm', '--json']\n"
        "from fewbit.cli import main\ntry:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perpetual-motion"}')
    with pytest.raises(UnsupportedModelError):
        predict_model(tmp_path, hardware="h100-sxm")


@pytest.mark.parametrize(
    "arguments",
    [
        {"hardware": "no-such-device"},
        {"bandwidth_gb_s": -3.0},
        {"bandwidth_gb_s": float("nan")},
        {"estimator": "crystal-ball"},
        {"schemes": ["W5A16"]},
        {"phases": ["swim"]},
        {"kv": ["W4A16"]},
        {"batches": [0]},
        {"contexts": [-1]},
        {"contexts": [0], "phases": ["prefill"]},
        {"batches": list(range(1, 3000))},
        {"layers": 3},
        {"estimator": "bandwidth", "batches": [2]},
        {"estimator": "bandwidth", "phases": ["prefill"]},
        {"estimator": "bandwidth", "measured": ["bf16 prefill 16 x 1024 13.38 s"]},
        {"machine": Path("x.json")},
        {"model": "-7e9"},
        {"model": "7e30"},
    ],
)
def test_what_cannot_be_meant(arguments: dict[str, Any]) -> None:
    with pytest.raises(FewbitError):
        predict_model(**{"model": "7e9", "hardware": "agx-orin-64gb", **arguments})


def test_figures_show_steps_and_roofs(tmp_path: Path) -> None:
    from fewbit.report.predict_figures import predict_figures, write_predict_figures

    results = predict_model("qwen2.5-7b", hardware="h100-sxm", phases=["decode", "prefill"])
    files = write_predict_figures(results, tmp_path)
    assert [file.name for file in files] == ["latency-bytes.svg", "roofline.svg"]
    latency, roofline = (file.read_text() for file in files)
    assert "W4A16" in latency and "GB" in latency
    assert "TFLOP/s" in roofline and "BF16 prefill, batch 1" in roofline
    (only,) = predict_figures(predict_model("7e9", estimator="bandwidth", **ORIN))  # type: ignore[arg-type]
    assert only.name == "latency-bytes"


def test_a_runtime_has_a_prior_of_its_own() -> None:
    times = {
        runtime: by_scheme(predict_model("llama-3-8b", hardware="h100-sxm", runtime=runtime))["W4A16"].milliseconds.value
        for runtime in (None, "torch", "llama.cpp")
    }
    assert len(set(times.values())) == 3
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        predict_model("llama-3-8b", hardware="h100-sxm", runtime="abacus")
