"""Who runs a loaded model's passes: fewbit's own engine, or transformers with the linears swapped.

Both take the products from the linears' methods and compute the same numbers; the engine spends a few microseconds between two products
where transformers spends tens. `make_runner` takes the engine where the model, its cache format and its kernels allow, and says why not
elsewhere, so that a report can name the path that a time belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fewbit.errors import KernelError, UsageError
from fewbit.kernels.high_precision import fastest_path
from fewbit.runtime.engine import Engine, EngineCache, engine_refusal
from fewbit.runtime.gpu_engine import GpuCache, GpuEngine
from fewbit.runtime.gpu_model import GpuModel, gpu_engine_refusal, model_of
from fewbit.runtime.kv_cache import KVCache
from fewbit.runtime.load import LoadedModel

__all__ = [
    "EngineRunner",
    "GpuRunner",
    "Runner",
    "RuntimeChoice",
    "TransformersRunner",
    "decode_step",
    "make_runner",
    "prefill",
    "runtime_choice",
]

RuntimeChoice = Literal["auto", "engine", "transformers"]


@torch.inference_mode()
def prefill(loaded: LoadedModel, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run the prompt through transformers and fill the cache.

    Args:
        input_ids: int64 [batch, n].

    Returns:
        Logits after the last token, [batch, vocabulary], in the model's dtype.
    """
    # An index, not `1`: the slice that transformers takes for a number is not contiguous, and torch then copies the whole head for one row.
    last = torch.tensor([input_ids.shape[1] - 1], device=loaded.model.device)
    with fastest_path(input_ids.numel(), loaded.model.device):
        output = loaded.model(input_ids=input_ids.to(loaded.model.device), past_key_values=cache, use_cache=True, logits_to_keep=last)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


@torch.inference_mode()
def decode_step(loaded: LoadedModel, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run one token of each sequence through transformers.

    Args:
        token: int64 [batch, 1].

    Returns:
        Logits, [batch, vocabulary], in the model's dtype.
    """
    with fastest_path(token.shape[0], loaded.model.device):
        output = loaded.model(input_ids=token.to(loaded.model.device), past_key_values=cache, use_cache=True)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


class Runner(ABC):
    """Passes of one loaded model.

    Attributes:
        path: `engine` or `transformers`.
        loaded: the model.
        reason: why the engine does not run it; empty when it does.
    """

    path: str

    def __init__(self, loaded: LoadedModel, reason: str = "") -> None:
        self.loaded = loaded
        self.reason = reason

    @abstractmethod
    def new_cache(self, capacity: int, sequences: int = 1) -> Any:
        """An empty cache in the scheme's format for `sequences` sequences of at most `capacity` tokens each."""

    @abstractmethod
    def prefill(self, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append tokens: int64 [batch, n], the sequences of the cache from the first on. Returns the logits after the last of each,
        [batch, vocabulary]; the next pass may overwrite them."""

    @abstractmethod
    def decode(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append one token to each sequence: int64 [batch, 1] -> logits [batch, vocabulary]; the next pass may overwrite them."""


class TransformersRunner(Runner):
    """Through transformers' forward."""

    path = "transformers"

    def new_cache(self, capacity: int, sequences: int = 1) -> KVCache:
        return self.loaded.new_cache()

    def prefill(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return prefill(self.loaded, input_ids, cache)

    def decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return decode_step(self.loaded, tokens, cache)


class EngineRunner(Runner):
    """Through `runtime.engine`.

    Attributes:
        engine: whose `times` tell where the latest pass went.
    """

    path = "engine"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self.engine = Engine(loaded)

    def new_cache(self, capacity: int, sequences: int = 1) -> EngineCache:
        return self.engine.new_cache(capacity, sequences)

    def prefill(self, input_ids: torch.Tensor, cache: EngineCache) -> torch.Tensor:
        for sequence, tokens in enumerate(input_ids):
            self.engine.prefill(tokens, cache, sequence)
        return cache.logits[: input_ids.shape[0]]

    def decode(self, tokens: torch.Tensor, cache: EngineCache) -> torch.Tensor:
        return self.engine.decode(tokens[:, 0].contiguous(), cache)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Within this context no product with a weight is computed."""
        with self.engine.emptied():
            yield


_GPU_MODELS: WeakKeyDictionary[nn.Module, GpuModel] = WeakKeyDictionary()  # joined weights, so that they are joined once


class GpuRunner(Runner):
    """Through `runtime.gpu_engine`: decode steps are replayed from CUDA graphs where the kernels allow it."""

    path = "engine"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        if loaded.model not in _GPU_MODELS:
            _GPU_MODELS[loaded.model] = model_of(loaded)
        self.engine = GpuEngine(_GPU_MODELS[loaded.model])

    def new_cache(self, capacity: int, sequences: int = 1) -> GpuCache:
        return self.engine.new_cache(capacity, sequences)

    def prefill(self, input_ids: torch.Tensor, cache: GpuCache) -> torch.Tensor:
        for sequence, tokens in enumerate(input_ids):
            self.engine.prefill(tokens, cache, sequence)
        return cache.logits[: input_ids.shape[0]]

    def decode(self, tokens: torch.Tensor, cache: GpuCache) -> torch.Tensor:
        return self.engine.decode(cache, tokens[:, 0])


def runtime_choice(name: str) -> RuntimeChoice:
    """The choice of that name.

    Raises:
        UsageError: no such runtime.
    """
    choices: tuple[RuntimeChoice, ...] = ("auto", "engine", "transformers")
    for choice in choices:
        if name == choice:
            return choice
    raise UsageError(f"unknown runtime '{name}'", "choose auto, engine or transformers")


def make_runner(loaded: LoadedModel, runtime: RuntimeChoice = "auto") -> Runner:
    """The engine where it can run the model, else transformers with the reason.

    Args:
        loaded: the model.
        runtime: `auto`, or one of the two by name.

    Raises:
        KernelError: the engine was asked for and cannot run the model.
    """
    if runtime == "transformers":
        return TransformersRunner(loaded, "transformers was asked for")
    if loaded.model.device.type == "cuda":
        rotary = getattr(getattr(loaded.model, "model", None), "rotary_emb", None)
        reason = gpu_engine_refusal(loaded.config, loaded.scheme, str(loaded.model.device), loaded.dtype, rotary)
        if reason is None:
            return GpuRunner(loaded)
    else:
        reason = engine_refusal(loaded)
        if reason is None:
            return EngineRunner(loaded)
    if runtime == "engine":
        raise KernelError(
            f"the engine cannot run '{loaded.source.describe()}': {reason}", "leave the runtime to fewbit, or ask for transformers"
        )
    return TransformersRunner(loaded, reason)
