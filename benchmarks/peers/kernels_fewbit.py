"""fewbit's own CPU kernels: `copies` weights in one call into C++, as a decode step runs them; inputs are prepared for each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _case import BLOCK_ROWS, block, inputs, relative_error, tiled
from _worker import Pass, serve

import fewbit
from fewbit import _native
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Compute, Kernel, KernelRequest
from fewbit.kernels.cpu.extension import in_weight_memory, use_torch_threads
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn

# num_bits and compute mode of integer weights in groups.
_INTEGERS: dict[str, tuple[int, Compute]] = {
    "fewbit-int4": (4, "int8-activations"),
    "fewbit-int8": (8, "int8-activations"),
    "fewbit-int3": (3, "int8-activations"),
    "fewbit-int2": (2, "int8-activations"),
    "fewbit-int4-exact": (4, "exact"),
    "fewbit-int8-exact": (8, "exact"),
    "fewbit-int3-exact": (3, "exact"),
    "fewbit-int2-exact": (2, "exact"),
}
_SCHEMES = {"fewbit-w8a8": "W8A8", "fewbit-nf4": "NF4", "fewbit-mxfp4": "MXFP4", "fewbit-fp8": "FP8A16"}
_DENSE = "fewbit-bf16"  # the decode engine's kernel for what is not quantized


def _packed(kernel: Kernel, request: KernelRequest, rows: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The packed weight: its first rows packed, and their tiles repeated as the weight repeats its rows."""
    repeats, rest = divmod(request.out_features, BLOCK_ROWS)
    if rest:
        raise ValueError(f"n is not a multiple of {BLOCK_ROWS}")
    packed = kernel.pack(rows, replace(request, out_features=BLOCK_ROWS))
    return {name: tensor.repeat(repeats, *[1] * (tensor.dim() - 1)) if tensor.dim() > 1 else tensor for name, tensor in packed.items()}


def _linears(case: dict[str, Any]) -> tuple[list[_native.Linear], list[Any], str]:
    """`copies` packed weights, what they need to stay alive, and the kernel's name."""
    name, copies, rows = case["contender"], range(case["copies"]), torch.from_numpy(block(case))
    if name == _DENSE:
        dense = torch.from_numpy(tiled(block(case), case["n"])).bfloat16()
        kept = [in_weight_memory({"weight": dense})["weight"] for _ in copies]
        return [_native.dense_linear(weight) for weight in kept], kept, "dense"
    scheme = SCHEMES[_SCHEMES[name]] if name in _SCHEMES else None
    bits, compute = _INTEGERS.get(name, (8, "exact"))
    spec = QuantSpec(bits, strategy="group", group_size=case["group"], scale_dtype="bfloat16") if scheme is None else scheme.weights
    assert spec is not None
    inputs_spec = None if scheme is None else scheme.input_activations
    request = KernelRequest(spec, inputs_spec, case["n"], case["k"], dtype=torch.float32, compute=compute)
    selection = select(request)
    packed = _packed(selection.kernel, request, rtn(rows, spec))
    packs = [in_weight_memory(packed) for _ in copies]
    linears = [linear for linear in (selection.kernel.native(one, request) for one in packs) if linear is not None]
    if not linears:
        raise RuntimeError(f"{selection.kernel.name} is not a kernel of fewbit's own: {selection.passed_over}")
    return linears, packs, selection.kernel.name


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    torch.set_num_threads(case["threads"])
    use_torch_threads()
    linears, kept, kernel = _linears(case)
    x = torch.from_numpy(inputs(case))
    y = [torch.empty(case["m"], case["n"]) for _ in linears]

    def work() -> None:
        assert kept
        _native.multiply_in_turn(linears, x, y)

    work()
    error = relative_error(y[0].numpy(), case)
    facts = {"bytes": linears[0].bytes, "calls": len(linears), "relative_error": error, "kernel": kernel}
    return work, {**facts, "version": f"fewbit {fewbit.__version__}"}


if __name__ == "__main__":
    np.seterr(all="raise")
    serve(setup)
