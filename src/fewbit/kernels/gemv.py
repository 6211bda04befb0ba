"""Which of torch's two BF16 paths a single token takes on the CPU.

torch sends a BF16 `F.linear` to oneDNN whatever its shape. For one token, where the product is a matrix times a vector and only memory
bandwidth counts, torch's own GEMV is faster on CPUs with AVX-512 (docs/log.md has the figures). From two tokens on oneDNN is as fast or
faster. A baseline that leaves this out would credit to quantization what belongs to the choice of a path, so the engine makes
single-token steps the fast way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fewbit.kernels.environment import cpu_flags

__all__ = ["single_token"]


@contextmanager
def single_token(rows: int, device: torch.device) -> Iterator[None]:
    """Within this context products of `rows` tokens with weights in high precision take the faster of torch's paths.

    Args:
        rows: tokens that pass through the linears at once.
        device: where they run; nothing changes but on a CPU with AVX-512.
    """
    if rows != 1 or device.type != "cpu" or not _has_avx512() or not torch.backends.mkldnn.enabled:
        yield
        return
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property that torch's stubs do not know
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


@cache
def _has_avx512() -> bool:
    return "avx512f" in cpu_flags()
