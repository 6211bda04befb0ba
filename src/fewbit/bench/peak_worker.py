"""The fresh process that a peak is measured in; run as `python -m fewbit.bench.peak_worker`.

It reads one JSON request per line, {"call": "package.module:function", "arguments": [...]}, and answers each with one JSON line,
{"peak_bytes", "baseline_bytes"} or {"error"}. Importing torch and transformers takes seconds, so on Linux the worker imports them once
and then forks for each request: a forked process has memory of its own, and the kernel starts its high-water mark (VmHWM) at what it
has at the fork, so nothing that ran before can hide in it. The worker itself never computes (threads do not survive a fork). Elsewhere
it answers one request and ends.

What is read: Linux VmHWM and VmRSS of /proc/self/status; macOS ru_maxrss; with a GPU in use, torch's peak of allocated device memory.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from typing import Any, TextIO

import torch

from fewbit.checkpoints.sources import RandomSource, open_source
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import make_runner

__all__ = ["answer", "load_and_run", "main"]


def load_and_run(request: dict[str, Any]) -> None:
    """Load a variant, run a prefill and a few decode steps; `request` holds the fields of `bench.memory.PeakRequest`."""
    from fewbit.formats.spec import get_scheme
    from fewbit.models.shapes import shapes_config

    torch.set_num_threads(request["threads"])
    if request["shapes"] is not None:
        source: Any = RandomSource(shapes_config(request["shapes"]), seed=0, num_layers=request["num_layers"])
    else:
        source = open_source(request["model"])
    config = QuantizationConfig(
        get_scheme(request["scheme"]),
        kernel=request["kernel"],
        compute=compute_mode(request["compute"]),
        lm_head=head_format(request["lm_head"]),
    )
    loaded = load_model(source, config, device=request["device"])
    runner = make_runner(loaded, request["runtime"])
    cache = runner.new_cache(request["prompt_tokens"] + request["decode_steps"])
    vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(request["prompt_tokens"], device=request["device"]).remainder(vocabulary)[None]
    runner.prefill(ids, cache)
    for _ in range(request["decode_steps"]):
        runner.decode(ids[:, -1:], cache)


def answer(line: str) -> dict[str, Any]:
    """Run one request in this process."""
    try:
        request = json.loads(line)
        module, _, function = request["call"].partition(":")
        call = getattr(importlib.import_module(module), function)
        baseline = _memory_bytes("VmRSS")
        kept = call(*request["arguments"])  # bound to a name, so that what it returns still counts
        peak = _memory_bytes("VmHWM")
        del kept
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "baseline_bytes": 0}
        return {"peak_bytes": peak, "baseline_bytes": baseline}
    except Exception as error:  # whatever it is, it belongs to the caller, who raises it as a MeasurementError
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _memory_bytes(field: str) -> int:
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _answer_in_fork(line: str, answers: TextIO) -> None:
    child = os.fork()
    if child == 0:
        try:
            _write(answer(line), answers)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        _write({"error": f"exited with {os.WEXITSTATUS(status)}"}, answers)
    if os.WIFSIGNALED(status):
        _write({"error": f"killed by signal {os.WTERMSIG(status)}; when it is 9, most likely for lack of memory"}, answers)


def _write(document: dict[str, Any], answers: TextIO) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


def main() -> None:
    """Answer the requests on standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    for line in sys.stdin:
        if sys.platform == "linux":
            _answer_in_fork(line, answers)
        else:
            _write(answer(line), answers)
            return


if __name__ == "__main__":
    main()
