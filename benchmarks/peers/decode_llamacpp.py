"""llama.cpp on random weights in a model's shapes: the loops of llama-bench (-p, -n) and llama-batched-bench in a process that stays.

libllama through the declarations of llama-cpp-python, the vendored build of it (see `kernels_llamacpp.py`). Threads, batch sizes and the
rest are llama-bench's defaults: n_batch 2048, n_ubatch 512, flash attention chosen by llama.cpp, repacking of the weights.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from _worker import Pass, serve
from decode_models import model_file

from fewbit.checkpoints.gguf_header import GgufFile

_ROOT = Path(__file__).parent.parent / ".peers" / "llamacpp"
_TYPES = {"llamacpp-q4_0": "q4_0", "llamacpp-q8_0": "q8_0", "llamacpp-bf16": "bf16"}
_models: dict[Path, Any] = {}


def _library() -> Any:
    """`llama_cpp.llama_cpp` without the package's own start, which wants more than numpy."""
    if "llama_cpp.llama_cpp" not in sys.modules:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(_ROOT / "build" / "bin")
        package = types.ModuleType("llama_cpp")
        package.__path__ = [str(next(_ROOT.glob("llama_cpp_python-*/llama_cpp")))]
        sys.modules["llama_cpp"] = package
        import llama_cpp.llama_cpp as library

        silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
        library._fewbit_silent = silent
        library.llama_log_set(silent, None)
        library.llama_backend_init()
    return sys.modules["llama_cpp.llama_cpp"]


def _model(path: Path) -> Any:
    if path not in _models:
        llama = _library()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        _models[path] = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not _models[path]:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
    return _models[path]


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    path = model_file(case["shapes"], _TYPES[case["contender"]])
    llama, model, file = _library(), _model(path), GgufFile(path)
    batch, context, steps, prompt = case["batch"], case["context"], case["steps"], case["prompt"]
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = batch * -(-max(context + steps, prompt) // 256) * 256
    parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = 2048, 512, batch
    parameters.n_threads = parameters.n_threads_batch = case["threads"]
    session = llama.llama_init_from_model(model, parameters)
    if not session:
        raise RuntimeError("llama.cpp makes no context")
    memory = llama.llama_get_memory(session)
    tokens = np.random.default_rng(0).integers(2, 1000, max(context, prompt, 1))
    room = llama.llama_batch_init(max(context, prompt, batch), 0, 1)

    def run(entries: list[tuple[int, int, int, bool]]) -> None:
        room.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            room.token[i], room.pos[i], room.n_seq_id[i] = token, position, 1
            room.seq_id[i][0], room.logits[i] = sequence, int(wanted)
        if llama.llama_decode(session, room) != 0:
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(session)

    def fill(length: int) -> None:
        for sequence in range(batch):
            run([(int(tokens[i]), i, sequence, i == length - 1) for i in range(length)])

    def decode() -> None:
        for sequence in range(batch):
            llama.llama_memory_seq_rm(memory, sequence, context, -1)
        for step in range(steps):
            run([(int(tokens[0]), context + step, sequence, True) for sequence in range(batch)])

    def prefill() -> None:
        llama.llama_memory_clear(memory, True)
        fill(prompt)

    if not prompt:
        fill(context)
    head = file.tensors.get("output.weight") or file.tensors["token_embd.weight"]
    facts = {
        "bytes": int(llama.llama_model_size(model)),
        "tokens": batch * (prompt or steps),
        "passes": 1 if prompt else steps,
        "head": head.type.name,
        "version": f"llama.cpp of llama-cpp-python {(_ROOT / 'version.txt').read_text().strip()}",
    }
    return (prefill if prompt else decode), facts


if __name__ == "__main__":
    serve(setup)
