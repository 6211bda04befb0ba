"""Which kernel is chosen, and what the dispatcher says about the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.errors import KernelError, UsageError
from fewbit.formats.spec import SCHEMES
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels import dispatch
from fewbit.kernels.base import Kernel, KernelRequest
from fewbit.kernels.dispatch import KERNELS, select
from fewbit.kernels.environment import cpu_flags, cpu_name, memory_bytes


def request_for(scheme: str, shape: tuple[int, int] = (64, 256), **fields) -> KernelRequest:
    return KernelRequest(SCHEMES[scheme].weights, SCHEMES[scheme].input_activations, *shape, **fields)


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("BF16", "dense"),
        ("W8A16", "cpu-int8-exact"),
        ("W8A16-G128", "cpu-int8-exact"),
        ("W4A16", "cpu-int4-exact"),
        ("W4A16-CHANNEL", "cpu-int4-exact"),
        ("W3A16", "cpu-int3-exact"),
        ("W2A16-ASYM", "cpu-int2-exact"),
        ("MXFP4", "cpu-fp4-exact"),
        ("NVFP4", "cpu-fp4-exact"),
        ("NF4", "cpu-nf4"),
        ("FP8A16", "cpu-fp8-e4m3"),
        ("W8A8", "cpu-w8a8"),
    ]
    + [(name, "reference") for name in ("FP8", "FP8-BLOCK")],
)
def test_the_fastest_that_can(scheme, kernel):
    selection = select(request_for(scheme))
    assert selection.kernel.name == kernel
    if selection.kernel.fused:
        assert selection.passed_over == ()
    else:
        (only,) = selection.passed_over
        assert only.kernel == "any fused kernel"
        assert "none runs a weight in" in only.reason and "only triton-w8a8 on cuda" in only.reason


@pytest.mark.parametrize("scheme", [scheme.name for scheme in SCHEMES.values()])
def test_every_preset_runs_somewhere(scheme):
    assert select(request_for(scheme, (24, 256))).kernel


def test_names_are_unique_and_described() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    assert all(kernel.description for kernel in KERNELS)
    assert dispatch.UNFUSED not in {kernel.name for kernel in KERNELS}


def test_unfused_is_asked_for_not_fallen_back_to() -> None:
    for strict in (False, True):
        selection = select(request_for("W4A16"), prefer="unfused", strict=strict)
        assert selection.kernel.name == "reference" and not selection.kernel.fused
        reasons = {entry.kernel: entry.reason for entry in selection.passed_over}
        assert reasons == {name: "not asked for: the variant pins unfused" for name in ("cpu-int4-exact", "torch-int4pack")}


def test_prefer_by_name() -> None:
    assert select(request_for("W8A16"), prefer="reference").kernel.name == "reference"
    assert select(request_for("W8A16"), prefer="torch-int8pack").kernel.name == "torch-int8pack"
    with pytest.raises(KernelError, match=r"torch-int4pack: runs INT4 weights; this one is NF4"):
        select(request_for("NF4"), prefer="torch-int4pack")
    with pytest.raises(UsageError, match=r"unknown kernel 'marlin'.*torch-int4pack"):
        select(request_for("NF4"), prefer="marlin")


def test_strict_refuses_a_fallback_with_the_reason() -> None:
    half = request_for("W4A16", (40, 256), dtype=torch.float16)
    assert select(half).kernel.name == "reference"
    with pytest.raises(KernelError, match=r"unfused kernel 'reference'.*cpu-int4-exact: takes inputs in bfloat16 or float32, not"):
        select(half, strict=True)


def test_strict_accepts_a_format_that_has_no_fused_kernel() -> None:
    request = request_for("MXFP4")
    inputs = replace(request, input_activations=request.weights)
    assert select(inputs, strict=True).kernel.name == "reference"


def test_strict_refuses_fp8_inputs_on_a_cpu_where_only_gpus_have_a_fused_kernel() -> None:
    assert select(request_for("FP8")).kernel.name == "reference"
    with pytest.raises(KernelError, match=r"inputs in FP8_E4M3.*unfused kernel 'reference' \(triton-w8a8: "):
        select(request_for("FP8"), strict=True)


def test_nothing_runs() -> None:
    with pytest.raises(KernelError, match="int64"):
        select(request_for("W4A16", dtype=torch.int64))


class FasterKernel(Kernel):
    """A kernel of a later issue."""

    name = "faster"
    description = "a test's"
    fused = True
    priority = 99

    def refuse_format(self, request):
        return None

    def refuse_here(self, request):
        return "needs AVX-1024, which this processor lacks" if request.out_features > 64 else None

    def pack(self, weight: QuantizedTensor | torch.Tensor, request):
        return {}

    def apply(self, x, packed, bias, request):
        return x


def test_a_new_kernel_needs_one_line(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", (*KERNELS, FasterKernel()))
    assert select(request_for("W4A16")).kernel.name == "faster"
    wide = select(request_for("W4A16", (128, 256)))
    assert wide.kernel.name == "cpu-int4-exact"
    assert [(entry.kernel, entry.reason) for entry in wide.passed_over] == [("faster", "needs AVX-1024, which this processor lacks")]


def test_environment() -> None:
    assert cpu_name() and memory_bytes() > 2**28
    assert all(flag == flag.strip() and flag for flag in cpu_flags())
