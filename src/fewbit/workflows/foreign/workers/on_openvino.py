"""OpenVINO GenAI reads GGUF files with its own reader: log-probabilities of given tokens.

A pipeline answers text; for log-probabilities of the prompt one asks for them (`echo`, `logprobs`) from the pipeline with continuous
batching. Kernels compute in float32, so that the floor is small.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["PACKAGES", "one", "prepare"]

PACKAGES = ("openvino-genai", "openvino", "openvino-tokenizers")


def prepare() -> None:
    """Nothing: its threads do not survive a fork, so each child imports it."""


def one(checkpoint: Mapping[str, Any], ids: list[list[int]], shared: Any) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint."""
    import openvino as ov
    import openvino_genai as genai

    properties = {"INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", "1")), "INFERENCE_PRECISION_HINT": "f32"}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline(checkpoint["path"], scheduler, "CPU", {**properties, "KV_CACHE_PRECISION": "f32"})
    config = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, do_sample=False, echo=True, logprobs=1)
    parts = []
    for number, window in enumerate(ids):
        handle = pipeline.add_request(number, ov.Tensor(np.array([window], dtype=np.int64)), config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        found = np.concatenate([np.array(output.generated_log_probs, dtype=np.float32) for output in handle.read_all()])
        parts.append(found[1 : len(window)])
    return {"logprobs": np.concatenate(parts)}
