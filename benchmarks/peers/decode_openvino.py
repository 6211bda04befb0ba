"""OpenVINO GenAI on the same GGUF files: its own reader, its own tokenization left out.

GenAI 2026.4.1 reads a GGUF file into a graph that its own CPU plugin then refuses ("ReadValue contains dead weak ptr"). The same graph,
saved by GenAI before (`enable_save_ov_model`) and read back, is compiled. So the first use of a file saves the graph beside it, and every
use runs that.

A pass is one `generate`; what counts of it are its own times: to the first token for a prefill, of the tokens after it for decode. Every
pass has a prompt of its own, so that no cache of prefixes answers.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from _worker import Pass, serve

_TYPES = {"openvino-q4_0": "q4_0", "openvino-q8_0": "q8_0"}
_pipelines: dict[str, Any] = {}


def _saved(path: Path) -> Path:
    """The directory with GenAI's graph of a GGUF file, which is made when it is missing."""
    directory = path.with_name(path.stem + "-openvino")
    if not (directory / "openvino_model.xml").is_file():
        partial = path.with_name(path.stem + "-openvino.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "model.gguf").symlink_to(path.resolve())
        with contextlib.suppress(RuntimeError):  # it saves, then compiles, and fails there
            genai.LLMPipeline(partial / "model.gguf", "CPU", enable_save_ov_model=True)
        if not (partial / "openvino_model.xml").is_file():
            raise RuntimeError("GenAI saved no graph of the GGUF file")
        partial.rename(directory)
    return directory


def _pipeline(path: str, threads: int) -> Any:
    if path not in _pipelines:
        _pipelines.clear()
        directory = _saved(Path(path))
        tokenizer = genai.Tokenizer(directory / "model.gguf")
        _pipelines[path] = genai.LLMPipeline(directory, tokenizer, "CPU", INFERENCE_NUM_THREADS=threads, ENABLE_HYPER_THREADING=True)
    return _pipelines[path]


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    if case["batch"] != 1:
        raise ValueError("only single sequences")
    pipeline = _pipeline(case["gguf"][_TYPES[case["contender"]]], case["threads"])
    context, steps, prompt = case["context"], case["steps"], case["prompt"]
    random = np.random.default_rng(0)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = (1 if prompt else steps + 1), True
    config.eos_token_id, config.stop_token_ids = 1, {1}

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
