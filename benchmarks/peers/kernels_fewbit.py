"""fewbit's own CPU kernels: `copies` weights in one call into C++, as a decode step runs them; inputs are prepared for each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _case import block, inputs, relative_error, tiled
from _worker import Pass, serve

import fewbit
from fewbit import _native
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.extension import use_torch_threads
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn

# num_bits and compute mode.
_CONTENDERS = {
    "fewbit-int4": (4, "int8-activations"),
    "fewbit-int8": (8, "int8-activations"),
    "fewbit-int3": (3, "int8-activations"),
    "fewbit-int2": (2, "int8-activations"),
    "fewbit-int4-exact": (4, "exact"),
    "fewbit-int8-exact": (8, "exact"),
    "fewbit-int3-exact": (3, "exact"),
    "fewbit-int2-exact": (2, "exact"),
    "fewbit-w8a8": (8, "exact"),
}


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    torch.set_num_threads(case["threads"])
    use_torch_threads()
    bits, compute = _CONTENDERS[case["contender"]]
    spec, inputs_spec = QuantSpec(bits, strategy="group", group_size=case["group"], scale_dtype="bfloat16"), None
    if case["contender"] == "fewbit-w8a8":
        assert SCHEMES["W8A8"].weights is not None
        spec, inputs_spec = SCHEMES["W8A8"].weights, SCHEMES["W8A8"].input_activations
    request = KernelRequest(spec, inputs_spec, case["n"], case["k"], dtype=torch.float32, compute=compute)
    selection = select(request)
    weight = rtn(torch.from_numpy(tiled(block(case), case["n"])), spec)
    linears, kept = [], []
    for _ in range(case["copies"]):
        packed = selection.kernel.pack(weight, request)
        linear = selection.kernel.native(packed, request)
        if linear is None:
            raise RuntimeError(f"{selection.kernel.name} is not a kernel of fewbit's own: {selection.passed_over}")
        kept.append(packed)
        linears.append(linear)
    x = torch.from_numpy(inputs(case))
    y = [torch.empty(case["m"], case["n"]) for _ in linears]

    def work() -> None:
        assert kept
        _native.multiply_in_turn(linears, x, y)

    work()
    error = relative_error(y[0].numpy(), case)
    facts = {"bytes": linears[0].bytes, "calls": len(linears), "relative_error": error, "kernel": selection.kernel.name}
    return work, {**facts, "version": f"fewbit {fewbit.__version__}"}


if __name__ == "__main__":
    np.seterr(all="raise")
    serve(setup)
