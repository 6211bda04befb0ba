"""Section 3: times of single linears by format, shape and number of tokens; the peers are in `_gpu_peers`.

A call multiplies with one of several copies of the weight, so that together they exceed four times the second-level cache; calls are
captured in a CUDA graph. Shares are of the measured read bandwidth and of the measured BF16 rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _gpu_common import Clock, Settings, copies_for, random_rows, time_calls

from fewbit.errors import FewbitError
from fewbit.formats.spec import get_scheme
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import select
from fewbit.runtime.gpu_model import random_quantized

__all__ = ["BAR_SHAPES", "FORMATS", "OTHERS", "SHAPES", "TOKENS", "Multiply", "measure_kernels", "time_contender"]

BAR_SHAPES = {"8192x28672": (8192, 28672), "4096x11008": (4096, 11008)}
SHAPES = {
    **BAR_SHAPES, "8b gate,up": (28672, 4096), "8b down": (4096, 14336), "8b q,k,v": (6144, 4096), "8b output": (4096, 4096),
    "3b gate,up": (22016, 2048), "3b down": (2048, 11008), "3b q,k,v": (2560, 2048), "3b output": (2048, 2048),
    "70b gate,up": (57344, 8192), "70b q,k,v": (10240, 8192), "70b output": (8192, 8192), "7b gate,up": (22016, 4096),
    "7b q,k,v": (12288, 4096),
}  # fmt: skip
FORMATS = ("BF16", "W4A16", "FP8", "W8A8")  # everywhere; then, with fewer tokens, those below
OTHERS = ("W8A16", "FP8A16", "NF4", "MXFP4", "NVFP4", "W4A16-ASYM", "W3A16", "W2A16", "FP8-BLOCK")
TOKENS = (1, 16, 128, 2048, 4, 8, 32, 64, 1024, 4096)
_FEWER = (1, 16, 128, 1024)
Multiply = Callable[[torch.Tensor], object]


def measure_kernels(settings: Settings, seconds: float, machine: dict[str, Any]) -> None:
    """One row `kernels` per shape, contender and number of tokens."""
    clock = Clock(seconds, settings)
    if settings.tiny:
        for contender in ("BF16", "W4A16", "W8A8"):
            _measure(settings, clock, machine, contender, "tiny", (48, 256), (1,))
        return
    for contenders, tokens in ((FORMATS, TOKENS), (OTHERS, _FEWER)):
        for name, shape in SHAPES.items():
            for contender in contenders:
                _measure(settings, clock, machine, contender, name, shape, tokens)


def _measure(
    settings: Settings, clock: Clock, machine: dict[str, Any], contender: str, name: str, shape: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    def run() -> None:
        copies, nbytes = _copies(settings, contender, *shape)
        time_contender(settings, clock, machine, contender, name, shape, tokens, copies, nbytes)

    if clock.allows(f"{contender} {name}"):
        settings.attempt(f"{contender} {name}", run)


def time_contender(
    settings: Settings, clock: Clock, machine: dict[str, Any], contender: str, name: str, shape: tuple[int, int], tokens: tuple[int, ...],
    copies: list[Multiply], nbytes: int,
) -> None:  # fmt: skip
    """Rows of one contender at one shape.

    Args:
        copies: products with weights that lie in different memory. nbytes: of one weight with its scales.
    """
    out, columns = shape
    for count in tokens:
        what = f"{contender} {name} M={count}"
        if not clock.allows(what):
            continue

        def run(count: int = count) -> None:
            x = random_rows(settings, count, columns)
            milliseconds = time_calls([lambda multiply=multiply: multiply(x) for multiply in copies], settings)
            rate = machine.get("bf16_tflop_s")
            settings.record(
                "kernels",
                {"shape": name, "out": out, "columns": columns, "contender": contender, "tokens": count, "ms": milliseconds,
                 "bytes": nbytes, "share_of_bandwidth": nbytes / milliseconds / 1e6 / machine["read_gb_s"],
                 "share_of_bf16_rate": 2 * count * out * columns / milliseconds / 1e9 / rate if rate else None},
            )  # fmt: skip

        settings.attempt(what, run)


def _copies(settings: Settings, contender: str, out: int, columns: int) -> tuple[list[Multiply], int]:
    """Products with weights of their own, and one weight's bytes."""
    scheme = get_scheme(contender)
    request = KernelRequest(scheme.weights, scheme.input_activations, out, columns, settings.device, settings.dtype)
    kernel = select(request).kernel
    if not kernel.fused:
        raise FewbitError(f"{contender} has no fused kernel here")
    if scheme.weights is None:
        packed = kernel.pack(random_rows(settings, out, columns), request)
    else:
        packed = kernel.pack(random_quantized(out, columns, scheme.weights, torch.Generator(settings.device).manual_seed(0)), request)
    nbytes = sum(tensor.nbytes for tensor in packed.values())
    every = [packed] + [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(copies_for(nbytes, settings) - 1)]
    return [lambda x, one=one: kernel.apply(x, one, None, request) for one in every], nbytes
