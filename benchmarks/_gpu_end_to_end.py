"""Section 4: whole decode steps on published shapes with random weights, the table that fewbit was written for, on this GPU.

32 tokens at batch 1: transformers, fewbit in BF16, fused, unfused (NF4, LLM.int8() as bitsandbytes computes them), FP8 and W8A8; then
batch 1 to 64, where W4A16 stops paying, and a prompt of 2,048. Every model is built, measured and dropped before the next.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from _gpu_common import Clock, Settings
from transformers import AutoModelForCausalLM, PretrainedConfig, StaticCache

from fewbit.formats.spec import get_scheme
from fewbit.models.shapes import shapes_config
from fewbit.runtime.gpu_engine import GpuEngine
from fewbit.runtime.gpu_model import GpuModel, random_model

__all__ = [
    "BATCHED", "BATCHES", "COMPILED", "CONTEXT", "LONG_PROMPT", "PROMPT", "ROWS", "STEPS", "TOKENS", "measure_batches", "measure_single",
    "measure_transformers", "tiny_config",
]  # fmt: skip

# name, scheme, kernel, format of the head (None: BF16)
ROWS = (
    ("fewbit BF16", "BF16", None, None),
    ("fewbit INT4 fused", "W4A16", None, None),
    ("fewbit INT4 fused, INT4 head", "W4A16", None, "W4A16"),
    ("fewbit FP8", "FP8", None, None),
    ("fewbit W8A8", "W8A8", None, None),
    ("fewbit NF4 unfused", "NF4", "triton-unfused", None),
    ("fewbit LLM.int8()", "LLM-INT8", None, None),
)
COMPILED = "transformers BF16, static cache, torch.compile"
BATCHES, BATCHED = (1, 2, 4, 8, 16, 32, 64), ("BF16", "W4A16", "FP8", "W8A8")
PROMPT, CONTEXT, STEPS, LONG_PROMPT = 16, 128, 24, 2048
TOKENS = 32


def tiny_config() -> PretrainedConfig:
    """A model that the interpreter gets through."""
    config = shapes_config("llama-3-8b")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 128, 128, 1, 64
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 64
    return config


def measure_single(settings: Settings, seconds: float, shapes: str) -> None:
    """Batch 1: one row `single` per way to run: ms for the tokens with and without graphs, bytes of weights, peak memory."""
    clock = Clock(seconds, settings)
    tokens, config = (1, tiny_config()) if settings.tiny else (TOKENS, shapes_config(shapes))
    for name, scheme, kernel, head in (ROWS[0], ROWS[1], *ROWS[-2:]) if settings.tiny else ROWS:

        def run(name: str = name, scheme: str = scheme, kernel: str | None = kernel, head: str | None = head) -> None:
            weights = None if head is None else get_scheme(head).weights
            model = random_model(config, get_scheme(scheme), settings.device, settings.dtype, head=weights, kernel=kernel)
            settings.record("single", {"name": name, "shapes": shapes, "tokens": tokens, **_fewbit(settings, model, tokens)})

        if clock.allows(f"{name} {shapes}"):
            settings.attempt(f"{name} {shapes}", run)
        _release(settings)


def _fewbit(settings: Settings, model: GpuModel, tokens: int) -> dict[str, Any]:
    engine = GpuEngine(model)
    cache = engine.new_cache(PROMPT + 6 * tokens + 8)  # three times with graphs, three without
    engine.prefill(torch.arange(1 if settings.tiny else PROMPT), cache)
    engine.decode(cache)  # captures
    graphed = _wall(settings, lambda: [engine.decode(cache) for _ in range(tokens)])
    plain = GpuEngine(model, graphs=False)
    plain.decode(cache)
    launched = _wall(settings, lambda: [plain.decode(cache) for _ in range(tokens)])
    kernels = sorted({linear.kernel.name for linear in model.linears()})
    return {
        "ms": graphed, "ms_without_graphs": launched, "graphs": engine.graphs_refusal() or "yes", "kernels": kernels,
        "weight_bytes": model.nbytes(), "cache_bytes": cache.nbytes(), "peak_bytes": _peak(settings),
    }  # fmt: skip


def measure_transformers(settings: Settings, seconds: float, shapes: str) -> None:
    """Rows `single` of transformers: eagerly, and with a static cache and torch.compile.

    Both run the same loop, a forward pass and an argmax a token, without the bookkeeping of `generate`, which would count against them.
    """
    clock = Clock(seconds, settings)
    tokens, config = (1, tiny_config()) if settings.tiny else (TOKENS, shapes_config(shapes))
    for name, compiled in (("transformers BF16", False), (COMPILED, True)):

        def run(name: str = name, compiled: bool = compiled) -> None:
            row = {"name": name, "shapes": shapes, "tokens": tokens, **_transformers(settings, config, tokens, compiled)}
            settings.record("single", row)

        if clock.allows(f"{name} {shapes}"):
            settings.attempt(f"{name} {shapes}", run)
        _release(settings)


def _transformers(settings: Settings, config: PretrainedConfig, tokens: int, compiled: bool) -> dict[str, Any]:
    with torch.device(settings.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=settings.dtype).eval()
    prompt, wants_places = 1 if settings.tiny else PROMPT, "cache_position" in inspect.signature(model.forward).parameters
    cache = StaticCache(config=model.config, max_cache_len=prompt + 8 * tokens + 16) if compiled else None

    def step(token: torch.Tensor, position: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        places = {"cache_position": position[0]} if wants_places else {}
        output = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, **places)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    begun = time.perf_counter()
    with torch.inference_mode():
        token, cache = step(torch.arange(prompt, device=settings.device)[None], torch.arange(prompt, device=settings.device)[None], cache)
        position = torch.full((1, 1), prompt, device=settings.device)
        run = torch.compile(step, mode="reduce-overhead", dynamic=False) if compiled and settings.cuda else step

        def decode(count: int) -> None:
            nonlocal token, cache
            for _ in range(count):
                token, cache = run(token, position, cache)
                token = token.clone()  # the next replay overwrites what a graph returned
                position.add_(1)

        decode(min(8, tokens))  # compiles, records the graph
        compiling = time.perf_counter() - begun
        milliseconds = _wall(settings, lambda: decode(tokens))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"ms": milliseconds, "weight_bytes": weights, "peak_bytes": _peak(settings), "seconds_before": compiling}


def measure_batches(settings: Settings, seconds: float, shapes: str) -> None:
    """One row `batches` per scheme and batch: ms of a step; and of a prompt of 2,048 at batch 1."""
    clock = Clock(seconds, settings)
    config, batches = (tiny_config(), (1, 2)) if settings.tiny else (shapes_config(shapes), BATCHES)
    for scheme in BATCHED[:2] if settings.tiny else BATCHED:
        if clock.allows(f"batches {scheme} {shapes}"):
            settings.attempt(f"batches {scheme} {shapes}", lambda s=scheme: _batches(settings, config, shapes, s, batches))
        _release(settings)


def _batches(settings: Settings, config: PretrainedConfig, shapes: str, scheme: str, batches: tuple[int, ...]) -> None:
    steps, context, prompt = (1, 4, 2) if settings.tiny else (STEPS, CONTEXT, LONG_PROMPT)
    engine = GpuEngine(random_model(config, get_scheme(scheme), settings.device, settings.dtype))

    def keep(phase: str, batch: int, length: int, milliseconds: float) -> None:
        row = {"shapes": shapes, "scheme": scheme, "phase": phase, "batch": batch, "context": length, "ms": milliseconds}
        settings.record("batches", row)

    for batch in batches:
        cache = engine.new_cache(context + 3 * steps + 4, batch)
        for sequence in range(batch):
            engine.prefill(torch.arange(2 if settings.tiny else context) % config.vocab_size, cache, sequence)
        engine.decode(cache)
        keep("decode", batch, context, _wall(settings, lambda c=cache: [engine.decode(c) for _ in range(steps)]) / steps)
    ids = torch.arange(prompt) % config.vocab_size
    engine.prefill(ids, engine.new_cache(prompt))
    keep("prefill", 1, prompt, _wall(settings, lambda: engine.prefill(ids, engine.new_cache(prompt))))


def _wall(settings: Settings, run: Callable[[], object]) -> float:
    """Milliseconds on the wall clock, the device done before and after; on a GPU the best of three."""
    times = []
    for _ in range(3 if settings.cuda else 1):
        if settings.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if settings.cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def _peak(settings: Settings) -> int | None:
    return torch.cuda.max_memory_allocated() if settings.cuda else None


def _release(settings: Settings) -> None:
    gc.collect()
    if settings.cuda:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
