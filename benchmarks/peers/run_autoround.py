"""AutoRound's side: its default of 200 iterations per block, on the job's windows in place of its own data set.

The method:

    autoround   AutoRound(...) with its defaults: 200 iterations, batches of 8, learning rate 1/200, tuned minmax.

torch.compile is off: it changes no number, and compiling for each shape of block costs more than it saves on small models.
The defaults for the data are 128 samples of 2,048 tokens; here the samples are the job's windows. Integers are recovered from the
weights, which the library leaves as (integer - zero point) x scale, with the scale and zero point that it keeps on each layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from _runner import Export, Job, integer_export, load_model, logits_of, main, start_clock
from auto_round import AutoRound
from transformers import AutoTokenizer


def _tuner(job: Job, model: torch.nn.Module) -> Any:
    ids = job.calibration()
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    if job.method != "autoround":
        raise ValueError(f"unknown method {job.method}")
    return AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.num_bits,
        group_size=job.group_size,
        sym=job.symmetric,
        dataset=batches,
        nsamples=len(batches),
        seqlen=ids.shape[1],
        seed=job.seed + 42,  # 42 is its default
        device_map="cpu",
        enable_torch_compile=False,
        **job.options,
    )


def quantize(job: Job) -> Export:
    """Tune all blocks."""
    model = load_model(job)
    started = start_clock()
    tuned, _ = _tuner(job, model).quantize()
    seconds = time.perf_counter() - started
    if not job.export:
        return Export({}, 0, 0, seconds)
    logits = logits_of(tuned, job) if job.verify else None
    tensors = {name: tensor.detach() for name, tensor in tuned.state_dict().items() if tensor.is_floating_point()}
    bits = parameters = 0
    named: Iterable[tuple[str, Any]] = tuned.named_modules()
    for name, layer in named:
        if not isinstance(layer, torch.nn.Linear) or not isinstance(getattr(layer, "scale", None), torch.Tensor):
            continue
        rows, columns = layer.weight.shape
        scale = layer.scale.reshape(rows, -1)
        zero_point = layer.zp
        if isinstance(zero_point, torch.Tensor):
            zero_point = zero_point.reshape(rows, -1).expand_as(scale)
        wide = scale.float().repeat_interleave(columns // scale.shape[1], dim=1)
        shift = (
            zero_point.float().repeat_interleave(columns // scale.shape[1], dim=1) if isinstance(zero_point, torch.Tensor) else zero_point
        )
        values = (layer.weight.detach().float() / wide + shift).round().clamp(0, 2**job.num_bits - 1)
        tensors[f"{name}.weight"] = integer_export(values, scale, zero_point)
        for extra in ("scale", "zp"):
            tensors.pop(f"{name}.{extra}", None)
        parameters += rows * columns
        bits += rows * columns * job.num_bits + 8 * scale.nbytes + (0 if job.symmetric else scale.numel() * job.num_bits)
    scale_dtype = next(str(layer.scale.dtype) for layer in tuned.modules() if isinstance(getattr(layer, "scale", None), torch.Tensor))
    return Export(tensors, bits, parameters, seconds, logits, [f"scales are {scale_dtype}"])


if __name__ == "__main__":
    main(quantize, ["auto-round"])
