"""The harness of benchmarks/ and the bars of the comparison, on results made by hand."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import compare_bars
import pytest
from _bars import Bar, NotMeasuredError, measure, run_bars

REPOSITORY = Path(__file__).parents[2]


def _raise() -> float:
    raise NotMeasuredError("the peer\ndid not install")


def test_a_line_has_name_value_operator_threshold_verdict() -> None:
    assert measure(Bar("speed", lambda: 1.25, ">=", 1.1)).line() == "bar: speed 1.25 >= 1.1 pass"
    assert measure(Bar("speed", lambda: 1.0, ">=", 1.1)).line() == "bar: speed 1 >= 1.1 fail"


def test_what_cannot_be_measured_fails_with_its_reason() -> None:
    assert measure(Bar("peer", _raise, "<", 1)).line() == "bar: peer - < 1 fail (the peer did not install)"
    assert measure(Bar("nan", lambda: float("nan"), "<", 1)).line() == "bar: nan - < 1 fail (measured nan)"


@pytest.mark.parametrize(("op", "holds"), [("<", False), ("<=", True), (">", False), (">=", True), ("==", True)])
def test_operators_at_the_threshold(op: str, holds: bool) -> None:
    assert measure(Bar("x", lambda: 2.0, op, 2.0)).passed is holds


def test_a_bar_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="operator '=<'"):
        Bar("x", lambda: 1.0, "=<", 1.0)
    with pytest.raises(ValueError, match="one word"):
        Bar("two words", lambda: 1.0, "<", 1.0)
    with pytest.raises(ValueError, match="not unique"):
        run_bars([Bar("x", lambda: 1.0, "<", 2.0), Bar("x", lambda: 1.0, "<", 2.0)])


def test_exit_code_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Bar("good", lambda: 1.0, "<", 2.0, "note"), Bar("bad", _raise, "<", 2.0)
    assert run_bars([good]) == 0
    assert run_bars([good, bad], json_file=tmp_path / "sub" / "bars.json") == 1
    outcomes = json.loads((tmp_path / "sub" / "bars.json").read_text())
    assert [(o["name"], o["value"], o["passed"]) for o in outcomes] == [("good", 1.0, True), ("bad", None, False)]
    assert capsys.readouterr().out.count("bar: ") == 3


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bars([Bar("bad", _raise, "<", 2.0, "a note")], list_only=True) == 0
    assert capsys.readouterr().out == "bad < 2  a note\n"


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "benchmarks").glob("[!_]*.py")))
def test_every_script_lists_its_bars_without_measuring(script: str) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), "--list"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.strip()


def _example_results() -> ModuleType:
    """tests/report/example_results.py: results built by hand."""
    spec = spec_from_file_location("example_results", REPOSITORY / "tests" / "report" / "example_results.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results_file(tmp_path: Path) -> Path:
    from fewbit.decide.conclusions import conclude
    from fewbit.report.results_file import write_results

    results = _example_results().example_results()
    return write_results(dataclasses.replace(results, conclusions=conclude(results)), tmp_path)


def _outcomes(path: Path) -> dict[str, bool]:
    # INT2 is evaluated with the real model when the file has no such row; that is not this test's business.
    bars = [bar for bar in compare_bars.bars(compare_bars.Results(path)) if not bar.name.startswith("int2")]
    return {bar.name: measure(bar).passed for bar in bars}


def test_the_bars_of_the_comparison_pass_on_good_results(results_file: Path) -> None:
    outcomes = _outcomes(results_file)
    assert all(outcomes.values()), [name for name, passed in outcomes.items() if not passed]


def test_the_bars_of_the_comparison_fail_on_bad_results(results_file: Path) -> None:
    document = json.loads(results_file.read_text())
    for row in document["variants"]:
        row["memory"]["quantized_linear_bytes"] = row["memory"]["quantized_linear_bf16_bytes"]
        row["memory"]["kv_bytes_per_token"] = 100.0
        row["quality"]["perplexity"]["value"] = 10.0
        row["quality"]["perplexity_delta_percent"]["value"] = -0.6
        if row["memory"]["effective_bits_per_weight"] is not None:
            row["memory"]["effective_bits_per_weight"] = 4.6
    for row in document["shapes"]["variants"]:
        row["latency"]["decode_ms_p50"] = 5.0
    document |= {"duration_s": 400.0, "conclusions": []}
    document["variants"] = [row for row in document["variants"] if row["variant"]["scheme"] != "FP8A16"]
    results_file.write_text(json.dumps(document))
    assert [name for name, passed in _outcomes(results_file).items() if passed] == ["results-schema-errors"]


def test_a_missing_file_fails_every_bar_with_the_same_reason(tmp_path: Path) -> None:
    outcomes = [measure(bar) for bar in compare_bars.bars(compare_bars.Results(tmp_path / "results.json"))]
    assert not any(outcome.passed for outcome in outcomes)
    assert len({outcome.reason for outcome in outcomes}) == 1
