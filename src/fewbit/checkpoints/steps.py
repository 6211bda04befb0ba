"""One linear as fewbit keeps it while work goes on: every QuantizedTensor, whatever layout it is meant for, bit for bit.

    P.weight_codes   U8 [out, ceil(in * b / 8)]   values, densely packed (`formats.packing`)
    P.weight_scale, P.weight_zero_point, P.weight_global_scale, P.weight_g_idx, P.weight_codebook, P.input_scale     as in QuantizedTensor

No program but fewbit reads this. compressed-tensors lacks NF4 and codebooks, GPTQ and AWQ turn the matrix over, GGUF interleaves scales
with values: finished work is kept in this form and put into the layout's own at the end, one linear at a time.
"""

from __future__ import annotations

import torch

from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.formats.packing import pack_values, unpack_values
from fewbit.formats.spec import Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["keep_linear", "kept_linear"]

_NAMES = {
    "zero_point": "weight_zero_point",
    "g_idx": "weight_g_idx",
    "global_scale": "weight_global_scale",
    "codebook": "weight_codebook",
    "input_scale": "input_scale",
}


def keep_linear(prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one linear by name.

    Args:
        prefix: the linear's dotted name. q: its weight. scheme: not looked at; layouts' writers have the same signature.
    """
    tensors = {"weight_codes": pack_values(q.values, q.spec), "weight_scale": q.scale}
    for field, name in _NAMES.items():
        value = getattr(q, field)
        if value is not None:
            tensors[name] = value
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def kept_linear(files: SafetensorsFiles, prefix: str, scheme: Scheme) -> QuantizedTensor:
    """The inverse of `keep_linear`.

    Args:
        scheme: its `weights` are the format that was kept.

    Raises:
        CheckpointError: a tensor is missing.
    """
    spec = scheme.weights
    assert spec is not None
    packed, scale = files.get(f"{prefix}.weight_codes"), files.get(f"{prefix}.weight_scale")
    columns = packed.shape[1] * 8 // spec.num_bits
    if spec.group_size is not None and spec.strategy == "group":
        columns = scale.shape[1] * spec.group_size
    more = {field: files.get(f"{prefix}.{name}") for field, name in _NAMES.items() if f"{prefix}.{name}" in files}
    return QuantizedTensor(unpack_values(packed, spec, columns), scale, spec, **more)
