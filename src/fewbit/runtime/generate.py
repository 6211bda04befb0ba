"""Generate text, one step at a time, and time each step.

Generation has two phases with opposite bottlenecks. Prefill reads the whole prompt in one pass: matrices times matrices,
compute-bound. Decode then makes one token per step: matrices times one vector, so each step reads every weight once and is
bandwidth-bound, unless the model is so small that the framework's overhead per operator dominates. The two are therefore separate
functions here, and measured separately everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fewbit.errors import UsageError
from fewbit.models.accounting import check_token_ids
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.runner import EngineRunner, RuntimeChoice, make_runner

__all__ = ["GenerateResult", "generate", "generate_batch"]


@dataclass(frozen=True)
class GenerateResult:
    """What was generated.

    Attributes:
        tokens: the new token ids, the end token included if one came.
        prefill_ms: the pass over the prompt and the choice of the first token.
        step_ms: one entry per decode step, choice of the token included; one fewer than tokens. In a batch a step is every sequence's.
        runtime: `engine` or `transformers`.
        runtime_reason: why the engine did not run the model; empty when it did.
    """

    tokens: list[int]
    prefill_ms: float
    step_ms: list[float]
    runtime: str = "transformers"
    runtime_reason: str = ""


def generate(
    loaded: LoadedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
    runtime: RuntimeChoice = "auto",
) -> GenerateResult:
    """Continue one sequence until an end token or `max_new_tokens`.

    Args:
        input_ids: int64 [1, n], n >= 1.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_p: draw only among the most likely tokens that together have this probability (nucleus sampling, arXiv 1904.09751).
        seed: of the draws; the same seed gives the same tokens.
        on_token: called with each new token as soon as it is known.
        runtime: see `runner.make_runner`.

    Raises:
        UsageError: an empty prompt, arguments out of range, or more tokens than the model has positions for.
        ModelError: tokens that the model does not have.
        KernelError: the engine was asked for and cannot run the model.
    """
    _check(input_ids, max_new_tokens, temperature, top_p)
    check_token_ids(int(input_ids.max()), loaded.config)
    _check_room(loaded, input_ids.shape[1], max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    ends = _end_tokens(loaded)
    runner = make_runner(loaded, runtime)
    cache = runner.new_cache(input_ids.shape[1] + max_new_tokens)
    tokens: list[int] = []
    times: list[float] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
        started = time.perf_counter()
        logits = runner.decode(torch.tensor([[tokens[-1]]]), cache) if tokens else runner.prefill(input_ids, cache)
        token = _choose(logits[0], temperature, top_p, generator)
        times.append((time.perf_counter() - started) * 1e3)
        tokens.append(token)
        if on_token is not None:
            on_token(token)
    return GenerateResult(tokens, times[0], times[1:], runner.path, runner.reason)


def generate_batch(
    loaded: LoadedModel,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[GenerateResult]:
    """Continue several sequences side by side on the engine: a step reads the weights once for all of them.

    The prompts may differ in length. Each sequence ends by itself and its place stays idle until the last has ended. Draws of sequence i
    follow the seed `seed + i`, whoever else is in the batch.

    Args:
        prompts: int64 [1, n] each.
        on_token: called with (sequence, token).
        max_new_tokens, temperature, top_p, seed: as in `generate`.

    Raises:
        UsageError, ModelError: as `generate`, or no prompt.
        KernelError: the engine cannot run the model. (transformers would need padding, which changes what is computed: run `generate` for
            each prompt instead.)
    """
    if not prompts:
        raise UsageError("a batch without prompts", "pass at least one")
    for prompt in prompts:
        _check(prompt, max_new_tokens, temperature, top_p)
        check_token_ids(int(prompt.max()), loaded.config)
        _check_room(loaded, prompt.shape[1], max_new_tokens)
    runner = make_runner(loaded, "engine")
    assert isinstance(runner, EngineRunner)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    ends, cache = _end_tokens(loaded), runner.new_cache(max(prompt.shape[1] for prompt in prompts) + max_new_tokens, len(prompts))
    tokens: list[list[int]] = [[] for _ in prompts]
    prefills: list[float] = []

    def take(sequence: int, logits: torch.Tensor) -> None:
        token = _choose(logits, temperature, top_p, generators[sequence])
        tokens[sequence].append(token)
        if on_token is not None:
            on_token(sequence, token)

    for sequence, prompt in enumerate(prompts):
        started = time.perf_counter()
        take(sequence, runner.engine.prefill(prompt[0], cache, sequence))
        prefills.append((time.perf_counter() - started) * 1e3)
    steps: list[list[float]] = [[] for _ in prompts]
    while going := [s for s, own in enumerate(tokens) if len(own) < max_new_tokens and own[-1] not in ends]:
        started = time.perf_counter()
        logits = runner.decode(torch.tensor([[own[-1]] for own in tokens]), cache)
        for sequence in going:
            take(sequence, logits[sequence])
        elapsed = (time.perf_counter() - started) * 1e3
        for sequence in going:
            steps[sequence].append(elapsed)
    return [GenerateResult(own, first, later, runner.path) for own, first, later in zip(tokens, prefills, steps, strict=True)]


def _check(input_ids: torch.Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise UsageError(f"the prompt has token ids of shape {list(input_ids.shape)}", "pass one sequence of at least one token, [1, n]")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", "ask for at least one token")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(f"temperature {temperature} or top_p {top_p} is out of range", "temperature >= 0 and 0 < top_p <= 1")


def _check_room(loaded: LoadedModel, prompt_tokens: int, new_tokens: int) -> None:
    positions = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens > positions:
        room = max(positions - prompt_tokens, 0)
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit into the model's {positions} positions",
            f"ask for at most {room} new tokens" if room else "shorten the prompt",
        )


def _end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The publisher's end tokens: a number, a list or none."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """logits [vocabulary] -> token."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    # A token stays while those before it have less than top_p together: at least one always does.
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])
