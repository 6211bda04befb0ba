"""llama.cpp's matrix products: Q4_0, Q4_K, IQ4_NL, Q8_0 and BF16, repacked at load as llama.cpp does it for a model.

ggml's own libraries through ctypes: one graph of `copies` products that share their input, weights in the CPU's repacking buffer where it
takes their type and shape (asked as llama.cpp's loader asks), else in the plain buffer. The result says which.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from _case import BLOCK_ROWS, block, inputs, relative_error
from _worker import Pass, serve

_LIBRARIES = Path(__file__).parent.parent / ".peers" / "llamacpp" / "build" / "bin"
_TYPES = {
    "llamacpp-q4_0": 2,
    "llamacpp-q8_0": 8,
    "llamacpp-q4_k": 12,
    "llamacpp-iq4_nl": 20,
    "llamacpp-q2_k": 10,
    "llamacpp-bf16": 30,
}
_F32, _CPU, _WEIGHTS = 0, 0, 1  # ggml_type, ggml_backend_dev_type, ggml_backend_buffer_usage


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_Parameters,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float))),
    "ggml_version": (c_char_p, ()),
    "ggml_backend_dev_by_type": (c_void_p, (c_int,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_dev_init": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
}


class _Ggml:
    """The functions of libggml*, with their signatures."""

    def __init__(self, folder: Path) -> None:
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        self._libraries = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]

    def __getattr__(self, name: str) -> Any:
        result, arguments = _SIGNATURES[name]
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                return function
        raise AttributeError(name)


def _weight_buffer(g: _Ggml, device: int, kind: int, n: int, k: int) -> int:
    """The first of the CPU's extra buffer types in which a product with such a weight can run; else the plain one."""
    register = g.ggml_backend_dev_backend_reg(device)
    address = g.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
    found, i = extra(device), 0
    while found and found[i]:
        context = g.ggml_init(_Parameters(1 << 20, None, True))
        weight = g.ggml_new_tensor_2d(context, kind, k, n)
        buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, found[i])
        if buffer:
            product = g.ggml_mul_mat(context, weight, g.ggml_new_tensor_2d(context, _F32, k, 1))
            supported = g.ggml_backend_dev_supports_op(device, product)
            g.ggml_backend_buffer_free(buffer)
            if supported:
                return int(found[i])
        i += 1
    return int(g.ggml_backend_cpu_buffer_type())


def _encoded(g: _Ggml, kind: int, rows: np.ndarray) -> np.ndarray:
    """uint8 [256, bytes of a row]."""
    k = rows.shape[1]
    out = np.zeros((BLOCK_ROWS, g.ggml_row_size(kind, k)), np.uint8)
    ones = (c_float * k)(*([1.0] * k))
    g.ggml_quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, 0, BLOCK_ROWS, k, ones)
    return out


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    g, kind, n, k, m = _Ggml(_LIBRARIES), _TYPES[case["contender"]], case["n"], case["k"], case["m"]
    device = g.ggml_backend_dev_by_type(_CPU)
    buffer_type = _weight_buffer(g, device, kind, n, k)
    rows = _encoded(g, kind, block(case))
    data = np.ascontiguousarray(np.concatenate([rows] * -(-n // BLOCK_ROWS))[:n])
    weights_context = g.ggml_init(_Parameters(1 << 22, None, True))
    weights = [g.ggml_new_tensor_2d(weights_context, kind, k, n) for _ in range(case["copies"])]
    buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(weights_context, buffer_type)
    if not buffer:
        raise MemoryError("the weights' buffer")
    g.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
    for weight in weights:
        g.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
    context = g.ggml_init(_Parameters(1 << 24, None, True))
    x = g.ggml_new_tensor_2d(context, _F32, k, m)
    products = [g.ggml_mul_mat(context, weight, x) for weight in weights]
    graph = g.ggml_new_graph_custom(context, 2 * len(products) + 16, False)
    for product in products:
        g.ggml_build_forward_expand(graph, product)
    g.ggml_backend_alloc_ctx_tensors_from_buft(context, g.ggml_backend_cpu_buffer_type())
    values = inputs(case)
    g.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
    backend = g.ggml_backend_dev_init(device, None)
    g.ggml_backend_cpu_set_n_threads(backend, case["threads"])

    def work() -> None:
        if g.ggml_backend_graph_compute(backend, graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    work()
    y = np.empty((m, n), np.float32)
    g.ggml_backend_tensor_get(products[0], y.ctypes.data, 0, y.nbytes)
    name = g.ggml_backend_buft_name(buffer_type).decode()
    version = f"ggml {g.ggml_version().decode()} of llama-cpp-python {(_LIBRARIES.parent.parent / 'version.txt').read_text().strip()}"
    facts = {"bytes": data.nbytes, "calls": len(products), "relative_error": relative_error(y, case), "buffer": name, "version": version}
    return work, facts


if __name__ == "__main__":
    serve(setup)
