"""`evaluate` joins corpus, windows and models; its table shows every figure."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from fewbit.errors import CorpusError, UsageError
from fewbit.report.evaluate_table import render_evaluate
from fewbit.results import EvaluateResults
from fewbit.workflows.evaluate import evaluate


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("\n".join(f"def function_{i}(argument): return argument + {i}" for i in range(150)))
    return file


@pytest.fixture(scope="module")
def bf16(tiny_llama_dir: Path, text: Path) -> EvaluateResults:
    return evaluate(tiny_llama_dir, texts=[text], max_tokens=1536)


@pytest.fixture(scope="module")
def int4(tiny_llama_dir: Path, text: Path) -> EvaluateResults:
    return evaluate(tiny_llama_dir, scheme="w4a16-g32", texts=[text], max_tokens=1536, threshold=1000.0)


def test_bf16_has_a_perplexity_and_nothing_to_compare_with(bf16: EvaluateResults) -> None:
    assert (bf16.scheme, bf16.method, bf16.quality, bf16.noise_floor) == ("BF16", "none", None, None)
    assert bf16.protocol.corpus == "notes.txt"
    assert bf16.protocol.scored_tokens == 3 * 511
    assert bf16.perplexity.low < bf16.perplexity.value < bf16.perplexity.high


def test_a_quantized_scheme_is_compared_with_bf16_on_the_same_windows(bf16: EvaluateResults, int4: EvaluateResults) -> None:
    assert int4.protocol == bf16.protocol
    assert int4.weights_sha256 == bf16.weights_sha256
    assert (int4.scheme, int4.method) == ("W4A16-G32", "rtn")
    assert int4.quality is not None and int4.noise_floor is not None
    ratio = int4.perplexity.value / bf16.perplexity.value
    assert int4.quality.perplexity_delta_percent.value == pytest.approx(100 * (ratio - 1), abs=1e-3)
    assert int4.quality.kl_divergence_nats.value > 10 * int4.noise_floor.kl_divergence_nats
    assert int4.quality.passed


def test_a_kv_scheme_changes_the_quality_without_changing_the_weights(tiny_llama_dir: Path, text: Path) -> None:
    results = evaluate(tiny_llama_dir, scheme="KV-INT4", texts=[text], max_tokens=1024)
    assert results.method == "none"
    assert results.quality is not None and results.noise_floor is not None
    assert results.quality.kl_divergence_nats.low > results.noise_floor.kl_divergence_nats


def test_against_names_another_model(tiny_llama_dir: Path, text: Path) -> None:
    results = evaluate(tiny_llama_dir, against=tiny_llama_dir, texts=[text], max_tokens=1024)
    assert results.scheme == "BF16"
    assert results.quality is not None and results.quality.kl_divergence_nats.value == 0.0


def test_results_survive_json(int4: EvaluateResults) -> None:
    adapter = TypeAdapter(EvaluateResults)
    text = adapter.dump_json(int4)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert adapter.validate_json(text) == int4


def test_progress_names_what_is_read(tiny_llama_dir: Path, text: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(tiny_llama_dir, scheme="W8A16", texts=[text], max_tokens=1024, progress=lambda *step: seen.append(step))
    assert [what for done, total, what in seen if done == total] == ["BF16", "noise floor", "W8A16"]


def test_bad_input_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown scheme 'W5A16'"):
        evaluate(tmp_path, scheme="W5A16")
    with pytest.raises(CorpusError, match="does not exist"):
        evaluate(tmp_path, texts=[tmp_path / "missing.txt"])


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_shows_every_figure(int4: EvaluateResults, width: int) -> None:
    stream = io.StringIO()
    render_evaluate(int4, Console(file=stream, width=width))
    shown = stream.getvalue()
    assert int4.quality is not None
    for figure in (
        f"{int4.perplexity.value:,.2f}",
        f"{int4.quality.kl_divergence_nats.value:.5f}",
        f"{int4.quality.flip_share.value:.2%}",
        "pass",
    ):
        assert figure in shown
    assert int4.protocol.text_sha256[:12] in shown.replace("\n", "")
    assert max(map(len, shown.splitlines())) <= width
