"""What every test gets: one torch thread, no network, derandomized property tests, and a tiny model on disk."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before transformers and huggingface_hub are imported: they read these once. A test that reaches for the hub fails instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fewbit", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("fewbit")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what this machine or this run cannot do."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    not_heavy = pytest.mark.skip(reason="heavy: set FEWBIT_HEAVY=1 to run it")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("heavy") and os.environ.get("FEWBIT_HEAVY") != "1":
            item.add_marker(not_heavy)


@pytest.fixture
def in_the_interpreter() -> Callable[[str, str], None]:
    """Runs code about a test module, given by its `__file__`, in Triton's interpreter.

    In a process of its own: Triton reads TRITON_INTERPRET when it is imported. The module is imported as `checks`.
    """
    pytest.importorskip("triton", reason="Triton is not installed")

    def run(file: str, code: str) -> None:
        folder, name = os.path.split(file)
        program = f"import sys; sys.path.insert(0, {folder!r}); import {name.removesuffix('.py')} as checks\n{code}"
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def _byte_level_tokenizer(vocabulary: int) -> object:
    import argparse

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights as a Hugging Face directory, read-only by agreement: copy it before you change it.

    Hidden 128, 4 heads and 2 KV heads of 32, MLP 256, 2 layers, vocabulary 512, 512 positions, tied embeddings, BF16 safetensors, a
    byte-level tokenizer. The weights are large enough (standard deviation 0.1) that the logits are not nearly uniform.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    _byte_level_tokenizer(512).save_pretrained(directory)  # type: ignore[attr-defined]
    return directory
