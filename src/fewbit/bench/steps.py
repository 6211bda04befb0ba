"""One model, ready to take timed steps: random prompt, filled cache, one token after the other.

Decode time depends on how many tokens are cached, so the cache is cut back to the context length before every block of steps and drifts
by no more than a block. Random valid token ids suffice: no kernel's time depends on their values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fewbit.bench.machine import synchronize
from fewbit.bench.overhead import emptied
from fewbit.bench.scaling import LayerScale, StackClock
from fewbit.errors import MeasurementError
from fewbit.runtime.generate import decode_step, prefill
from fewbit.runtime.kv_cache import KVCache
from fewbit.runtime.load import LoadedModel

__all__ = ["DECODE_ROOM", "StepRunner"]

# Positions behind the context that a block of decode steps may use.
DECODE_ROOM = 32


@dataclass(frozen=True)
class StepRunner:
    """Runs and times steps of one model; make it with `StepRunner.start`.

    Attributes:
        loaded: the model and its scheme.
        context_tokens: tokens in the cache when a block of decode steps begins.
        scale: times are scaled to the whole stack.
        prompt: int64 [1, n], random ids; every prompt is a beginning of it.
        cache: holds `context_tokens` tokens between blocks.
    """

    loaded: LoadedModel
    context_tokens: int
    scale: LayerScale
    prompt: torch.Tensor
    cache: KVCache

    @classmethod
    def start(cls, loaded: LoadedModel, *, prompt_tokens: int, context_tokens: int, scale: LayerScale, seed: int) -> StepRunner:
        """Fill a cache with the context.

        Raises:
            MeasurementError: the model's positions do not suffice for the prompt or the context.
        """
        text = loaded.config.get_text_config(decoder=True)
        longest = max(prompt_tokens, context_tokens + DECODE_ROOM)
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise MeasurementError(
                f"a prompt of {prompt_tokens} tokens and a context of {context_tokens} do not fit the model's {positions} positions",
                "choose a smaller --prompt-tokens or --context",
            )
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(0, text.vocab_size, (1, longest), generator=generator).to(loaded.model.device)
        runner = cls(loaded, context_tokens, scale, prompt, loaded.new_cache())
        with torch.inference_mode():
            prefill(loaded, prompt[:, :context_tokens], runner.cache)
        return runner

    @property
    def device(self) -> str:
        """Where the model runs."""
        return str(self.loaded.model.device)

    def decode_block(self, steps: int, *, settling: int = 0) -> list[float]:
        """Milliseconds of `steps` decode steps from the context on, after `settling` steps that are not counted."""
        self._rewind()
        with torch.inference_mode(), StackClock(self.loaded.model, self.device) as clock:
            return [self._decode(clock) for _ in range(settling + steps)][settling:]

    def raw_step(self) -> float:
        """Milliseconds of one decode step from the context on, of the slice as it is (not scaled)."""
        self._rewind()
        with torch.inference_mode():
            return self._timed_decode()

    def emptied_decode(self, steps: int) -> list[float]:
        """The same as `decode_block` with every linear emptied."""
        with emptied(self.loaded.model):
            return self.decode_block(steps, settling=1)

    def prefill(self, tokens: int) -> float:
        """Milliseconds of a prefill of `tokens` tokens into an empty cache."""
        cache = self.loaded.new_cache()
        with torch.inference_mode(), StackClock(self.loaded.model, self.device) as clock:
            synchronize(self.device)
            start = time.perf_counter()
            prefill(self.loaded, self.prompt[:, :tokens], cache)
            synchronize(self.device)
            return self.scale.scale((time.perf_counter() - start) * 1e3, clock.stack_ms)

    def _decode(self, clock: StackClock) -> float:
        whole = self._timed_decode()
        return self.scale.scale(whole, clock.stack_ms)

    def _timed_decode(self) -> float:
        token = self.prompt[:, -1:]
        synchronize(self.device)
        start = time.perf_counter()
        decode_step(self.loaded, token, self.cache)
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3

    @torch.inference_mode()
    def _rewind(self) -> None:
        """Cut the cache back to the context."""
        extra = self.cache.get_seq_length() - self.context_tokens
        if extra > 0:
            self.cache.crop(-extra)
