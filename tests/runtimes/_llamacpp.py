"""llama.cpp quantizes a GGUF file and decodes the result; runs under the Python of its environment, and imports nothing of fewbit.

    python _llamacpp.py TYPE SOURCE.gguf OUT.gguf

leaves llama.cpp's file in OUT.gguf and in OUT.npz each matrix, flat float32, as its own C functions decode it (`to_float` of the type).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np


class Traits(ctypes.Structure):
    """ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Options(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def library() -> ctypes.CDLL:
    """ggml's functions on GGUF files and types."""
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    index = (ctypes.c_void_p, ctypes.c_int64)
    for name, result, arguments in (
        ("gguf_init_from_file", ctypes.c_void_p, (ctypes.c_char_p, Options)),
        ("gguf_get_n_tensors", ctypes.c_int64, index[:1]),
        ("gguf_get_data_offset", ctypes.c_size_t, index[:1]),
        ("gguf_get_tensor_name", ctypes.c_char_p, index),
        ("gguf_get_tensor_type", ctypes.c_int, index),
        ("gguf_get_tensor_offset", ctypes.c_size_t, index),
        ("gguf_get_tensor_size", ctypes.c_size_t, index),
        ("ggml_get_type_traits", ctypes.POINTER(Traits), (ctypes.c_int,)),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml


def quantize(kind: str, source: str, target: str) -> None:
    """llama.cpp's own quantizer, one thread."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp does not quantize to {kind}")


def decoded(path: str) -> dict[str, np.ndarray]:
    """Every tensor that has a `to_float`: whatever is not float32."""
    ggml, content = library(), np.fromfile(path, dtype=np.uint8)
    context = ggml.gguf_init_from_file(path.encode(), Options(True, None))
    start, found = ggml.gguf_get_data_offset(context), {}
    for i in range(ggml.gguf_get_n_tensors(context)):
        traits = ggml.ggml_get_type_traits(ggml.gguf_get_tensor_type(context, i)).contents
        if not traits.to_float:
            continue
        at, size = start + ggml.gguf_get_tensor_offset(context, i), ggml.gguf_get_tensor_size(context, i)
        raw = np.ascontiguousarray(content[at : at + size])
        values = np.empty(size // traits.size * traits.block, dtype=np.float32)
        traits.to_float(raw.ctypes.data, values.ctypes.data, values.size)
        found[ggml.gguf_get_tensor_name(context, i).decode()] = values
    return found


if __name__ == "__main__":
    quantize(*sys.argv[1:4])
    np.savez(Path(sys.argv[3]).with_suffix(".npz"), **decoded(sys.argv[3]))  # type: ignore[arg-type]
