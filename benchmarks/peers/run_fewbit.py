"""fewbit's own side, by the same job file as the peers' and in a process of its own.

Methods are chains as in `fewbit quantize --method`; the options are `samples` and `sequence_length`. fewbit draws its calibration windows
itself, from the seed; that they are the very tokens in the job's file is checked afterwards (with or without those windows that fewbit
holds back for its checks).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from _runner import Export, Job, logits_of, main, start_clock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader
from fewbit.checkpoints.sources import open_source
from fewbit.formats.cost import packed_bytes
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.results import QuantizeResult
from fewbit.walk.calibration import load_calibration
from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
from fewbit.workflows.quantize import quantize_model

_PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx", "")


def _scheme(job: Job) -> Scheme:
    spec = QuantSpec(num_bits=job.num_bits, strategy="group", group_size=job.group_size, symmetric=job.symmetric)
    return Scheme(f"W{job.num_bits}A16-G{job.group_size}", weights=spec)


def _check_tokens(job: Job, result: QuantizeResult) -> None:
    """fewbit must have seen what the peers see, no token more."""
    if result.calibration is None:
        return
    source = open_source(job.model)
    drawn = load_calibration(source.tokenizer(), source.config, seed=job.seed, **job.options)
    given = job.calibration()
    expected = drawn.ids if len(given) == len(drawn.ids) else torch.cat([drawn.ids, drawn.held_back])
    if drawn.info.ids_sha256 != result.calibration.ids_sha256 or not torch.equal(given, expected):
        raise RuntimeError("fewbit drew other calibration windows than the peers were given")


def _read_back(directory: Path) -> tuple[dict[str, torch.Tensor], int, int]:
    reader = CompressedTensorsReader(directory)
    linears = set(reader.linears)
    tensors: dict[str, torch.Tensor] = {}
    bits = parameters = 0
    for prefix in linears:
        quantized = reader.read(prefix)
        tensors[f"{prefix}.weight"] = dequantize(quantized)
        parameters += tensors[f"{prefix}.weight"].numel()
        bits += 8 * packed_bytes(quantized)
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            prefix = next((name.removesuffix(f".weight{part}") for part in _PARTS if name.endswith(f".weight{part}")), name)
            if prefix not in linears:
                tensors[name] = tensor
    return tensors, bits, parameters


def quantize(job: Job) -> Export:
    """Quantize into a temporary directory and read it back."""
    settings = WalkSettings(method=job.method, seed=job.seed, calibration=CalibrationChoice(**job.options), gate=GateChoice(enabled=False))
    with tempfile.TemporaryDirectory() as folder:
        started = start_clock()
        result = quantize_model(job.model, scheme=_scheme(job), out=Path(folder) / "out", settings=settings, overwrite=True)
        seconds = time.perf_counter() - started
        if job.tokens:
            _check_tokens(job, result)
        if not job.export:
            return Export({}, 0, 0, seconds)
        tensors, bits, parameters = _read_back(Path(folder) / "out")
        logits = None
        if job.verify:  # the checkpoint as transformers loads it
            logits = logits_of(AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=torch.float32).eval(), job)
    return Export(tensors, bits, parameters, seconds, logits, list(result.notes))


if __name__ == "__main__":
    main(quantize, ["fewbit"])
