"""Section 4: whole decode steps on published shapes with random weights, the table that fewbit was written for, on this GPU.

32 tokens at batch 1: transformers, fewbit in BF16, fused, unfused (NF4, LLM.int8() as bitsandbytes computes them), FP8 and W8A8; then
batch 1 to 64, where W4A16 stops paying, and a prompt of 2,048. Every model is built, measured and dropped before the next.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from _gpu_common import Clock, Settings
from transformers import AutoModelForCausalLM, PretrainedConfig

from fewbit.formats.spec import get_scheme
from fewbit.models.shapes import shapes_config
from fewbit.runtime.gpu_engine import GpuEngine
from fewbit.runtime.gpu_model import GpuModel, random_model

__all__ = ["ROWS", "measure_batches", "measure_single", "tiny_config"]

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
_BATCHES, _BATCHED = (1, 2, 4, 8, 16, 32, 64), ("BF16", "W4A16", "FP8", "W8A8")
_PROMPT = 16


def tiny_config() -> PretrainedConfig:
    """A model that the interpreter gets through."""
    config = shapes_config("llama-3-8b")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 128, 128, 1, 64
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 64
    return config


def measure_single(settings: Settings, clock: Clock, shapes: str) -> list[dict[str, Any]]:
    """Batch 1: ms for the tokens with and without graphs, bytes of weights, peak memory; one row per way to run."""
    tokens, config = (1, tiny_config()) if settings.tiny else (32, shapes_config(shapes))
    rows: list[dict[str, Any]] = []
    for name, scheme, kernel, head in (ROWS[0], ROWS[1], *ROWS[-2:]) if settings.tiny else ROWS:
        if clock.allows(f"{name} {shapes}"):
            weights = None if head is None else get_scheme(head).weights
            settings.attempt(
                f"{name} {shapes}",
                lambda n=name, s=scheme, k=kernel, w=weights: rows.append(
                    _fewbit(settings, random_model(config, get_scheme(s), settings.device, settings.dtype, head=w, kernel=k), n, tokens)
                ),
            )
        _release(settings)
    for name, compiled in (("transformers BF16", False), ("transformers BF16, static cache, torch.compile", True)):
        if settings.cuda and clock.allows(f"{name} {shapes}"):
            settings.attempt(f"{name} {shapes}", lambda n=name, c=compiled: rows.append(_transformers(settings, config, n, tokens, c)))
        _release(settings)
    base = next((row["ms"] for row in rows if row["name"] == "fewbit BF16"), None)
    for row in rows:
        row |= {"shapes": shapes, "tokens": tokens, "over_fewbit_bf16": base / row["ms"] if base else None}
    return rows


def _fewbit(settings: Settings, model: GpuModel, name: str, tokens: int) -> dict[str, Any]:
    engine = GpuEngine(model)
    cache = engine.new_cache(_PROMPT + 6 * tokens + 8)  # three times with graphs, three without
    engine.prefill(torch.arange(1 if settings.tiny else _PROMPT), cache)
    engine.decode(cache)  # captures
    graphed = _wall(settings, lambda: [engine.decode(cache) for _ in range(tokens)])
    plain = GpuEngine(model, graphs=False)
    plain.decode(cache)
    launched = _wall(settings, lambda: [plain.decode(cache) for _ in range(tokens)])
    kernels = sorted({linear.kernel.name for linear in model.linears()})
    return {
        "name": name, "ms": graphed, "ms_without_graphs": launched, "graphs": engine.graphs_refusal() or "yes", "kernels": kernels,
        "weight_bytes": model.nbytes(), "cache_bytes": cache.nbytes(), "peak_bytes": _peak(settings),
    }  # fmt: skip


def _transformers(settings: Settings, config: PretrainedConfig, name: str, tokens: int, compiled: bool) -> dict[str, Any]:
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype).eval()
    ids = torch.arange(_PROMPT, device=settings.device)[None]
    options: dict[str, Any] = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1, "do_sample": False, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(3 if compiled else 1):
            model.generate(ids, **options)
        first = _wall(settings, lambda: model.generate(ids, **options | {"max_new_tokens": 1, "min_new_tokens": 1}))
        whole = _wall(settings, lambda: model.generate(ids, **options))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"name": name, "ms": whole - first, "weight_bytes": weights, "peak_bytes": _peak(settings)}


def measure_batches(settings: Settings, clock: Clock, shapes: str) -> list[dict[str, Any]]:
    """One row per scheme and batch: ms of a step; and of a prompt of 2,048 at batch 1."""
    config, batches = (tiny_config(), (1, 2)) if settings.tiny else (shapes_config(shapes), _BATCHES)
    rows: list[dict[str, Any]] = []
    for scheme in _BATCHED[:2] if settings.tiny else _BATCHED:
        if clock.allows(f"batches {scheme} {shapes}"):
            settings.attempt(f"batches {scheme} {shapes}", lambda s=scheme: rows.extend(_batches(settings, config, s, batches)))
        _release(settings)
    base = {(row["phase"], row["batch"]): row["ms"] for row in rows if row["scheme"] == "BF16"}
    for row in rows:
        bf16 = base.get((row["phase"], row["batch"]))
        row |= {"shapes": shapes, "over_bf16": bf16 / row["ms"] if bf16 else None}
    return rows


def _batches(settings: Settings, config: PretrainedConfig, scheme: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    steps, context, prompt = (1, 4, 2) if settings.tiny else (24, 128, 2048)
    model = random_model(config, get_scheme(scheme), settings.device, settings.dtype)
    engine, rows = GpuEngine(model), []
    for batch in batches:
        cache = engine.new_cache(context + 3 * steps + 4, batch)
        for sequence in range(batch):
            engine.prefill(torch.arange(2 if settings.tiny else context) % config.vocab_size, cache, sequence)
        engine.decode(cache)
        milliseconds = _wall(settings, lambda c=cache: [engine.decode(c) for _ in range(steps)]) / steps
        rows.append({"scheme": scheme, "phase": "decode", "batch": batch, "context": context, "ms": milliseconds})
    ids = torch.arange(prompt) % config.vocab_size
    engine.prefill(ids, engine.new_cache(prompt))
    milliseconds = _wall(settings, lambda: engine.prefill(ids, engine.new_cache(prompt)))
    rows.append({"scheme": scheme, "phase": "prefill", "batch": 1, "context": prompt, "ms": milliseconds})
    return rows


def _wall(settings: Settings, run: Any) -> float:
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
