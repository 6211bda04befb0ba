"""OpenVINO GenAI on the same GGUF files: its own reader, its own tokenization left out.

A pass is one `generate`; what counts of it are its own times: to the first token for a prefill, of the tokens after it for decode. Every
pass has a prompt of its own, so that no cache of prefixes answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from _worker import Pass, serve

_TYPES = {"openvino-q4_0": "q4_0", "openvino-q8_0": "q8_0"}
_pipelines: dict[str, Any] = {}


def _pipeline(path: str, threads: int) -> Any:
    if path not in _pipelines:
        _pipelines.clear()
        _pipelines[path] = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, ENABLE_HYPER_THREADING=True)
    return _pipelines[path]


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    if case["batch"] != 1:
        raise ValueError("only single sequences")
    pipeline = _pipeline(case["gguf"][_TYPES[case["contender"]]], case["threads"])
    context, steps, prompt = case["context"], case["steps"], case["prompt"]
    random = np.random.default_rng(0)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = (1 if prompt else steps + 1), True

    def work() -> float:
        ids = random.integers(2, 1000, (1, prompt or context))
        inputs = genai.TokenizedInputs(ov.Tensor(ids.astype(np.int64)), ov.Tensor(np.ones_like(ids)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return first if prompt else metrics.get_tpot().mean / 1e3 * steps

    facts = {"bytes": 0, "tokens": prompt or steps, "passes": 1 if prompt else steps, "head": "as in the file", "version": ov.__version__}
    return work, facts


if __name__ == "__main__":
    serve(setup)
