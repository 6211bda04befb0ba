"""What the workers share: the job they read, one child process per checkpoint, the files they leave. Needs numpy and nothing of fewbit.

This file is the script that runs under another environment's Python, `python _worker.py RUNTIME.py JOB.json`; RUNTIME.py beside it has the
function `one` that reads a checkpoint in its runtime, and `PACKAGES`, whose versions belong to the answer. The job is a JSON file

    {"ids": [[1, 5, ...], ...], "checkpoints": [{"path": DIR, "out": FILE.npz, "dtype": "float32", "layers": true}, ...],
     "package": DIR}

and for each checkpoint it leaves FILE.npz with `logprobs` float32 [sum(len(ids) - 1)], the log-probability of each token given those
before it, and for each linear P that it could look into `layer:P` float32 [PROBES, out], what the linear answers to `probes(P, in)`. What
goes wrong is left in FILE.json, `{"error": TYPE, "message": TEXT}`; else FILE.json is `{"seconds": ..., "versions": {...}}`.

A checkpoint's `imports` are modules of fewbit, found in `package`, that teach the runtime a layout: its plugins.

**Probes.** Rows of +1 and -1: every number format holds them exactly, so that formats that quantize the inputs do not disturb, and every
column of the weight takes part in every answer. A wrong scale, zero point, order of columns or of rows changes some answers by far more
than rounding does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PROBES", "log_softmax_at", "main", "probes"]

PROBES = 16
_LAST_WORDS = 200


def probes(name: str, columns: int) -> np.ndarray:
    """float32 [PROBES, columns] of +1 and -1; they depend on the linear's name and width only."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (generator.integers(0, 2, (PROBES, columns)) * 2 - 1).astype(np.float32)


def log_softmax_at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [n] of `targets` [n] under `logits` [n, vocabulary], in float64 in between."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    result: np.ndarray = (logits[np.arange(len(targets)), targets] - normalizer).astype(np.float32)
    return result


def main(runtime_file: str, job_file: str) -> None:
    """Do a job, one checkpoint after the other, each in a child process of its own: what one leaves behind does not reach the next."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("runtime", runtime_file)
    assert spec is not None and spec.loader is not None
    runtime = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runtime)
    runtime.prepare()
    for checkpoint in job["checkpoints"]:
        said = Path(checkpoint["out"]).with_suffix(".log")
        child = os.fork()
        if child == 0:
            with said.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            _one(runtime, checkpoint, job["ids"], job["package"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        words = said.read_text(encoding="utf-8", errors="replace") if said.is_file() else ""
        sys.stderr.write(words)
        if status != 0 and not _report_file(checkpoint).is_file():
            last = " ".join(words.split())[-_LAST_WORDS:]
            _leave(checkpoint, {"error": "Crash", "message": f"the process ended with status {status}, its last words: {last}"})


def _report_file(checkpoint: Mapping[str, Any]) -> Path:
    return Path(checkpoint["out"]).with_suffix(".json")


def _leave(checkpoint: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    _report_file(checkpoint).write_text(json.dumps(report), encoding="utf-8")


def _import(name: str, package: str) -> None:
    """A module of fewbit, from its folder alone: nothing else that lies beside it may get in front of the runtime's own packages."""
    if "fewbit" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fewbit", f"{package}/__init__.py", submodule_search_locations=[package])
        assert spec is not None and spec.loader is not None
        sys.modules["fewbit"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    path, _, function = name.partition(":")
    found = importlib.import_module(path)
    if function:
        getattr(found, function)()


def _one(runtime: Any, checkpoint: Mapping[str, Any], ids: list[list[int]], package: str) -> None:
    started = time.monotonic()
    try:
        for name in checkpoint.get("imports", ()):
            _import(name, package)
        arrays = runtime.one(checkpoint, ids, sys.modules[__name__])
        np.savez(checkpoint["out"], **arrays)
        _leave(checkpoint, {"seconds": time.monotonic() - started, "versions": _versions(runtime.PACKAGES)})
    except BaseException as error:  # whatever a runtime raises is its answer, which the parent process reports
        traceback.print_exc()
        _leave(checkpoint, {"error": type(error).__name__, "message": str(error)})


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
