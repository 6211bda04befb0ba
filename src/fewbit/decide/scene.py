"""A situation as plain numbers, for a page that decides again while a reader moves batch, context, bandwidth and cache.

The page computes what `predict.step`, `decide.timing`, `decide.memory` and `decide.choose` compute, from these numbers alone; a test moves
its controls in a browser and compares with this package. What depends on nothing that can be moved (bytes of a weight, losses, what runs
where) is computed here and only carried over. Of a machine whose kernels were measured (`predict.rates`), the tables of those kernels go
along that its candidates run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewbit.decide.candidates import Option, Situation, list_options
from fewbit.decide.memory import CHUNK_TOKENS, workspace_bytes
from fewbit.decide.quality import CONFIDENCE
from fewbit.decide.relation import MIN_CACHE_GAIN, MIN_GAIN
from fewbit.decide.timing import STEP
from fewbit.formats.spec import get_scheme
from fewbit.models.inventory import Inventory
from fewbit.predict.calibration import Z90
from fewbit.predict.efficiency import FACTORS
from fewbit.predict.prediction import StepPoint
from fewbit.predict.rates import LEAST_SHARE, Rates
from fewbit.predict.step import ACTIVATION_BYTES, GEMV_ROWS, UNPACK_OPERATIONS, UNPACK_ROWS, choose_path, compute_format, step_work

__all__ = ["SCENE_CONSTANTS", "scene_of"]

SCENE_CONSTANTS: dict[str, Any] = {
    "z90": Z90,
    "step": STEP,
    "confidence": CONFIDENCE,
    "minGain": MIN_GAIN,
    "minCacheGain": MIN_CACHE_GAIN,
    "chunkTokens": CHUNK_TOKENS,
    "unpackOperations": UNPACK_OPERATIONS,
    "unpackRows": UNPACK_ROWS,
    "gemvRows": GEMV_ROWS,
    "leastShare": LEAST_SHARE,
    "activationBytes": ACTIVATION_BYTES,
    "factors": list(FACTORS),
}


def scene_of(situation: Situation) -> dict[str, Any]:
    """The numbers of one cell; everything in bytes, 1e9 bytes per second and 1e12 operations per second."""
    hardware, outline, inventory, workload = situation.hardware, situation.outline, situation.inventory, situation.workload
    options = list_options(situation)
    one, full = workspace_bytes(inventory, 1, 1), workspace_bytes(inventory, 1, CHUNK_TOKENS)
    per_token = (full - one) / (CHUNK_TOKENS - 1)
    posterior = situation.posterior
    caches = dict.fromkeys(option.cached.name if option.cached else "BF16" for option in options)
    return {
        "model": inventory.name,
        "rates": None if hardware.rates is None else _rates(hardware.rates, situation, options, list(caches)),
        "label": hardware.label,
        "bandwidth": hardware.bandwidth_gb_s,
        "dense": dict(hardware.dense_tflop_s),
        "vector": hardware.vector_tflop_s,
        "capacity": hardware.memory_bytes,
        "reserved": hardware.reserved_bytes,
        "mean": posterior.mean.tolist(),
        "root": np.linalg.cholesky(posterior.covariance).T.tolist(),
        "residual": posterior.residual,
        "groups": [
            {
                "rows": group.rows,
                "columns": group.columns,
                "count": group.count,
                "copies": group.copies,
                "launches": group.launches,
                "quantizable": group.quantizable,
                "head": group.name == "lm_head",
            }
            for group in outline.groups
        ],
        "depth": outline.depth,
        "operators": outline.operators,
        "heads": outline.heads,
        "kv": [{"layers": kv.layers, "heads": kv.heads, "headDim": kv.head_dim, "window": kv.window} for kv in inventory.kv],
        "caches": {name: _cache(inventory, name) for name in caches},
        "workspacePerToken": per_token,
        "workspacePerSequence": one - per_token,
        "maxContext": inventory.max_context,
        "options": [_option(option, situation) for option in options],
        "workload": {
            "batch": workload.batch,
            "prompt": workload.prompt,
            "newTokens": workload.new_tokens,
            "goal": workload.goal,
            "maxMsPerToken": workload.limits.max_ms_per_token,
            "maxTtftMs": workload.limits.max_ttft_ms,
        },
    }


def _rates(rates: Rates, situation: Situation, options: Sequence[Option], caches: Sequence[str]) -> dict[str, Any]:
    """Picoseconds per weight of every kernel that may run, and nanoseconds per cached token of attention in each class of layers."""
    kernels = {}
    for name in dict.fromkeys(["BF16", *(option.scheme.name for option in options)]):
        found = rates.kernel(name)
        if found:
            kernels[name] = {
                "bits": found[0].bits,
                "peak": rates.peak_tera(found),
                "measured": [{"columns": one.columns, "tokens": one.tokens, "ps": one.ps_per_weight} for one in reversed(found)],
            }
    heads, classes = situation.outline.heads, situation.inventory.kv
    attention = {}
    for phase in ("prefill", "decode"):
        for cache in caches:
            times = [rates.attention_ns(phase, cache.upper(), kv.head_dim, heads / kv.heads) for kv in classes]
            attention[f"{phase} {cache}"] = None if None in times else times
    return {
        "bandwidth": rates.measured.read_bandwidth_gb_s,
        "nsPerActivation": rates.ns_per_activation,
        "kernels": kernels,
        "attention": attention,
    }


def _cache(inventory: Inventory, name: str) -> dict[str, Any]:
    """Bytes that one token takes in each class of layers, and how many of the newest stay in 16 bit."""
    scheme = get_scheme(name)
    return {
        "perToken": [kv.bytes_per_token(scheme.kv_keys, scheme.kv_values) for kv in inventory.kv],
        "plain": [kv.bytes_per_token(None, None) for kv in inventory.kv],
        "recent": scheme.kv_residual_window if scheme.kv_keys is not None else 0,
    }


def _option(option: Option, situation: Situation) -> dict[str, Any]:
    loss, scheme = option.quality.loss_percent, option.scheme
    found: dict[str, Any] = {
        "name": option.name,
        "weights": scheme.name,
        "cache": option.cached.name if option.cached else "BF16",
        "weightBytes": option.memory.weights_bytes,
        "loss": loss.value,
        "lossLow": loss.low,
        "lossHigh": loss.high,
        "measured": option.quality.measured,
        "probability": option.quality.probability,
        "verdict": option.quality.verdict,
        "obstacle": option.obstacle,
        "runtime": option.serving.runtime if option.serving else "",
    }
    if option.batch is None or option.serving is None:
        return found
    native = option.serving.path == "native" and compute_format(scheme) == "bf16"
    path = choose_path(scheme, situation.hardware, "fused" if native else option.serving.path)
    works = step_work(situation.outline, StepPoint(scheme=scheme.name, path=path), path)
    groups = situation.outline.groups
    return {
        **found,
        "path": path,
        "format": compute_format(scheme) if path == "native" else "bf16",
        "quantizesInputs": scheme.input_activations is not None,
        "stored": [work.weight_bytes / group.expected_copies_read(1) for work, group in zip(works, groups, strict=False)],
    }
