"""OpenVINO's linear layer with compressed weights: INT4 in groups of 128, activations quantized to INT8 at run time in the same groups.

The graph is the one that NNCF writes: constant i4 -> f16 -> times scale -> reshape -> f32 -> MatMul; the plugin fuses it. One graph of
`copies` products that share their input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from _case import block, distinct, inputs, relative_error, tiled
from _worker import Pass, serve
from openvino import opset13 as ops

_BITS = {"openvino-int4": 4, "openvino-int8": 8}


def _constant(case: dict[str, Any], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed signed codes uint8, and scales float16 [n, groups, 1]."""
    top, group = (1 << (bits - 1)) - 1, case["group"]
    rows = block(case).reshape(256, -1, group)
    scale = (np.abs(rows).max(-1, keepdims=True) / top).astype(np.float16)
    codes = np.clip(np.round(rows / scale.astype(np.float32)), -top - 1, top).astype(np.int8).view(np.uint8)
    packed = codes if bits == 8 else (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
    return tiled(packed, case["n"]), tiled(scale, case["n"])


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    bits, group, n, k, m = _BITS[case["contender"]], case["group"], case["n"], case["k"], case["m"]
    packed, scale = _constant(case, bits)
    x = ops.parameter([m, k], np.float32)
    results, kept = [], []  # constants share the arrays' memory
    for i in range(case["copies"]):
        kind = ov.Type.i4 if bits == 4 else ov.Type.i8
        bytes_of = distinct(packed, i)
        kept.append(bytes_of)
        tensor = ov.Tensor(bytes_of, ov.Shape([n, k // group, group]), kind) if bits == 4 else ov.Tensor(bytes_of.view(np.int8))
        weight = ops.multiply(ops.convert(ops.constant(tensor), np.float16), ops.constant(scale))
        weight = ops.convert(ops.reshape(weight, [n, k], False), np.float32)
        results.append(ops.result(ops.matmul(x, weight, False, True)))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": case["threads"],
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    compiled = ov.Core().compile_model(ov.Model(results, [x]), "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(inputs(case)))

    def work() -> None:
        assert kept
        request.infer()

    work()
    error = relative_error(request.get_output_tensor(0).data, case)
    version = f"openvino {ov.__version__}"
    return work, {"bytes": packed.nbytes + scale.nbytes, "calls": case["copies"], "relative_error": error, "version": version}


if __name__ == "__main__":
    serve(setup)
