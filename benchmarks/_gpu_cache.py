"""Section 5: attention of a decode step by context and format of the KV cache, and how many sequences fit."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows, time_calls

from fewbit.kernels.triton.attention import attend, new_layer, parts_for

__all__ = ["BATCHES", "CONTEXTS", "KINDS", "measure_cache"]

KINDS = ("none", "fp8", "int8", "int4")
CONTEXTS = (32768, 1024, 8192, 65536, 2048, 4096, 16384)
BATCHES = (8, 32, 1)
HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama-3-8B, of 32 layers
_LAYERS = 32
_WEIGHT_BYTES = {"BF16": 16.06e9, "W4A16": 5.7e9}  # of Llama-3-8B, the head in BF16


def measure_cache(settings: Settings, seconds: float, machine: dict[str, Any]) -> None:
    """One row `cache` per format, context and batch: ms of one layer's attention, its share of the read bandwidth, sequences that fit."""
    clock = Clock(seconds, settings)
    batches, contexts = ((2,), (70,)) if settings.tiny else (BATCHES, CONTEXTS)
    for batch in batches:
        for context in contexts:
            for kind in KINDS:
                what = f"cache {kind} batch {batch} context {context}"
                if clock.allows(what):
                    settings.attempt(what, lambda k=kind, b=batch, c=context: _measure(settings, machine, k, b, c))


def _measure(settings: Settings, machine: dict[str, Any], kind: str, batch: int, context: int) -> None:
    heads, kv_heads, dim = (2, 1, 128) if settings.tiny else (HEADS, KV_HEADS, DIM)
    memory = torch.cuda.get_device_properties(settings.device).total_memory if settings.cuda else 80e9

    def fresh() -> Any:
        return new_layer(kind, batch, kv_heads, context, dim, settings.dtype, settings.device)

    layer = fresh()
    layers = [layer] + [fresh() for _ in range(copies_for(layer.nbytes(), settings) - 1)]
    for one in layers:  # zeros take less power than numbers, and are faster
        for codes in (one.keys, one.values):
            codes.view(torch.uint8).random_(0, 48)  # no code of FP8 or BF16 below 48 is NaN or large
        if kind != "none":
            one.key_scale.fill_(0.01)
            one.value_scale.fill_(0.01)
    queries = random_rows(settings, batch, heads, dim)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=settings.device)
    parts = parts_for(context, batch * kv_heads, settings.device)
    milliseconds = time_calls([lambda one=one: attend(queries, one, lengths, dim**-0.5, parts=parts) for one in layers], settings)
    per_token = layer.nbytes() / batch / context * _LAYERS
    settings.record(
        "cache",
        {"kind": kind, "batch": batch, "context": context, "ms": milliseconds, "parts": parts,
         "share_of_bandwidth": layer.nbytes() / milliseconds / 1e6 / machine["read_gb_s"], "bytes_per_token_of_model": per_token,
         "sequences_that_fit": {name: int(max(0.92 * memory - size, 0) / per_token / context) for name, size in _WEIGHT_BYTES.items()}},
    )  # fmt: skip
