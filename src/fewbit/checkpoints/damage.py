"""A damaged copy of a checkpoint: the negative control of `fewbit verify`. A check that a damaged checkpoint passes is no check.

All scales of one linear are made half as large again (powers of two are doubled), in a copy of the file that holds them; the other files
are linked. Where a layout keeps its scales inside its blocks (GGUF), those bytes are.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from fewbit.checkpoints.gguf_header import GgufFile
from fewbit.checkpoints.safetensors_files import SafetensorsFiles, TensorEntry
from fewbit.errors import CheckpointError

__all__ = ["damaged_copy"]

_FACTOR = 1.5
_SUFFIXES = (".weight_scale", ".scales", ".SCB", ".weight.absmax", "._weight_scale", ".weight")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HALF_FIRST = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176}  # bytes of a block; a half leads it


def damaged_copy(path: str | Path, linear: str, to: str | Path) -> Path:
    """Copy a checkpoint with the scales of one linear damaged.

    Args:
        path: a Hugging Face directory or a GGUF file.
        linear: the linear's dotted name (a GGUF tensor's, without `.weight`).
        to: a directory that does not exist yet, or is empty.

    Returns:
        What to load: `to`, or the GGUF file in it.

    Raises:
        CheckpointError: the linear has no scales that could be damaged.
    """
    path, to = Path(path), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        return _damaged_gguf(path, linear, to / path.name)
    files = SafetensorsFiles(path)
    name = next((linear + suffix for suffix in _SUFFIXES if linear + suffix in files), None)
    if name is None:
        raise CheckpointError(f"'{linear}' in '{path}' has no scales that could be damaged")
    entry = files.entry(name)
    for file in path.iterdir():
        if file.is_file() and file != entry.file:
            _link(file, to / file.name)
    shutil.copyfile(entry.file, to / entry.file.name)
    _patch(to / entry.file.name, entry, _scaled(files.get(name)))
    return to


def _scaled(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.uint8:  # exponents of two, or codes of scales
        return (scales.to(torch.int16) + 1).clamp(max=255).to(torch.uint8)
    return (scales.float() * _FACTOR).to(scales.dtype)


def _patch(file: Path, entry: TensorEntry, tensor: torch.Tensor) -> None:
    with file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source.resolve(), to)
    except OSError:  # another file system
        shutil.copyfile(source, to)


def _damaged_gguf(path: Path, linear: str, to: Path) -> Path:
    file = GgufFile(path)
    tensor = file.tensors.get(f"{linear}.weight")
    if tensor is None or tensor.type.name not in (*_HALF_FIRST, *_FLOATS, "MXFP4", "Q6_K"):
        raise CheckpointError(f"'{linear}' in '{path}' has no scales that could be damaged")
    data = file.get(f"{linear}.weight")
    if tensor.type.name in _FLOATS:
        data = (data.view(_FLOATS[tensor.type.name]) * _FACTOR).view(torch.uint8)
    elif tensor.type.name == "MXFP4":
        data.view(-1, 17)[:, 0] += 1
    elif tensor.type.name == "Q6_K":  # its half comes last
        blocks = data.view(-1, 210)
        blocks[:, -2:] = (blocks[:, -2:].contiguous().view(torch.float16) * _FACTOR).view(torch.uint8)
    else:
        blocks = data.view(-1, _HALF_FIRST[tensor.type.name])
        blocks[:, :2] = (blocks[:, :2].contiguous().view(torch.float16) * _FACTOR).view(torch.uint8)
    shutil.copyfile(path, to)
    with to.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(data.numpy().tobytes())
    return to
