"""ONNX Runtime's MatMulNBits at accuracy level 4 (activations in INT8): one graph of `copies` products that share their input.

One graph and not one session per product, so that a pass holds the products and not the sessions' start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from _case import block, distinct, inputs, relative_error, tiled
from _worker import Pass, serve
from onnx import TensorProto, helper, numpy_helper

_CONTENDERS = {
    "onnxruntime-4bit-b32": (4, 32),
    "onnxruntime-4bit-b128": (4, 128),
    "onnxruntime-2bit-b128": (2, 128),
    "onnxruntime-8bit-b128": (8, 128),
}


def _packed(case: dict[str, Any], bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [n, k / group, group * bits / 8], lowest bits first, and scales float32 [n, k / group]; zero point 2^(bits - 1)."""
    middle, rows = 1 << (bits - 1), block(case).reshape(256, -1, group)
    scale = np.abs(rows).max(-1, keepdims=True) / (middle - 1)
    codes = (np.clip(np.round(rows / scale), -middle, middle - 1) + middle).astype(np.uint8)
    per_byte = 8 // bits
    parts = codes.reshape(256, codes.shape[1], group // per_byte, per_byte)
    packed = sum(parts[..., i] << (bits * i) for i in range(per_byte))
    return tiled(np.asarray(packed, np.uint8), case["n"]), tiled(scale[..., 0], case["n"])


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    bits, group = _CONTENDERS[case["contender"]]
    n, k, m = case["n"], case["k"], case["m"]
    packed, scale = _packed(case, bits, group)
    nodes, initializers, outputs = [], [], []
    for i in range(case["copies"]):
        initializers += [numpy_helper.from_array(distinct(packed, i), f"w{i}"), numpy_helper.from_array(scale, f"s{i}")]
        attributes = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]))
    graph = helper.make_graph(nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case["threads"], 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", inputs(case))
    results = []
    for i in range(case["copies"]):
        results.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32)))
        binding.bind_ortvalue_output(f"y{i}", results[-1])

    def work() -> None:
        session.run_with_iobinding(binding)

    work()
    error = relative_error(results[0].numpy(), case)
    version = f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}"
    return work, {"bytes": packed.nbytes + scale.nbytes, "calls": case["copies"], "relative_error": error, "version": version}


if __name__ == "__main__":
    serve(setup)
