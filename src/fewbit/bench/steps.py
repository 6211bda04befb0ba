"""One model, ready to take timed steps: random prompt, filled cache, one token after the other.

Decode time depends on how many tokens are cached, so the cache is cut back to the context length before every block of steps and drifts
by no more than a block. Random valid token ids suffice: no kernel's time depends on their values.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fewbit.bench.machine import synchronize
from fewbit.bench.operators import engine_operators, measure_operators
from fewbit.bench.overhead import emptied
from fewbit.bench.scaling import LayerScale, StackClock
from fewbit.errors import MeasurementError
from fewbit.results import OperatorTimes
from fewbit.runtime.engine import Engine
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.runner import EngineRunner, Runner, RuntimeChoice, make_runner

__all__ = ["DECODE_ROOM", "StepRunner"]

# Positions behind the context that a block of decode steps may use.
DECODE_ROOM = 32


class _Clock(Protocol):
    """Knows how long the layers took in the latest pass."""

    @property
    def stack_ms(self) -> float: ...


class _EngineClock:
    """The engine's own clock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def stack_ms(self) -> float:
        return self._engine.times.layers


@dataclass(frozen=True)
class StepRunner:
    """Runs and times steps of one model; make it with `StepRunner.start`.

    Attributes:
        runner: who runs the passes of the model.
        context_tokens: tokens in the cache when a block of decode steps begins.
        scale: times are scaled to the whole stack.
        prompt: int64 [1, n], random ids; every prompt is a beginning of it.
        cache: holds `context_tokens` tokens between blocks.
    """

    runner: Runner
    context_tokens: int
    scale: LayerScale
    prompt: torch.Tensor
    cache: Any

    @classmethod
    def start(
        cls,
        loaded: LoadedModel,
        *,
        prompt_tokens: int,
        context_tokens: int,
        scale: LayerScale,
        seed: int,
        runtime: RuntimeChoice = "auto",
    ) -> StepRunner:
        """Fill a cache with the context.

        Args:
            runtime: see `runtime.runner.make_runner`.

        Raises:
            MeasurementError: the model's positions do not suffice for the prompt or the context.
            KernelError: the engine was asked for and cannot run the model.
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
        runner = make_runner(loaded, runtime)
        steps = cls(runner, context_tokens, scale, prompt, runner.new_cache(context_tokens + DECODE_ROOM))
        runner.prefill(prompt[:, :context_tokens], steps.cache)
        return steps

    @property
    def loaded(self) -> LoadedModel:
        """The model and its scheme."""
        return self.runner.loaded

    @property
    def device(self) -> str:
        """Where the model runs."""
        return str(self.loaded.model.device)

    def decode_block(self, steps: int, *, settling: int = 0) -> list[float]:
        """Milliseconds of `steps` decode steps from the context on, after `settling` steps that are not counted."""
        self._rewind()
        with self._clock() as clock:
            return [self._decode(clock) for _ in range(settling + steps)][settling:]

    def raw_step(self) -> float:
        """Milliseconds of one decode step from the context on, of the slice as it is (not scaled)."""
        self._rewind()
        return self._timed_decode()

    def emptied_decode(self, steps: int) -> list[float]:
        """The same as `decode_block` with every linear emptied."""
        with self.runner.emptied() if isinstance(self.runner, EngineRunner) else emptied(self.loaded.model):
            return self.decode_block(steps, settling=1)

    def operators(self, steps: int) -> OperatorTimes:
        """Mean times of a decode step by class of operator."""
        if isinstance(self.runner, EngineRunner):
            return engine_operators(self.runner.engine, self.raw_step, steps=steps, scale=self.scale)
        return measure_operators(self.loaded.model, self.raw_step, steps=steps, scale=self.scale, device=self.device)

    def prefill(self, tokens: int) -> float:
        """Milliseconds of a prefill of `tokens` tokens into an empty cache."""
        cache = self.runner.new_cache(tokens)
        with self._clock() as clock:
            synchronize(self.device)
            start = time.perf_counter()
            self.runner.prefill(self.prompt[:, :tokens], cache)
            synchronize(self.device)
            return self.scale.scale((time.perf_counter() - start) * 1e3, clock.stack_ms)

    def _clock(self) -> AbstractContextManager[_Clock]:
        if isinstance(self.runner, EngineRunner):
            return nullcontext(_EngineClock(self.runner.engine))
        return StackClock(self.loaded.model, self.device)

    def _decode(self, clock: _Clock) -> float:
        whole = self._timed_decode()
        return self.scale.scale(whole, clock.stack_ms)

    def _timed_decode(self) -> float:
        token = self.prompt[:, -1:]
        synchronize(self.device)
        start = time.perf_counter()
        self.runner.decode(token, self.cache)
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3

    @torch.inference_mode()
    def _rewind(self) -> None:
        """Cut the cache back to the context."""
        extra = self.cache.get_seq_length() - self.context_tokens
        if extra > 0:
            self.cache.crop(-extra)
