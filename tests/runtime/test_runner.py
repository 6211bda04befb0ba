"""Who runs a model's passes: the same greedy tokens from the engine and from transformers, batches, sampling, the format of the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig

from fewbit.checkpoints.sources import DirectorySource, open_source
from fewbit.errors import KernelError, UsageError
from fewbit.formats.spec import get_scheme
from fewbit.kernels.cpu.extension import missing_native
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format
from fewbit.runtime.generate import generate, generate_batch
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel, load_model
from fewbit.runtime.runner import make_runner, runtime_choice

needs_native = pytest.mark.skipif(missing_native() is not None, reason=str(missing_native()))
PROMPT = torch.arange(3, 23)[None]
MISTRAL = MistralConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    sliding_window=8,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


@pytest.fixture
def family_dir(zoo_dir: Callable[[str], Path], write_tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: write_tiny(MISTRAL, tmp_path) if name == "mistral" else zoo_dir(name)


@needs_native
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(name: str, family_dir: Callable[[str], Path]) -> None:
    # In float32: random weights in BF16 give logits that are exactly equal, and which of two is first is chance.
    loaded = load_model(DirectorySource(family_dir(name)), QuantizationConfig(get_scheme("BF16")), dtype=torch.float32)
    ours, theirs = (generate(loaded, PROMPT, 40, runtime=runtime_choice(path)) for path in ("engine", "transformers"))
    assert ours.runtime == "engine" and ours.runtime_reason == ""
    assert theirs.runtime == "transformers"
    assert len(ours.step_ms) == len(ours.tokens) - 1
    assert ours.tokens == theirs.tokens


@needs_native
@pytest.mark.parametrize(("scheme", "compute"), [("BF16", "exact"), ("KV-INT8", "exact"), ("W4A16", "int8-activations")])
def test_greedy_tokens_of_the_trained_model_in_bf16(scheme: str, compute: str) -> None:
    loaded = load_model(open_source(None), QuantizationConfig(get_scheme(scheme), compute=compute_mode(compute)))
    prompt = loaded.tokenizer("import os\n\n\ndef read(path", return_tensors="pt").input_ids
    ours, theirs = (generate(loaded, prompt, 12, runtime=runtime_choice(path)).tokens for path in ("engine", "transformers"))
    # Quantized inputs and cache turn differences in the last bit into whole steps, so only the first tokens have to agree.
    length = 12 if scheme == "BF16" else 4
    assert ours[:length] == theirs[:length]


@pytest.fixture(scope="module")
def llama(zoo_dir: Callable[[str], Path]) -> LoadedModel:
    return load_model(DirectorySource(zoo_dir("llama")), QuantizationConfig(get_scheme("BF16")), dtype=torch.float32)


@needs_native
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_gives_what_each_sequence_gives_alone(temperature: float, llama: LoadedModel) -> None:
    prompts = [PROMPT[:, :n] for n in (20, 7, 13)]
    streamed: list[list[int]] = [[], [], []]
    batch = generate_batch(
        llama, prompts, 16, temperature=temperature, top_p=0.9, seed=5, on_token=lambda sequence, token: streamed[sequence].append(token)
    )
    alone = [
        generate(llama, prompt, 16, temperature=temperature, top_p=0.9, seed=5 + i, runtime="engine") for i, prompt in enumerate(prompts)
    ]
    assert [result.tokens for result in batch] == [result.tokens for result in alone] == streamed
    assert all(len(result.step_ms) == len(result.tokens) - 1 for result in batch)


@needs_native
def test_a_sequence_of_a_batch_ends_by_itself(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPT[:, :20], PROMPT[:, :7]]
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", None)
    free = [result.tokens for result in generate_batch(llama, prompts, 12)]
    end = next(token for token in free[0] if token not in free[1])
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", end)
    stopped = generate_batch(llama, prompts, 12)
    assert stopped[0].tokens == free[0][: free[0].index(end) + 1]
    assert stopped[1].tokens == free[1]
    assert len(stopped[0].step_ms) == len(stopped[0].tokens) - 1


def test_a_batch_of_nothing_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(UsageError, match="without prompts"):
        generate_batch(llama, [], 4)


def test_what_the_engine_cannot_run_goes_through_transformers_and_says_why(zoo_dir: Callable[[str], Path]) -> None:
    loaded = load_model(DirectorySource(zoo_dir("gemma2")), QuantizationConfig(get_scheme("BF16")))
    result = generate(loaded, PROMPT, 2)
    assert result.runtime == "transformers"
    assert "gemma2" in result.runtime_reason or missing_native() is not None
    with pytest.raises(KernelError, match="the engine cannot run"):
        make_runner(loaded, "engine")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown runtime"):
        runtime_choice("vllm")
    with pytest.raises(UsageError, match="unknown compute mode"):
        compute_mode("fast")
    with pytest.raises(UsageError, match="of the output head"):
        head_format("int5")
    assert head_format("bf16") is None and head_format(None) is None


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # its own head, and one that is tied to the embedding
def test_the_head_gets_a_format_of_its_own(name: str, zoo_dir: Callable[[str], Path]) -> None:
    source = DirectorySource(zoo_dir(name))
    config = QuantizationConfig(get_scheme("BF16"), lm_head=head_format("int8"))
    loaded, plain = load_model(source, config), load_model(source, QuantizationConfig(get_scheme("BF16")))
    head = loaded.model.get_submodule("lm_head")
    assert isinstance(head, QuantLinear) and str(head.quant_method.request.weights).startswith("INT8")
    assert isinstance(plain.model.get_submodule("lm_head"), torch.nn.Linear)
    assert loaded.effective_bits_per_weight is not None and 8 < loaded.effective_bits_per_weight < 9
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = plain.model.get_submodule("lm_head")(x).float()
    assert ((head(x).float() - expected).norm() / expected.norm()).item() < 0.02
    assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
