"""Let another runtime read checkpoints, in a process of its own (the protocol is in `workers/_worker.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewbit.checkpoints.runtimes import Runtime
from fewbit.errors import MeasurementError
from fewbit.workflows.foreign.environments import interpreter

__all__ = ["ForeignAnswer", "ForeignJob", "ask"]

_WORKERS = Path(__file__).parent / "workers"
_SCRIPT = "_worker.py"
_PACKAGE = Path(__file__).parents[2]
_NAMES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llamacpp", "openvino": "openvino"}
_LAST_WORDS = 300


@dataclass(frozen=True)
class ForeignJob:
    """One checkpoint to be read.

    Attributes:
        path: a Hugging Face directory or a GGUF file.
        dtype: of activations: float32, bfloat16 or float16.
        layers: also ask each linear.
        imports: `module` or `module:function` of fewbit that the runtime's process imports and calls first.
    """

    path: Path
    dtype: str
    layers: bool = True
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignAnswer:
    """What a runtime made of a checkpoint.

    Attributes:
        error: why it did not load or run, in the runtime's own words; None when it did.
        logprobs: float32 [sum(len(ids) - 1)].
        layers: linear's dotted name to float32 [probes, out].
        seconds: loading included.
        versions: of the packages that took part.
    """

    error: str | None
    logprobs: NDArray[np.float32] | None = None
    layers: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)


def ask(
    runtime: Runtime, jobs: Sequence[ForeignJob], ids: Sequence[Sequence[int]], *, threads: int = 1, timeout_s: float = 1800.0
) -> list[ForeignAnswer]:
    """Let a runtime read checkpoints, one after the other, each in a child of one process.

    Args:
        runtime: an installed one (`environments.interpreter`).
        ids: token windows.
        threads: of the runtime.
        timeout_s: for all of them.

    Raises:
        MeasurementError: the runtime is not installed, or its process ended without an answer.
    """
    python = interpreter(runtime)
    if python is None:
        raise MeasurementError(f"{runtime.title} is not installed", "make runtimes, or point FEWBIT_ENVS at its environment")
    with tempfile.TemporaryDirectory(prefix="fewbit-verify-") as folder:
        outs = [Path(folder) / f"{index}.npz" for index in range(len(jobs))]
        checkpoints = [
            {"path": str(job.path.absolute()), "out": str(out), "dtype": job.dtype, "layers": job.layers, "imports": job.imports}
            for job, out in zip(jobs, outs, strict=True)
        ]
        job_file = Path(folder) / "job.json"
        job = {"ids": [list(window) for window in ids], "checkpoints": checkpoints, "package": str(_PACKAGE)}
        job_file.write_text(json.dumps(job), encoding="utf-8")
        words = _run(
            [str(python), str(_WORKERS / _SCRIPT), str(_WORKERS / f"on_{_NAMES[runtime.name]}.py"), str(job_file)], threads, timeout_s
        )
        return [_answer(out, words) for out in outs]


def _run(command: Sequence[str], threads: int, timeout_s: float) -> str:
    """The end of what the process said, for when it leaves no answer."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    return done.stdout


def _answer(out: Path, words: str) -> ForeignAnswer:
    report = out.with_suffix(".json")
    if not report.is_file():
        last = " ".join(words.split())[-_LAST_WORDS:]
        return ForeignAnswer(error=f"the process left no answer: {last}")
    fields = json.loads(report.read_text(encoding="utf-8"))
    if "error" in fields:
        first = " ".join(str(fields["message"]).split())[:_LAST_WORDS]
        return ForeignAnswer(error=f"{fields['error']}: {first}")
    with np.load(out) as arrays:
        layers = {name.removeprefix("layer:"): arrays[name] for name in arrays.files if name.startswith("layer:")}
        return ForeignAnswer(None, arrays["logprobs"], layers, float(fields["seconds"]), fields["versions"])
