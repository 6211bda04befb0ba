"""One function selects the kernel, and says why each better one was not taken.

To add a kernel: write its file, add one line to `KERNELS`. Nothing else in fewbit names kernels.
"""

from __future__ import annotations

from fewbit.errors import KernelError, UsageError
from fewbit.kernels.base import Kernel, KernelRequest, PassedOver, Selection
from fewbit.kernels.cpu.exact import CpuExact
from fewbit.kernels.cpu.int_activations import CpuIntActivations
from fewbit.kernels.cpu.tables import CpuTables
from fewbit.kernels.cpu.w8a8 import CpuW8A8
from fewbit.kernels.dense import DenseKernel
from fewbit.kernels.onednn_w8a8 import OneDnnW8A8
from fewbit.kernels.reference import ReferenceKernel
from fewbit.kernels.torch_int4pack import TorchInt4Pack
from fewbit.kernels.torch_int8pack import TorchInt8Pack
from fewbit.kernels.triton.linear import TritonUnfused, TritonWeightOnly
from fewbit.kernels.triton.w8a8 import TritonLlmInt8, TritonW8A8

__all__ = ["KERNELS", "UNFUSED", "select"]

KERNELS: tuple[Kernel, ...] = (
    DenseKernel(),
    CpuIntActivations(2),
    CpuIntActivations(3),
    CpuIntActivations(4),
    CpuIntActivations(8),
    *(CpuExact(number) for number in ("int8", "int4", "int3", "int2", "e2m1")),
    *(CpuTables(grid) for grid in ("nf4", "codebook4", "fp8_e4m3", "fp8_e5m2")),
    TorchInt4Pack(),
    TorchInt8Pack(),
    CpuW8A8(),
    OneDnnW8A8(),
    TritonWeightOnly(),
    TritonW8A8(),
    TritonLlmInt8(),
    TritonUnfused(),
    ReferenceKernel(),
)
UNFUSED = "unfused"


def select(request: KernelRequest, *, prefer: str | None = None, strict: bool = False) -> Selection:
    """The kernel that will run `request`, and each of higher priority with the reason why it will not.

    Args:
        request: format, shape, device and dtype of the linear.
        prefer: a kernel's name; or `unfused`, the best kernel that materializes the dequantized weight; None for the best of all.
        strict: an unfused kernel is an error when fewbit has a fused one for the format, on this or another kind of device: FP8 inputs
            times FP8 weights on a CPU, for instance. A kernel that `prefer` asks for is no fallback.

    Raises:
        UsageError: `prefer` names no kernel.
        KernelError: no kernel can run the request; the preferred one cannot; or strict forbids what would run.
    """
    ranked = sorted(KERNELS, key=lambda kernel: -kernel.priority)
    _check_preference(prefer, ranked)
    passed_over: list[PassedOver] = []
    for kernel in ranked:
        wanted = prefer is None or kernel.name == prefer or (prefer == UNFUSED and not kernel.fused)
        reason = kernel.refuse(request) if wanted else f"not asked for: the variant pins {prefer}"
        if reason is None:
            faster = tuple(_above(kernel, passed_over, request, ranked))
            if strict and prefer is None and not kernel.fused:
                _refuse_fallback(kernel, request, passed_over, ranked)
            return Selection(kernel, faster)
        passed_over.append(PassedOver(kernel.name, reason))
    reasons = "; ".join(f"{p.kernel}: {p.reason}" for p in passed_over if not p.reason.startswith("not asked for"))
    raise KernelError(f"no kernel runs {_describe(request)} ({reasons})", "choose another scheme or kernel; `fewbit kernels` lists them")


def _check_preference(prefer: str | None, kernels: list[Kernel]) -> None:
    names = [UNFUSED, *(kernel.name for kernel in kernels)]
    if prefer is not None and prefer not in names:
        raise UsageError(f"unknown kernel '{prefer}'", f"choose one of {', '.join(names)}")


def _above(chosen: Kernel, passed_over: list[PassedOver], request: KernelRequest, kernels: list[Kernel]) -> list[PassedOver]:
    """The faster kernels that were passed over.

    A kernel made for another format or another kind of device is no alternative and is not listed; when an unfused kernel was chosen and
    nothing faster is made for the format, that is the reason, and it is said once.
    """
    kind = request.device.partition(":")[0]
    faster = {k.name for k in kernels if k.priority > chosen.priority and kind in k.devices and k.refuse_format(request) is None}
    if not faster and not chosen.fused:
        elsewhere = ", ".join(f"{k.name} on {'/'.join(k.devices)}" for k in kernels if k.fused and k.refuse_format(request) is None)
        others = ", ".join(kernel.name for kernel in kernels if kernel.priority > chosen.priority and kind in kernel.devices)
        known = f"only {elsewhere}" if elsewhere else f"there are {others}"
        return [PassedOver("any fused kernel", f"none runs {_describe_formats(request)} on {kind} ({known})")]
    return [entry for entry in passed_over if entry.kernel in faster]


def _refuse_fallback(chosen: Kernel, request: KernelRequest, passed_over: list[PassedOver], kernels: list[Kernel]) -> None:
    """Raise when a fused kernel exists for the format but cannot run here; kernels for other devices are named when no other is left."""
    kind = request.device.partition(":")[0]
    made_for_it = {kernel.name: kind in kernel.devices for kernel in kernels if kernel.fused and kernel.refuse_format(request) is None}
    here = any(made_for_it.values())
    reasons = [f"{entry.kernel}: {entry.reason}" for entry in passed_over if made_for_it.get(entry.kernel) is here]
    if reasons:
        raise KernelError(
            f"{_describe(request)} would fall back to the unfused kernel '{chosen.name}' ({'; '.join(reasons)})",
            "run without --strict to accept the slow path, or choose a scheme that a fused kernel runs here (`fewbit kernels`)",
        )


def _describe(request: KernelRequest) -> str:
    return f"{_describe_formats(request)}, {request.out_features}x{request.in_features} {request.dtype} on {request.device}"


def _describe_formats(request: KernelRequest) -> str:
    weights = "a high-precision weight" if request.weights is None else f"a weight in {request.weights}"
    activations = "" if request.input_activations is None else f" with inputs in {request.input_activations}"
    return weights + activations
