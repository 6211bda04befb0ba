"""The layouts by name: one line each.

`LAYOUTS` is what `--format` takes; `quantized_reader` finds the reader for what config.json calls `quant_method`. AutoRound has a name of
its own there and packs in other tools' layouts, which its `packing_format` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.layout import Layout, LinearsReader
from fewbit.errors import UnsupportedModelError, UsageError

__all__ = ["LAYOUTS", "get_layout", "quantized_reader"]

# name -> module:class and its arguments; imported when asked for
LAYOUTS: Mapping[str, tuple[str, str, tuple[Any, ...]]] = {
    "compressed-tensors": ("compressed_tensors", "CompressedTensorsLayout", ()),
    "gptq": ("gptq", "GptqLayout", (1,)),
    "gptq_v2": ("gptq", "GptqLayout", (2,)),
    "awq": ("awq", "AwqLayout", ()),
    "fewbit": ("own", "OwnLayout", ()),
    "gguf": ("gguf", "GgufLayout", ()),
    "bitsandbytes": ("bitsandbytes", "BitsAndBytesLayout", ()),
    "torchao": ("torchao", "TorchAOLayout", ()),
    "modelopt": ("modelopt", "ModelOptLayout", ()),
    "dense": ("dense", "DenseLayout", (torch.bfloat16,)),
    "dense-float32": ("dense", "DenseLayout", (torch.float32,)),
}

# quant_method -> module:class
_READERS: Mapping[str, tuple[str, str]] = {
    "compressed-tensors": ("compressed_tensors_reader", "CompressedTensorsReader"),
    "gptq": ("gptq", "GptqReader"),
    "awq": ("awq", "AwqReader"),
    "fewbit": ("own", "OwnReader"),
    "bitsandbytes": ("bitsandbytes", "BitsAndBytesReader"),
    "torchao": ("torchao", "TorchAOReader"),
    "modelopt": ("modelopt", "ModelOptReader"),
}

# AutoRound's packing_format -> whose layout it is
_AUTO_ROUND: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq",
    "auto_round:auto_awq": "awq",
}


def _load(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(import_module(f"fewbit.checkpoints.{module}"), name)
    return found


def get_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UsageError: there is none.
    """
    row = LAYOUTS.get(name)
    if row is None:
        raise UsageError(f"unknown format '{name}'", f"choose one of {', '.join(LAYOUTS)}")
    module, kind, arguments = row
    layout: Layout = _load(module, kind)(*arguments)
    return layout


def quantized_reader(directory: Path, fields: Mapping[str, Any]) -> LinearsReader:
    """The reader of a Hugging Face directory that is quantized on disk.

    Args:
        fields: the `quantization_config` of its config.json.

    Raises:
        UnsupportedModelError: a layout that fewbit does not read.
        CheckpointError: damaged files.
    """
    method = fields.get("quant_method")
    if method == "auto-round":
        method = _AUTO_ROUND.get(str(fields.get("packing_format")))
    row = _READERS.get(method) if isinstance(method, str) else None
    if row is None:
        what = fields.get("packing_format") or fields.get("quant_method")
        raise UnsupportedModelError(
            f"'{directory}' is quantized in the layout '{what}', which fewbit does not read",
            f"name the high-precision model, or a checkpoint of {', '.join(_READERS)}",
        )
    reader: LinearsReader = _load(*row)(directory, fields)
    return reader
