"""How fast the kernels that run multiply, per format and number of tokens: what a data sheet says of a GPU, measured for a CPU.

A matrix product over M tokens takes t(M) per weight, which is flat while memory limits (the weight is read once, however many rows it is
multiplied with) and grows with M from where arithmetic limits. Where the bend is, and how steep the slope behind it, is a property of each
kernel: an exact 4-bit kernel unpacks, one with INT8 inputs multiplies four bytes an instruction, a BF16 kernel on a processor without BF16
instructions converts. So t(M) is measured for each format at a few M, with the very kernels that the dispatcher selects, in their native
form, as the engine calls them:

    t(M) = seconds of one product / weights        weights: copies that together are three times the last-level cache, used in turns

Many tokens are measured on one smaller weight: there the products take the time and not the reads. Medians of undisturbed passes, because
those are predicted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fewbit.bench.machine import last_level_cache_bytes
from fewbit.bench.undisturbed import Passes
from fewbit.errors import KernelError
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Compute, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, use_torch_threads
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn
from fewbit.results import KernelRate

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["MEASURED_KERNELS", "RatePlan", "measure_kernel_rate", "measure_kernel_rates"]

# (scheme, compute mode): what fewbit has a kernel of its own for.
MEASURED_KERNELS: tuple[tuple[str, Compute], ...] = (
    ("BF16", "exact"),
    *((name, "exact") for name in ("W8A16", "W4A16", "W8A8", "W3A16", "W2A16", "NF4", "FP8A16", "NVFP4", "MXFP4")),
    *((name, "int8-activations") for name in ("W8A16", "W4A16", "W3A16", "W2A16")),
)


@dataclass(frozen=True)
class RatePlan:
    """How much is measured.

    Attributes:
        tokens: rows of the inputs. columns: of the weight.
        rows, few_rows: of the weights for few and for many tokens. many: tokens from which on the smaller one is used.
        cache_share: bytes of all copies over the last-level cache.
        rounds: in which the numbers of tokens take turns. budget_s: seconds for each of them in all rounds, at least two products in each.
    """

    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    columns: int = 2048
    rows: int = 16384
    few_rows: int = 2048
    many: int = 64
    cache_share: float = 3.0
    rounds: int = 3
    budget_s: float = 0.15


def measure_kernel_rates(kernels: Sequence[tuple[str, Compute]] = MEASURED_KERNELS, plan: RatePlan | None = None) -> list[KernelRate]:
    """The rates of these kernels; those that do not run here in native form are left out."""
    found = (measure_kernel_rate(scheme, compute, plan or RatePlan()) for scheme, compute in kernels)
    return [rate for rate in found if rate is not None]


@torch.inference_mode()
def measure_kernel_rate(scheme: str, compute: Compute, plan: RatePlan) -> KernelRate | None:
    """The rate of the kernel that the dispatcher selects; None when it has no native form here.

    Raises:
        UsageError: no such scheme.
    """
    spec = get_scheme(scheme)
    base = _weight(spec, plan)
    many = _packed(base, spec, compute, plan.few_rows, plan, copies=1)
    few = _packed(base, spec, compute, plan.rows, plan, copies=None)
    if many is None or few is None:
        return None
    weights = [many if tokens >= plan.many else few for tokens in plan.tokens]
    passes = [Passes() for _ in plan.tokens]
    for _ in range(plan.rounds):  # whatever disturbs a moment disturbs one round of some
        for tokens, weight, times in zip(plan.tokens, weights, passes, strict=True):
            _time(weight.linears, tokens, times, plan)
    per_weight = [
        1e12 * times.median() / (weight.linears[0].out_features * weight.linears[0].in_features)
        for weight, times in zip(weights, passes, strict=True)
    ]
    bits = 8.0 * few.linears[0].bytes / (plan.rows * plan.columns)
    return KernelRate(scheme.upper(), compute, few.kernel, bits, list(plan.tokens), per_weight)


@dataclass(frozen=True)
class _Packed:
    """Copies of one weight, as the engine takes them."""

    kernel: str
    linears: list[Linear]


def _weight(scheme: Scheme, plan: RatePlan) -> torch.Tensor | QuantizedTensor:
    """[few_rows, columns]; what the codes are does not matter to any kernel's time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(plan.few_rows, plan.columns, generator=generator).mul_(plan.columns**-0.5)
    return weight.to(torch.bfloat16) if scheme.weights is None else rtn(weight, scheme.weights)


def _repeated(weight: torch.Tensor | QuantizedTensor, times: int) -> torch.Tensor | QuantizedTensor:
    """The rows again and again: quantizing them once is enough."""
    if isinstance(weight, torch.Tensor):
        return weight.repeat(times, 1)
    zero = None if weight.zero_point is None else weight.zero_point.repeat(times, 1)
    return replace(weight, values=weight.values.repeat(times, 1), scale=weight.scale.repeat(times, 1), zero_point=zero)


def _packed(
    base: torch.Tensor | QuantizedTensor, scheme: Scheme, compute: Compute, rows: int, plan: RatePlan, copies: int | None
) -> _Packed | None:
    """Copies of the weight with so many rows; as many as the plan wants in memory when None."""
    request = KernelRequest(scheme.weights, scheme.input_activations, rows, plan.columns, "cpu", torch.bfloat16, compute=compute)
    try:
        kernel = select(request).kernel
    except KernelError:
        return None
    packed = kernel.pack(_repeated(base, rows // plan.few_rows), request)
    first = kernel.native(packed, request)
    if first is None:
        return None
    if copies is None:
        copies = max(1, -(-int(plan.cache_share * last_level_cache_bytes()) // first.bytes))
    linears = [first]
    for _ in range(copies - 1):
        # Where the kernels keep their weights; a dense weight stays where torch has put it.
        copy = {name: tensor.clone() for name, tensor in packed.items()} if scheme.weights is None else in_weight_memory(packed)
        linear = kernel.native(copy, request)
        assert linear is not None
        linears.append(linear)
    return _Packed(kernel.name, linears)


def _time(linears: Sequence[Linear], tokens: int, times: Passes, plan: RatePlan) -> None:
    """Some products, the copies in turns, the first not counted."""
    use_torch_threads()
    x = torch.randn(tokens, plan.columns).to(torch.bfloat16)
    y = torch.empty(tokens, linears[0].out_features, dtype=torch.bfloat16)
    linears[-1].apply(x, y, None)
    started, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - started < plan.budget_s / plan.rounds:
        linear = linears[len(times) % len(linears)]
        times.run(lambda linear=linear: linear.apply(x, y, None))  # type: ignore[misc]
        done += 1
