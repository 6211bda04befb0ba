"""GPTQModel's side: GPTQ with its defaults, and with the options that its documentation names for quality.

Methods:
    gptq    QuantizeConfig(bits, group_size, sym) with the library's defaults: group-aware activation order, dampening 0.05.
    gptaq   the same with its GPTAQ (arXiv 2504.02692) at the documented alpha.
    gptq+mse, gptaq+mse   the same with its search for scales (`mse=2.4`, the exponent that its documentation recommends).

Zero points of symmetric checkpoints are one constant and the group index is the plain one, so that neither counts as stored bits.
The integers and scales are read back from the checkpoint that it saves, whose layout is the classic one of GPTQ:
`qweight` int32 [columns x bits / 32, rows], the values of one row as a dense stream of bits along the first dimension.

On a machine with two cores its default pool has one worker where it asks for two, and loading fails: its own variable
GPTQMODEL_CPU_WORKERS is set to 2.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from _runner import Export, Job, integer_export, logits_of, main, start_clock, unpack_stream
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, extension
from gptqmodel.quantization.config import GPTAQConfig
from safetensors.torch import load_file

_QWEIGHT = ".qweight"


def _config(job: Job) -> Any:
    base, _, scales = job.method.partition("+")
    extra: dict[str, Any] = {"mse": 2.4} if scales == "mse" else {}
    if base == "gptaq":
        extra["gptaq"] = GPTAQConfig()
    if base not in ("gptq", "gptaq") or scales not in ("", "mse"):
        raise ValueError(f"unknown method {job.method}")
    return QuantizeConfig(bits=job.num_bits, group_size=job.group_size, sym=job.symmetric, device="cpu", **extra, **job.options)


def _read_back(directory: Path, job: Job) -> tuple[dict[str, torch.Tensor], int, int, list[str]]:
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    tensors, bits, parameters, scale_dtype = {}, 0, 0, ""
    for name in [n for n in stored if n.endswith(_QWEIGHT)]:
        prefix = name.removesuffix(_QWEIGHT)
        g_idx, scale = stored.pop(f"{prefix}.g_idx"), stored.pop(f"{prefix}.scales").t()
        zeros = stored.pop(f"{prefix}.qzeros", None)
        columns, rows = len(g_idx), scale.shape[0]
        values = unpack_stream(stored.pop(name), job.num_bits, columns).t()
        plain = torch.equal(g_idx.long(), torch.arange(columns) // job.group_size)
        zero_point: float | torch.Tensor = float(2 ** (job.num_bits - 1))
        if not job.symmetric:
            assert zeros is not None
            # The classic layout ("gptq") stores the zero point minus one; "gptq_v2" stores it as it is.
            zero_point = unpack_stream(zeros.t(), job.num_bits, rows) + 1
        tensors[f"{prefix}.weight"] = integer_export(values, scale, zero_point, None if plain else g_idx)
        parameters += rows * columns
        bits += rows * columns * job.num_bits + 8 * scale.nbytes
        bits += (0 if plain else 32 * columns) + (0 if job.symmetric else scale.numel() * job.num_bits)
        scale_dtype = str(scale.dtype)
    return tensors | stored, bits, parameters, [f"scales are {scale_dtype}"]


def quantize(job: Job) -> Export:
    """Load, quantize, save, and read the checkpoint back."""
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in job.calibration()]
    dtype = "auto" if job.dtype == "auto" else getattr(torch, job.dtype)
    model = GPTQModel.load(job.model, _config(job), dtype=dtype)
    extension.load(name="pack_block_cpu")  # compiled at the first use on a machine, which belongs to no timing
    started = start_clock()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - started
    if not job.export:
        return Export({}, 0, 0, seconds)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        tensors, bits, parameters, notes = _read_back(Path(folder), job)
        logits = None
        if job.verify:
            loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH)
            logits = logits_of(loaded.model, job)
    return Export(tensors, bits, parameters, seconds, logits, notes)


if __name__ == "__main__":
    main(quantize, ["gptqmodel"])
