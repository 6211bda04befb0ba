"""What every peer's runner shares. Runs in the peer's interpreter: torch, numpy, safetensors and the standard library only.

    python run_NAME.py job.json out/

A job is a JSON object:

    model         directory of a Hugging Face model in high precision
    tokens        .safetensors file with `ids`, int64 [windows, tokens]: the calibration data (not read by methods without calibration)
    method        the peer's own name of the method
    num_bits, group_size, symmetric     the spec of every linear inside the blocks; embeddings and lm_head stay in high precision
    seed          of the peer's own random draws (which windows were drawn is in `tokens`)
    threads       of torch; 0 for the default
    dtype         "auto" (the checkpoint's), "float32" or "bfloat16": what the model is loaded in
    options       keyword arguments of the method that differ from the peer's defaults; normally empty
    export        false: measure the time only
    verify        true: also compare the export with the peer's own quantized model

and the answer is two files in `out`:

    weights.safetensors   the model's tensors that differ from the source or belong to a linear, under the source's names, in float32:
                          a quantized linear as the exact product (integer - zero point) x stored scale
    result.json           seconds of the quantization call alone, peak memory, effective bits, versions, and what `verify` found
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

__all__ = ["Export", "Job", "integer_export", "load_model", "logits_of", "main", "start_clock", "unpack_stream"]

# Tensors that stay in high precision on every side; exporting them again would only cost disk.
_KEPT = ("lm_head.", "embed_tokens.", "embed_in.", "embed_out.", "wte.", "wpe.", "embed_positions.")
_VERIFY_TOKENS = 128


@dataclass(frozen=True)
class Job:
    """One quantization; the fields are described in the module's header."""

    model: str
    method: str
    num_bits: int
    group_size: int
    tokens: str = ""
    symmetric: bool = True
    seed: int = 0
    threads: int = 0
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    export: bool = True
    verify: bool = False

    def calibration(self) -> torch.Tensor:
        """The token ids, int64 [windows, tokens]."""
        return load_file(self.tokens)["ids"]


@dataclass
class Export:
    """What a peer made of the model.

    Attributes:
        tensors: float32, under the source's names.
        bits: stored bits of each quantized linear: values, scales, zero points and group index.
        parameters: weights of the quantized linears.
        seconds: of the quantization call alone.
        logits: of the peer's own quantized model, float32, for `verify`; None when it cannot run here.
        notes: what a reader of the figures should know.
    """

    tensors: dict[str, torch.Tensor]
    bits: int
    parameters: int
    seconds: float
    logits: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


def load_model(job: Job) -> Any:
    """The `PreTrainedModel` in high precision, in the job's dtype, on the CPU (transformers' own types are no help to mypy)."""
    from transformers import AutoModelForCausalLM

    dtype: Any = job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()


def integer_export(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | float | None, g_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """(values - zero_point) x scale in float32, one scale per row and group of columns.

    Args:
        values: [rows, columns], integers in any dtype.
        scale: [rows, groups], as stored.
        zero_point: [rows, groups], one number, or None.
        g_idx: [columns], the group of each column; equal neighbouring groups when None.
    """
    columns = values.shape[1]
    groups = torch.arange(columns) // (columns // scale.shape[1]) if g_idx is None else g_idx.long()
    centred: torch.Tensor = values.float()
    if isinstance(zero_point, torch.Tensor):
        centred = centred - zero_point.float()[:, groups]
    elif zero_point is not None:
        centred = centred - zero_point
    return centred * scale.float()[:, groups]


def unpack_stream(packed: torch.Tensor, num_bits: int, length: int) -> torch.Tensor:
    """int64 [length, n] of int32 [length x num_bits / 32, n]: values in a dense stream of bits, the lowest bits first."""
    words = packed.long() & 0xFFFFFFFF
    starts = torch.arange(length) * num_bits
    word, offset = starts // 32, (starts % 32)[:, None]
    low = words[word] >> offset
    high = words[(word + 1).clamp(max=len(words) - 1)] << (32 - offset)
    return (torch.where(offset + num_bits > 32, low | high, low)) & (2**num_bits - 1)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, job: Job) -> torch.Tensor:
    """float32 logits of the first tokens of the first calibration window."""
    ids = job.calibration()[:1, :_VERIFY_TOKENS]
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _verify(job: Job, export: Export) -> dict[str, float]:
    """Distance between the peer's own quantized model and the exported weights, beside the distance between the export and the source.

    The first is rounding (the peer runs in bfloat16 or by another kernel), the second is the quantization itself.
    """
    assert export.logits is not None
    model = load_model(Job(**{**vars(job), "dtype": "float32"}))
    source = logits_of(model, job)
    missing = model.load_state_dict(export.tensors, strict=False).unexpected_keys
    if missing:
        raise RuntimeError(f"the export has names that the model lacks: {missing[:3]}")
    own = logits_of(model, job)

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    return {
        "kl_peer_to_export": kl(export.logits, own),
        "kl_source_to_export": kl(source, own),
        "kl_source_to_peer": kl(source, export.logits),
        "max_logit_difference": float((export.logits - own).abs().max()),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *packages):
        found[name] = importlib.metadata.version(name)
    return found


def start_clock() -> float:
    """The time at which the quantization itself begins, in seconds of an arbitrary origin. A file `started` in the answer's folder tells
    whoever watches this process, so that it can bound the quantization's time from outside."""
    (Path(sys.argv[2]) / "started").touch()
    return time.perf_counter()


def _peak_bytes() -> int:
    """The process's peak resident memory (VmHWM), mapped file pages included."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(quantize: Callable[[Job], Export], packages: Iterable[str]) -> None:
    """Read the job, run it, write the answer.

    Args:
        quantize: the peer's side.
        packages: distributions whose versions belong to the result.
    """
    started = time.perf_counter()
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    if job.threads:
        torch.set_num_threads(job.threads)
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    export = quantize(job)
    peak = _peak_bytes()
    if job.export:
        kept = {n: t.float().contiguous() for n, t in export.tensors.items() if not any(part in f".{n}" for part in _dotted(_KEPT))}
        save_file(kept, out / "weights.safetensors")
    result = {
        "seconds": export.seconds,
        "process_seconds": time.perf_counter() - started,
        "process_cpu_seconds": time.process_time(),
        "peak_rss_bytes": peak,
        "effective_bits": export.bits / export.parameters if export.parameters else None,
        "quantized_parameters": export.parameters,
        "threads": torch.get_num_threads(),
        "versions": _versions(packages),
        "notes": export.notes,
        "verify": _verify(job, export) if job.verify and export.logits is not None else None,
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def _dotted(parts: Iterable[str]) -> list[str]:
    return [f".{part}" for part in parts]
