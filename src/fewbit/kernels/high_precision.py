"""Which of torch's paths a product with a weight in high precision takes on the CPU.

torch sends a BF16 `F.linear` to oneDNN whatever its shape and whatever the CPU has. Two paths of torch's own are faster there:

    one token                   matrix times vector, where only memory bandwidth counts: on CPUs with AVX-512 torch's GEMV, oneDNN off
    32 tokens and more          on a CPU without BF16 products (no AVX512-BF16, no AMX) oneDNN emulates them at a third of the rate of FP32.
                                So the weight is widened to FP32, a tile of 4 MiB at a time that stays in cache, and multiplied in FP32;
                                sums are in FP32 either way and are rounded to BF16 once, at the end. FP16 likewise

`benchmarks/high_precision.py` prints both ratios for the machine at hand. A baseline that leaves this out would credit to quantization
what belongs to the choice of a path, and reading the BF16 model for quality would take twice as long. So what measures works within
`fastest_path`. A model's forward outside of it takes torch's own choice and computes what transformers computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from fewbit.kernels.environment import cpu_flags

__all__ = ["fastest_path", "linear"]

MANY_ROWS = 32  # from here widening a tile costs less than emulated products do
_TILE_BYTES = 4 * 2**20
_WITHIN: ContextVar[bool] = ContextVar("within fastest_path", default=False)
# What multiplies a 16-bit dtype in hardware, as /proc/cpuinfo and sysctl name it.
_NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp", "fp16"},
}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; within `fastest_path` by the faster of torch's paths.

    Args:
        x: [..., in].
        weight: [out, in], the dtype of `x`.
        bias: [out] or None.

    Returns:
        [..., out] in the dtype of `x`. Where it is 16 bits wide, that is one rounding of sums in FP32, whichever path was taken; the order
        of the sums differs. What needs a gradient goes through F.linear.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    widened = _WITHIN.get() and rows >= MANY_ROWS and _is_emulated(x.dtype)
    if not widened or trained or x.device.type != "cpu" or x.dtype != weight.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    wide, outputs = x.float(), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], outputs)
    tile = max(64, _TILE_BYTES // 4 // max(x.shape[-1], 1))
    for first in range(0, outputs, tile):
        part = slice(first, first + tile)
        y[..., part] = torch.nn.functional.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return y


@contextmanager
def fastest_path(rows: int, device: torch.device) -> Iterator[None]:
    """Within this context products of `rows` tokens with weights in high precision take the fastest of torch's paths.

    Args:
        rows: tokens that pass through the linears at once.
        device: where they run; nothing changes but on a CPU.
    """
    single = rows == 1 and device.type == "cpu" and _has_avx512() and torch.backends.mkldnn.enabled
    before = _WITHIN.set(True)
    if single:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property that torch's stubs do not know
    try:
        yield
    finally:
        _WITHIN.reset(before)
        if single:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


@cache
def _has_avx512() -> bool:
    return "avx512f" in cpu_flags()


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU is known to have no products in a 16-bit dtype; False where the operating system does not say."""
    flags = cpu_flags()
    return dtype in _NATIVE and bool(flags) and not flags & _NATIVE[dtype]
