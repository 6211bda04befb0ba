"""`fewbit kernels`: what this machine can run for each scheme, and why not the rest."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.errors import UsageError
from fewbit.formats.spec import SCHEMES, Scheme
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.dispatch import KERNELS, select
from fewbit.kernels.environment import cpu_flags, cpu_name
from fewbit.results import KernelInfo, KernelsReport, PassedOverKernel, SchemeKernel

__all__ = ["list_kernels"]


def list_kernels(shape: tuple[int, int] = (4096, 4096), *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> KernelsReport:
    """For each preset with quantized weights, the kernel that runs it and why each other one does not.

    Args:
        shape: [out, in] of the linear.
        device, dtype: where it runs, and the dtype of its inputs.

    Raises:
        UsageError: a shape that is not positive.
    """
    if min(shape) < 1:
        raise UsageError(f"the shape is {shape[0]}x{shape[1]}", "give positive out_features and in_features, for example 4096x4096")
    base = KernelRequest(None, None, shape[0], shape[1], device, dtype)
    return KernelsReport(
        cpu=cpu_name(),
        cpu_flags=sorted(cpu_flags()),
        torch=torch.__version__,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        out_features=shape[0],
        in_features=shape[1],
        kernels=[KernelInfo(kernel.name, kernel.description, kernel.fused) for kernel in KERNELS],
        schemes=[_scheme_kernel(scheme, base) for scheme in SCHEMES.values() if scheme.weights is not None],
    )


def _scheme_kernel(scheme: Scheme, base: KernelRequest) -> SchemeKernel:
    inputs = scheme.input_activations
    request = replace(base, weights=scheme.weights, input_activations=inputs)
    chosen = select(request).kernel
    others = [kernel for kernel in KERNELS if kernel is not chosen]
    others.sort(key=lambda kernel: kernel.refuse_format(request) is not None)  # those made for the format first
    return SchemeKernel(
        scheme=scheme.name,
        weights=str(scheme.weights),
        input_activations="BF16" if inputs is None else f"{inputs}, {'dynamic' if inputs.dynamic else 'static'}",
        kernel=chosen.name,
        fused=chosen.fused,
        fused_candidates=[kernel.name for kernel in KERNELS if kernel.fused and kernel.refuse_format(request) is None],
        refused=[
            PassedOverKernel(kernel=kernel.name, reason=kernel.refuse(request) or f"runs it, too; {chosen.name} is preferred")
            for kernel in others
        ],
    )
