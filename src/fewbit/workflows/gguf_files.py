"""What a GGUF file needs beside tensors, whatever its source: a place, config.json, a tokenizer's files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbit.checkpoints.gguf import GgufIdentity
from fewbit.checkpoints.sources import TensorSource
from fewbit.errors import ModelNotFoundError

__all__ = ["gguf_target", "identity_of", "plain_config"]


def plain_config(source: TensorSource) -> dict[str, Any]:
    """The fields of config.json of a source that has none, without a `quantization_config`."""
    fields: dict[str, Any] = json.loads(source.config.to_json_string(use_diff=True))
    fields.pop("quantization_config", None)
    return fields


def gguf_target(out: Path, type_name: str) -> Path:
    """The file to write: `out` when it ends in `.gguf`, else one in the directory `out`, named after its type."""
    return out if out.suffix.lower() == ".gguf" else out / f"model-{type_name}.gguf"


@contextmanager
def identity_of(source: TensorSource, name: str | None = None) -> Iterator[GgufIdentity]:
    """Name, configuration and tokenizer of a model; a source that is no directory leaves its tokenizer in one for the time being.

    Args:
        name: for people; what the source calls itself when None.
    """
    title = (name or source.describe()).rstrip("/").rpartition("/")[2]
    if source.directory is not None:
        fields = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
        fields.pop("quantization_config", None)
        yield GgufIdentity(title, source.config, fields, source.directory)
        return
    with tempfile.TemporaryDirectory(prefix="fewbit-tokenizer-") as folder:
        directory: Path | None = Path(folder)
        try:
            source.tokenizer().save_pretrained(folder)
        except ModelNotFoundError:
            directory = None
        generation = source.generation_config()
        if generation is not None and directory is not None:
            generation.save_pretrained(folder)
        yield GgufIdentity(title, source.config, plain_config(source), directory)
