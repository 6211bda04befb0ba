"""A checkpoint in high precision, made of any source: what a quantized checkpoint means, for runtimes that cannot be asked otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewbit.checkpoints.safetensors_files import INDEX_NAME
from fewbit.checkpoints.sources import TensorSource

__all__ = ["write_plain"]

_SHARD_BYTES = 2**30
_COMPANIONS = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")


def write_plain(source: TensorSource, to: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with its quantized weights dequantized; one shard is in memory at a time.

    Args:
        source: where the tensors come from.
        to: a directory, made when missing.
        dtype: of the floating-point tensors. Weights dequantized to BF16 are rounded once more: use float32 where that matters.

    Returns:
        The directory.

    Raises:
        OSError: it cannot be written.
    """
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    config = source.config.to_dict()
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (to / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if source.directory is not None:
        for pattern in _COMPANIONS:
            for path in source.directory.glob(pattern):
                shutil.copyfile(path, to / path.name)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, to / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for name in source.names():
        tensor = source.get(name)
        shard[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size >= _SHARD_BYTES:
            flush()
            size = 0
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (to / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return to
