"""Generate text, one step at a time, and time each step.

Generation has two phases with opposite bottlenecks. Prefill reads the whole prompt in one pass: matrices times matrices,
compute-bound. Decode then makes one token per step: matrices times one vector, so each step reads every weight once and is
bandwidth-bound, unless the model is so small that the framework's overhead per operator dominates. The two are therefore separate
functions here, and measured separately everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewbit.errors import UsageError
from fewbit.kernels.gemv import single_token
from fewbit.models.accounting import check_token_ids
from fewbit.runtime.kv_cache import KVCache
from fewbit.runtime.load import LoadedModel

__all__ = ["GenerateResult", "decode_step", "generate", "prefill"]


@dataclass(frozen=True)
class GenerateResult:
    """What was generated.

    Attributes:
        tokens: the new token ids, the end token included if one came.
        prefill_ms: the pass over the prompt and the choice of the first token.
        step_ms: one entry per decode step, choice of the token included; one fewer than tokens.
    """

    tokens: list[int]
    prefill_ms: float
    step_ms: list[float]


@torch.inference_mode()
def prefill(loaded: LoadedModel, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run the prompt and fill the cache.

    Args:
        input_ids: int64 [batch, n].

    Returns:
        Logits after the last token, [batch, vocabulary], in the model's dtype.
    """
    # An index, not `1`: the slice that transformers takes for a number is not contiguous, and torch then copies the whole head for one row.
    last = torch.tensor([input_ids.shape[1] - 1], device=loaded.model.device)
    output = loaded.model(input_ids=input_ids.to(loaded.model.device), past_key_values=cache, use_cache=True, logits_to_keep=last)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


@torch.inference_mode()
def decode_step(loaded: LoadedModel, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run one token of each sequence.

    Args:
        token: int64 [batch, 1].

    Returns:
        Logits, [batch, vocabulary], in the model's dtype.
    """
    with single_token(token.shape[0], loaded.model.device):
        output = loaded.model(input_ids=token.to(loaded.model.device), past_key_values=cache, use_cache=True)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def generate(
    loaded: LoadedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> GenerateResult:
    """Continue one sequence until an end token or `max_new_tokens`.

    Args:
        input_ids: int64 [1, n], n >= 1.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_p: draw only among the most likely tokens that together have this probability (nucleus sampling, arXiv 1904.09751).
        seed: of the draws; the same seed gives the same tokens.
        on_token: called with each new token as soon as it is known.

    Raises:
        UsageError: an empty prompt, arguments out of range, or more tokens than the model has positions for.
        ModelError: tokens that the model does not have.
    """
    _check(input_ids, max_new_tokens, temperature, top_p)
    check_token_ids(int(input_ids.max()), loaded.config)
    _check_room(loaded, input_ids.shape[1], max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    ends = _end_tokens(loaded)
    cache = loaded.new_cache()
    tokens: list[int] = []
    times: list[float] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
        started = time.perf_counter()
        logits = decode_step(loaded, torch.tensor([[tokens[-1]]]), cache) if tokens else prefill(loaded, input_ids, cache)
        token = _choose(logits[0], temperature, top_p, generator)
        times.append((time.perf_counter() - started) * 1e3)
        tokens.append(token)
        if on_token is not None:
            on_token(token)
    return GenerateResult(tokens, times[0], times[1:])


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
