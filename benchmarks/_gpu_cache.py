"""Section 5: attention of a decode step by context and format of the KV cache, and how many sequences fit."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows, time_calls

from fewbit.kernels.triton.attention import attend, new_layer

__all__ = ["measure_cache"]

KINDS = ("none", "fp8", "int8", "int4")
_CONTEXTS = (1024, 32768, 8192, 65536, 2048, 4096, 16384)
_HEADS, _KV_HEADS, _DIM, _LAYERS = 32, 8, 128, 32  # Llama-3-8B
_WEIGHT_BYTES = {"BF16": 16.06e9, "W4A16": 5.7e9}  # of Llama-3-8B, the head in BF16


def measure_cache(settings: Settings, clock: Clock, read_gb_s: float) -> list[dict[str, Any]]:
    """One row per format, context and batch: ms of one layer's attention, its share of the read bandwidth, sequences that fit."""
    heads, kv_heads, dim = (2, 1, 64) if settings.tiny else (_HEADS, _KV_HEADS, _DIM)
    batches, contexts = ((2,), (70,)) if settings.tiny else ((8, 32, 1), _CONTEXTS)
    memory = torch.cuda.get_device_properties(settings.device).total_memory if settings.cuda else 80e9
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for context in contexts:
            for kind in KINDS:
                what = f"cache {kind} batch {batch} context {context}"
                if not clock.allows(what):
                    continue

                def run(kind: str = kind, batch: int = batch, context: int = context) -> float:
                    layer = new_layer(kind, batch, kv_heads, context, dim, settings.dtype, settings.device)
                    layers = [layer] + [
                        new_layer(kind, batch, kv_heads, context, dim, settings.dtype, settings.device)
                        for _ in range(copies_for(layer.nbytes(), settings) - 1)
                    ]
                    queries = random_rows(settings, batch, heads, dim)
                    lengths = torch.full((batch,), context, dtype=torch.int32, device=settings.device)
                    parts = max(1, min(64, -(-context // 256), -(-264 // (batch * kv_heads))))
                    milliseconds = time_calls(
                        [lambda one=one: attend(queries, one, lengths, dim**-0.5, parts=parts) for one in layers], settings, replays=9
                    )
                    per_token = layer.nbytes() / batch / context * _LAYERS
                    fit = {name: int(max(0.92 * memory - weights, 0) / per_token / context) for name, weights in _WEIGHT_BYTES.items()}
                    rows.append(
                        {"kind": kind, "batch": batch, "context": context, "ms": milliseconds,
                         "share_of_bandwidth": layer.nbytes() / milliseconds / 1e6 / read_gb_s, "bytes_per_token_of_model": per_token,
                         "sequences_that_fit": fit}
                    )  # fmt: skip
                    return milliseconds

                settings.attempt(what, run)
    bf16 = {(row["batch"], row["context"]): row["ms"] for row in rows if row["kind"] == "none"}
    for row in rows:
        base = bf16.get((row["batch"], row["context"]))
        row["over_bf16"] = base / row["ms"] if base else None
    return rows
