"""llama.cpp (through llama-cpp-python) reads GGUF files: log-probabilities of given tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["PACKAGES", "one", "prepare"]

PACKAGES = ("llama-cpp-python",)


def prepare() -> None:
    """Import what takes long, once for all checkpoints."""
    import llama_cpp  # noqa: F401


def one(checkpoint: Mapping[str, Any], ids: list[list[int]], shared: Any) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint."""
    from llama_cpp import Llama

    length = max(map(len, ids))
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    model = Llama(
        checkpoint["path"], n_ctx=length, n_batch=length, logits_all=True, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    parts = []
    for window in ids:
        model.reset()
        model.eval(window)
        parts.append(shared.log_softmax_at(np.array(model.scores[: len(window) - 1]), np.array(window[1:])))
    return {"logprobs": np.concatenate(parts)}
