"""Rows that a model cannot have: left out and named among the default rows, an error when they were asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.bench.latency import LatencySettings
from fewbit.bench.machine import measure_machine
from fewbit.errors import FewbitError, FormatError, ModelError
from fewbit.workflows import bench as bench_workflow
from fewbit.workflows import compare as compare_workflow
from fewbit.workflows.bench import bench
from fewbit.workflows.compare import CompareSettings, compare
from fewbit.workflows.evaluate import evaluate
from fewbit.workflows.generate import generate_text

SHORT = LatencySettings(prompt_tokens=8, context_tokens=8, decode_steps=6, budget_s=0.1, prefill_repetitions=1)
SETTINGS = CompareSettings(latency=SHORT, max_tokens=256, peak=False)


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is measured in short, over a small buffer; no test here looks at it."""
    monkeypatch.setattr("fewbit.bench.machine._MAX_BUFFER_BYTES", 64 << 20)
    monkeypatch.setattr(compare_workflow, "measure_machine", partial(measure_machine, quick=True))


@pytest.fixture(scope="module")
def odd(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose dimensions 128, 64 and 32 do not divide."""
    directory = tmp_path_factory.mktemp("models") / "odd"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=80,
        intermediate_size=200,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    return path


def test_default_rows_that_do_not_fit_are_left_out_and_named(odd: Path, text: Path, tmp_path: Path) -> None:
    results = compare(odd, texts=[text], settings=SETTINGS, out=tmp_path / "out")
    measured = [row.variant.name for row in results.variants]
    assert measured == ["bf16", "int8-w8a16", "fp8-w8a16", "w8a8", "kv-int8", "kv-fp8"]
    assert all(row.latency and row.quality for row in results.variants)
    left_out = {
        name: w for name in ("int4-w4a16", "int4-w4a16-unfused", "nf4-unfused", "kv-int4") for w in results.warnings if f"({name})" in w
    }
    assert len(left_out) == 4
    assert "model.layers.0.self_attn.q_proj: group size 128 does not divide the 80 input columns" in left_out["int4-w4a16"]
    assert "head_dim 20" in left_out["kv-int4"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["warnings"] == results.warnings


@pytest.mark.parametrize("name", ["int4-w4a16", "mxfp4", "kv-int4"])
def test_a_row_that_was_asked_for_is_an_error_before_anything_is_measured(
    name: str, odd: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_workflow, "measure_machine", lambda: pytest.fail("measured"))
    with pytest.raises(FormatError, match=f"variant '{name}': .*does not divide"):
        compare(odd, variants=name, texts=[text], settings=SETTINGS)


def test_bench_and_evaluate_refuse_before_they_measure(odd: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_workflow, "measure_machine", lambda: pytest.fail("measured"))
    with pytest.raises(FormatError, match="group size 128"):
        bench(odd, scheme="W4A16")
    with pytest.raises(FewbitError, match="unknown kernel 'zz'"):
        bench(odd, scheme="W8A16", kernel="zz")
    monkeypatch.setattr("fewbit.workflows.evaluate.Reference", lambda *_: pytest.fail("measured"))
    with pytest.raises(FormatError, match="group size 128"):
        evaluate(odd, scheme="W4A16", texts=[text])


def test_a_tokenizer_of_another_model_is_named(odd: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(odd / name, small)
    with pytest.raises(ModelError, match=r"token id \d+ and the model's vocabulary has 50"):
        evaluate(small, texts=[text], protocol="stdlib", max_tokens=None)
    with pytest.raises(ModelError, match="vocabulary has 50"):
        generate_text(small, prompt="the quick brown fox")


def test_peaks_stay_within_the_models_positions(tmp_path: Path, tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from fewbit.bench.memory import PeakMeter, PeakRequest

    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path / "gpt2")
    requests: list[PeakRequest] = []
    monkeypatch.setattr(PeakMeter, "measure", lambda _, request: requests.append(request) or (2, 1))  # type: ignore[func-returns-value]
    results = compare(tmp_path / "gpt2", texts=[text], settings=replace(SETTINGS, peak=True))
    assert [row.variant.name for row in results.variants] == ["bf16", "kv-int8", "kv-fp8"]
    assert any("Conv1D" in warning and "(int8-w8a16)" in warning for warning in results.warnings)
    assert all(r.prompt_tokens + r.decode_steps == 64 for r in requests) and requests
