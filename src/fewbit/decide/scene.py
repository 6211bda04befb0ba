"""A situation as plain numbers, for a page that decides again while a reader moves batch, context, bandwidth and cache.

The page computes what `predict.step`, `decide.timing`, `decide.memory` and `decide.choose` compute, from these numbers alone; a test moves
its controls in a browser and compares with this package. What depends on nothing that can be moved (bytes of a weight, losses, what runs
where) is computed here and only carried over. A machine whose kernels were measured is timed by tables of their rates
(`predict.rates`), which the page does not have: it shows the decision and its figures, and does not decide again.
"""

from __future__ import annotations

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
from fewbit.predict.step import GEMV_ROWS, UNPACK_OPERATIONS, UNPACK_ROWS, choose_path, compute_format, step_work

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
        "explorable": hardware.rates is None,
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
        "kv": [{"layers": kv.layers, "headDim": kv.head_dim, "window": kv.window} for kv in inventory.kv],
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
