"""llm-compressor's side: GPTQ, AWQ and RTN by `oneshot`, with the recipes of its own examples.

Methods:
    gptq   GPTQModifier with its defaults (static activation order, dampening 0.01, blocks of 128), minmax scales as its presets have.
    awq    AWQModifier with its defaults, then QuantizationModifier (round to nearest).
    rtn    QuantizationModifier alone.

Its AWQ pins cached activations, which torch refuses on a machine without an accelerator, where pinning means nothing: the call is made to
do nothing there. No figure depends on it.

The spec is given as a config group, with every other field of the weight arguments left at its default, because there are presets for
W4 with groups of 128 only. The integers and scales are read back from the packed checkpoint that it saves.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _runner import Export, Job, integer_export, load_model, logits_of, main, start_clock
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader

_PACKED = ".weight_packed"


def _recipe(job: Job) -> list[Any]:
    weights = {"num_bits": job.num_bits, "type": "int", "symmetric": job.symmetric, "strategy": "group", "group_size": job.group_size}
    if job.dtype == "float32":
        weights["scale_dtype"] = torch.bfloat16  # as many bits as those of a model in BF16, rounded before the integers are chosen
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head", "embed_out"]}
    if job.method == "gptq":
        return [GPTQModifier(**groups, **job.options)]
    if job.method == "awq":
        return [AWQModifier(**job.options), QuantizationModifier(**groups)]
    if job.method == "rtn":
        return [QuantizationModifier(**groups)]
    raise ValueError(f"unknown method {job.method}")


def _loader(job: Job) -> DataLoader[Any]:
    ids = job.calibration()
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(rows, batch_size=1, shuffle=False)


def _read_back(directory: Path, job: Job) -> tuple[dict[str, torch.Tensor], int, int]:
    """The checkpoint's tensors in float32 and the bits of its quantized linears."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    tensors, bits, parameters = {}, 0, 0
    for name in [n for n in stored if n.endswith(_PACKED)]:
        prefix = name.removesuffix(_PACKED)
        rows, columns = stored.pop(f"{prefix}.weight_shape").tolist()
        values = unpack_from_int32(stored.pop(name), job.num_bits, torch.Size((rows, columns)))
        scale = stored.pop(f"{prefix}.weight_scale")
        if torch.equal(scale.to(torch.bfloat16).to(scale.dtype), scale):
            scale = scale.to(torch.bfloat16)  # a model in float32 stores the rounded scales in float32
        zero_point, g_idx = stored.pop(f"{prefix}.weight_zero_point", None), stored.pop(f"{prefix}.weight_g_idx", None)
        if zero_point is not None:
            zero_point = unpack_from_int32(zero_point, job.num_bits, torch.Size((rows, scale.shape[1])), packed_dim=0)
        tensors[f"{prefix}.weight"] = integer_export(values, scale, zero_point, g_idx)
        parameters += rows * columns
        bits += rows * columns * job.num_bits + 8 * scale.nbytes
        bits += 0 if zero_point is None else zero_point.numel() * job.num_bits
        bits += 0 if g_idx is None else 8 * g_idx.nbytes
    return tensors | stored, bits, parameters


def quantize(job: Job) -> Export:
    """Run the recipe over the job's windows."""
    if not torch.accelerator.is_available():
        setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # noqa: B010 (a method, which mypy lets nobody assign to)
    model, recipe, loader = load_model(job), _recipe(job), _loader(job)
    started = start_clock()
    oneshot(
        model=model,
        tokenizer=job.model if (Path(job.model) / "tokenizer.json").exists() else None,
        dataset=loader,
        recipe=recipe,
        num_calibration_samples=len(loader),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    if not job.export:
        return Export({}, 0, 0, seconds)
    logits = logits_of(model, job) if job.verify else None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        tensors, bits, parameters = _read_back(Path(folder), job)
    return Export(tensors, bits, parameters, seconds, logits)


if __name__ == "__main__":
    main(quantize, ["llmcompressor", "compressed-tensors"])
