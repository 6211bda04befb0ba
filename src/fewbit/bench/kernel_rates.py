"""How fast the kernels that run multiply, per format and number of tokens: what a data sheet says of a GPU, measured for a CPU.

A matrix product over M tokens takes t(M) per weight, which is flat while memory limits (the weight is read once, however many rows it is
multiplied with) and grows with M from where arithmetic limits. Where the bend is, and how steep the slope behind it, is a property of each
kernel: an exact 4-bit kernel unpacks, one with INT8 inputs multiplies four bytes an instruction, a BF16 kernel on a processor without BF16
instructions converts. So t(M) is measured for each format at a few M, with the very kernels that the dispatcher selects, in their native
form, as the engine calls them:

    t(M, K) = seconds of one product / weights        weights: copies that together are three times the last-level cache, used in turns

K is the number of columns, measured at a small and a large one: what a kernel does once per result, adding up a vector for instance, weighs
1 / K per weight. Many tokens are measured on one smaller weight: there the products take the time and not the reads. Kernels and numbers of
tokens take turns in rounds, because a shared machine is slower for seconds at a time; medians of undisturbed passes, because those are
predicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fewbit.bench.machine import last_level_cache_bytes
from fewbit.bench.undisturbed import Passes
from fewbit.errors import KernelError
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Compute, Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, use_torch_threads
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn
from fewbit.results import KernelRate

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["MEASURED_KERNELS", "RatePlan", "measure_kernel_rates"]

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
        tokens: rows of the inputs. columns: of the weights.
        weights: of the matrix for few tokens. few_rows: of the one for many tokens. many: tokens from which on the smaller one is used.
        cache_share: bytes of all copies over the last-level cache.
        rounds: in which kernels and tokens take turns. together: kernels that take turns; their copies are resident at the same time.
        budget_s: seconds for each number of tokens in all rounds, at least two products in each.
    """

    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    columns: tuple[int, ...] = (1152, 4608)
    weights: int = 1 << 24
    few_rows: int = 512
    many: int = 64
    cache_share: float = 3.0
    rounds: int = 3
    together: int = 3
    budget_s: float = 0.1

    def rows(self, columns: int) -> int:
        """Of the matrix for few tokens: a multiple of `few_rows`."""
        return self.few_rows * max(1, self.weights // columns // self.few_rows)


@torch.inference_mode()
def measure_kernel_rates(
    kernels: Sequence[tuple[str, Compute]] = MEASURED_KERNELS,
    plan: RatePlan | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[KernelRate]:
    """The rates of these kernels, one for each number of columns; those that do not run here in native form are left out.

    Args:
        progress: called with (kernels done, what is next).

    Raises:
        UsageError: no such scheme.
    """
    plan = plan or RatePlan()
    rates: list[KernelRate] = []
    for start in range(0, len(kernels), plan.together):
        some = kernels[start : start + plan.together]
        if progress is not None:
            progress(start, "kernels of " + ", ".join(f"{scheme} ({compute})" for scheme, compute in some))
        cases = [case for scheme, compute in some for columns in plan.columns if (case := _case(scheme, compute, columns, plan))]
        for _ in range(plan.rounds):
            for case in cases:
                for tokens, passes in case.passes.items():
                    _time(case, tokens, passes, plan)
        rates += [case.rate() for case in cases]
    return rates


@dataclass(frozen=True)
class _Case:
    """One kernel at one number of columns.

    Attributes:
        few: copies of a weight larger than the cache. many: one smaller weight, for many tokens.
        passes: by number of tokens.
    """

    scheme: str
    compute: Compute
    kernel: str
    few: list[Linear]
    many: Linear
    passes: dict[int, Passes]
    plan: RatePlan

    def linears(self, tokens: int) -> list[Linear]:
        """What is multiplied with so many tokens."""
        return [self.many] if tokens >= self.plan.many else self.few

    def rate(self) -> KernelRate:
        """Of the passes so far."""
        per_weight = []
        for tokens, passes in self.passes.items():
            linear = self.linears(tokens)[0]
            per_weight.append(1e12 * passes.median() / (linear.out_features * linear.in_features))
        first = self.few[0]
        bits = 8.0 * first.bytes / (first.out_features * first.in_features)
        return KernelRate(self.scheme.upper(), self.compute, self.kernel, bits, first.in_features, list(self.passes), per_weight)


def _case(scheme: str, compute: Compute, columns: int, plan: RatePlan) -> _Case | None:
    """None when the kernel that the dispatcher selects has no native form here."""
    spec = get_scheme(scheme)
    base = _weight(spec, plan.few_rows, columns)
    request = KernelRequest(spec.weights, spec.input_activations, plan.few_rows, columns, "cpu", torch.bfloat16, compute=compute)
    try:
        kernel = select(request).kernel
    except KernelError:
        return None
    many = kernel.native(kernel.pack(base, request), request)
    if many is None:
        return None
    few = _copies(kernel, base, replace(request, out_features=plan.rows(columns)), plan)
    return _Case(scheme, compute, kernel.name, few, many, {tokens: Passes() for tokens in plan.tokens}, plan)


def _weight(scheme: Scheme, rows: int, columns: int) -> torch.Tensor | QuantizedTensor:
    """[rows, columns]; what the codes are does not matter to any kernel's time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)
    return weight.to(torch.bfloat16) if scheme.weights is None else rtn(weight, scheme.weights)


def _copies(kernel: Kernel, base: torch.Tensor | QuantizedTensor, request: KernelRequest, plan: RatePlan) -> list[Linear]:
    """The rows of `base` again and again, which need not be quantized anew, and as many copies of that as the plan wants in memory."""
    packed = kernel.pack(_repeated(base, request.out_features // plan.few_rows), request)
    first = kernel.native(packed, request)
    assert first is not None  # it had a native form for fewer rows
    linears = [first]
    for _ in range(-(-int(plan.cache_share * last_level_cache_bytes()) // first.bytes) - 1):
        # Where the kernels keep their weights; a dense weight stays where torch has put it.
        dense = request.weights is None
        copy = {name: tensor.clone() for name, tensor in packed.items()} if dense else in_weight_memory(packed)
        linear = kernel.native(copy, request)
        assert linear is not None
        linears.append(linear)
    return linears


def _repeated(weight: torch.Tensor | QuantizedTensor, times: int) -> torch.Tensor | QuantizedTensor:
    if isinstance(weight, torch.Tensor):
        return weight.repeat(times, 1)
    zero = None if weight.zero_point is None else weight.zero_point.repeat(times, 1)
    return replace(weight, values=weight.values.repeat(times, 1), scale=weight.scale.repeat(times, 1), zero_point=zero)


def _time(case: _Case, tokens: int, passes: Passes, plan: RatePlan) -> None:
    """Some products of a round, the copies in turns, the first not counted."""
    use_torch_threads()
    linears = case.linears(tokens)
    x = torch.randn(tokens, linears[0].in_features).to(torch.bfloat16)
    y = torch.empty(tokens, linears[0].out_features, dtype=torch.bfloat16)
    linears[len(passes) % len(linears) - 1].apply(x, y, None)
    started, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - started < plan.budget_s / plan.rounds:
        linear = linears[len(passes) % len(linears)]
        passes.run(lambda linear=linear: linear.apply(x, y, None))  # type: ignore[misc]
        done += 1
