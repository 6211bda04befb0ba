"""HQQ's side: its default configuration, which needs no calibration data.

Methods:
    hqq   BaseQuantizeConfig(nbits, group_size), axis 1: affine with one floating-point zero point per group beside the scale.

Scales and zero points are kept in the compute dtype, BF16 here, so that a group of 128 costs 32 bits beside its values: 4.25 bits per
weight at 4 bits, where the symmetric formats have 4.125. Its 4-bit default rounds the first guess of the zero point but optimizes it as
a float afterwards.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _runner import Export, Job, load_model, logits_of, main, start_clock
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer


def _exact(layer: HQQLinear) -> torch.Tensor:
    """(integer - zero point) x scale in float32 from what is stored, instead of in the compute dtype."""
    meta: Any = layer.meta
    packed = layer.W_q.view(meta["unpack_view_dtype"]) if meta["view_as_float"] else layer.W_q
    values = Quantizer.unpack[meta["packing"]](packed, dtype=torch.float32)
    rows, columns = meta["shape"]
    values = values[: rows * columns // meta["group_size"]]
    return ((values - meta["zero"].float()) * meta["scale"].float()).reshape(rows, columns)


def quantize(job: Job) -> Export:
    """Replace every linear of the blocks by an HQQLinear."""
    if job.method != "hqq":
        raise ValueError(f"unknown method {job.method}")
    model = load_model(job)
    config = BaseQuantizeConfig(nbits=job.num_bits, group_size=job.group_size, **job.options)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in ("lm_head", "embed_out")]
    started = start_clock()
    for name in names:
        linear = model.get_submodule(name)
        layer = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
        model.set_submodule(name, layer)
    seconds = time.perf_counter() - started
    if not job.export:
        return Export({}, 0, 0, seconds)
    tensors, bits, parameters = {}, 0, 0
    for name in names:
        layer: Any = model.get_submodule(name)
        tensors[f"{name}.weight"] = _exact(layer)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
        size = tensors[f"{name}.weight"].numel()
        parameters += size
        bits += size * job.num_bits + 8 * (layer.meta["scale"].nbytes + layer.meta["zero"].nbytes)
    logits = logits_of(model.to(torch.bfloat16), job) if job.verify else None  # the layers compute in BF16 only
    notes = ["affine with floating-point zero points: more bits per weight than the symmetric formats at the same width"]
    return Export(tensors, bits, parameters, seconds, logits, notes)


if __name__ == "__main__":
    main(quantize, ["hqq"])
