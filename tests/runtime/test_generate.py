"""Generation: transformers' tokens, deterministic draws, end tokens, timing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbit.checkpoints.sources import DirectorySource
from fewbit.errors import ModelError, UsageError
from fewbit.formats.spec import get_scheme
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.generate import generate
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.runner import decode_step, prefill

PROMPT = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def llama(zoo_dir: Callable[[str], Path]) -> LoadedModel:
    return load_model(DirectorySource(zoo_dir("llama")), QuantizationConfig(get_scheme("BF16")))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt"])
def test_greedy_equals_transformers(name: str, zoo_dir: Callable[[str], Path]) -> None:
    loaded = load_model(DirectorySource(zoo_dir(name)), QuantizationConfig(get_scheme("BF16")))
    theirs = AutoModelForCausalLM.from_pretrained(zoo_dir(name), dtype=torch.bfloat16).eval()
    expected = theirs.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, do_sample=False)[0, 20:].tolist()
    assert generate(loaded, PROMPT, 24).tokens == expected


def test_every_token_is_timed_and_streamed(llama: LoadedModel) -> None:
    streamed: list[int] = []
    result = generate(llama, PROMPT, 8, on_token=streamed.append)
    assert streamed == result.tokens
    assert len(result.step_ms) == len(result.tokens) - 1
    assert result.prefill_ms > 0
    assert all(step > 0 for step in result.step_ms)


def test_it_stops_after_an_end_token(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", None)
    free = generate(llama, PROMPT, 10).tokens
    assert len(free) == 10
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", [999, free[3]])
    stopped = generate(llama, PROMPT, 10).tokens
    assert stopped == free[: free.index(free[3]) + 1]


def test_draws_follow_the_seed(llama: LoadedModel) -> None:
    def draw(seed: int, **options: float) -> list[int]:
        return generate(llama, PROMPT, 16, temperature=1.5, seed=seed, **options).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == generate(llama, PROMPT, 16).tokens


def test_steps_equal_one_pass(llama: LoadedModel) -> None:
    """Prefill and decode of two sequences give the logits of one pass without a cache."""
    ids = torch.arange(3, 33).view(2, 15)
    cache = llama.new_cache()
    rows = [prefill(llama, ids[:, :10], cache)] + [decode_step(llama, ids[:, i : i + 1], cache) for i in range(10, 15)]
    with torch.no_grad():
        whole = llama.model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack(rows, 1), whole[:, 9:], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("scheme", ["W8A16", "KV-INT4", "KV-INT8"])
def test_quantized_models_generate(scheme: str, tiny_llama_dir: Path) -> None:
    loaded = load_model(DirectorySource(tiny_llama_dir), QuantizationConfig(get_scheme(scheme)))
    assert generate(loaded, PROMPT, 50).tokens == generate(loaded, PROMPT, 50).tokens


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (torch.empty(1, 0, dtype=torch.long), {}),
        (torch.ones(2, 3, dtype=torch.long), {}),
        (PROMPT, {"max_new_tokens": 0}),
        (PROMPT, {"temperature": -1.0}),
        (PROMPT, {"top_p": 0.0}),
    ],
)
def test_arguments_out_of_range(ids: torch.Tensor, options: dict[str, float], llama: LoadedModel) -> None:
    with pytest.raises(UsageError):
        generate(llama, ids, **{"max_new_tokens": 4, **options})  # type: ignore[arg-type]


def test_tokens_beyond_the_models_positions_are_refused(llama: LoadedModel) -> None:
    prompt = torch.full((1, 100), 5)
    assert len(generate(llama, prompt, 28).tokens) <= 28
    with pytest.raises(UsageError, match="128 positions; ask for at most 28"):
        generate(llama, prompt, 29)
    with pytest.raises(UsageError, match="shorten the prompt"):
        generate(llama, torch.full((1, 128), 5), 1)


def test_tokens_of_another_vocabulary_are_refused(llama: LoadedModel) -> None:
    with pytest.raises(ModelError, match="token id 256 and the model's vocabulary has 256"):
        generate(llama, torch.tensor([[3, 256]]), 1)
