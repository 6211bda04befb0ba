"""Which runtimes load which checkpoints: the matrix of `runtimes.toml`, and the row of it that a checkpoint belongs to.

A *kind* is a layout in one of its varieties, as far as a runtime cares: `gptq-4` and `gptq-4-asym` are two, because vLLM's CPU kernels take
one and not the other. `kind_of` reads it from what the checkpoint says of itself, config.json's `quantization_config` or the types of a
GGUF file's tensors, whoever wrote it.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

from fewbit.checkpoints.gguf_header import GgufFile, gguf_path
from fewbit.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError, UsageError

__all__ = ["Kind", "Made", "Runtime", "get_runtime", "kind_of", "kinds", "runtimes"]


@dataclass(frozen=True)
class Runtime:
    """A program that loads checkpoints.

    Attributes:
        name: as `--runtime` takes it.
        title: as people write it.
        versions: what the matrix was proven with.
        environment: its folder among the runtimes' environments.
    """

    name: str
    title: str
    versions: str
    environment: str


@dataclass(frozen=True)
class Made:
    """A checkpoint that proves a row, in the words of `fewbit quantize`; without a scheme in those of `fewbit convert`.

    Attributes:
        format, scheme, group_size, method: their options.
    """

    format: str
    scheme: str | None = None
    group_size: int | None = None
    method: str = "rtn"

    def __str__(self) -> str:
        scheme = "" if self.scheme is None else f"-{self.scheme.lower()}"
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"{self.format}{scheme}{group}"


@dataclass(frozen=True)
class Kind:
    """A row of the matrix.

    Attributes:
        name: for example `gptq-4`.
        title: as people write it.
        cells: runtime to None when it loads the kind, else to the reason why not; a runtime that has no word for the layout is left out.
        made: what `make test-runtimes` writes to prove the row.
    """

    name: str
    title: str
    cells: Mapping[str, str | None]
    made: tuple[Made, ...] = ()

    def reason_against(self, runtime: str) -> str | None:
        """None when the runtime loads this kind, else why not."""
        return self.cells.get(runtime, "does not read this layout")


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("fewbit.checkpoints").joinpath("runtimes.toml").read_text(encoding="utf-8"))


@cache
def runtimes() -> tuple[Runtime, ...]:
    """The runtimes in the table's order."""
    return tuple(Runtime(name, **fields) for name, fields in _table()["runtimes"].items())


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UsageError: no such runtime.
    """
    found = next((runtime for runtime in runtimes() if runtime.name == name), None)
    if found is None:
        raise UsageError(f"unknown runtime '{name}'", f"choose one of {', '.join(r.name for r in runtimes())}")
    return found


@cache
def kinds() -> Mapping[str, Kind]:
    """The rows, by name."""
    names = {runtime.name for runtime in runtimes()}
    return {
        name: Kind(
            name,
            fields["title"],
            {r: None if cell is True else cell for r, cell in fields.items() if r in names},
            tuple(Made(**row) for row in fields.get("made", ())),
        )
        for name, fields in _table()["kinds"].items()
    }


def kind_of(path: str | Path) -> Kind:
    """The row that a checkpoint belongs to.

    Args:
        path: a Hugging Face directory or a GGUF file.

    Raises:
        ModelNotFoundError: neither of them.
        CheckpointError: a config.json or a GGUF file that cannot be read.
        UnsupportedModelError: a kind that the matrix does not have.
    """
    path = Path(path)
    gguf = gguf_path(path)
    if gguf is not None:
        return _row(_gguf_kind(gguf), path)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"no config.json in '{path}'", "name a Hugging Face directory or a GGUF file")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        fields = config.get("quantization_config")
        name = "plain" if fields is None else _KINDS[str(fields["quant_method"])](fields)
    except KeyError as error:
        raise UnsupportedModelError(f"'{path}' is quantized in a way that no runtime in the matrix knows ({error})") from error
    except (ValueError, TypeError, AttributeError, IndexError, OSError) as error:
        raise CheckpointError(f"'{path / 'config.json'}' has no valid quantization_config: {error}", "repair it") from error
    return _row(name, path)


def _row(name: str, path: Path) -> Kind:
    found = kinds().get(name)
    if found is None:
        raise UnsupportedModelError(f"'{path}' is of the kind '{name}', which the matrix of runtimes does not have")
    return found


def _compressed_tensors(fields: Mapping[str, Any]) -> str:
    group = next(iter(fields["config_groups"].values()))
    weights, inputs = group["weights"], group.get("input_activations")
    bits = int(weights["num_bits"])
    static = inputs is not None and inputs.get("dynamic") is False
    if weights["type"] == "float" and bits == 4:
        return "ct-nvfp4" if weights["group_size"] == 16 else "ct-mxfp4"
    if weights["type"] == "float":
        if weights["strategy"] == "block":
            return "ct-fp8-block"
        if inputs is not None and not static and weights["strategy"] == "tensor":
            return "ct-fp8-tensor"
        if inputs is not None and not static and fields.get("kv_cache_scheme"):
            return "ct-fp8-kv"
        return "ct-fp8a16" if inputs is None else "ct-fp8-static" if static else "ct-fp8-dynamic"
    if inputs is not None:
        return "ct-w8a8-static" if static else "ct-w8a8"
    if bits in (2, 3):
        return "ct-wna16"
    return f"ct-w{bits}a16" + ("" if weights.get("symmetric", True) else "-asym")


def _gptq(fields: Mapping[str, Any]) -> str:
    bits = int(fields["bits"])
    if bits != 4:
        return f"gptq-{bits}"
    return "gptq-4-act" if fields.get("desc_act") else "gptq-4" if fields.get("sym", True) else "gptq-4-asym"


def _bitsandbytes(fields: Mapping[str, Any]) -> str:
    return f"bnb-{fields.get('bnb_4bit_quant_type', 'fp4')}" if fields.get("load_in_4bit") else "bnb-int8"


def _torchao(fields: Mapping[str, Any]) -> str:
    """By the name of TorchAO's configuration class, which is how transformers stores it."""
    name = str(fields["quant_type"]["default"]["_type"])
    known = {
        "Int8WeightOnlyConfig": "int8wo",
        "Int8DynamicActivationInt8WeightConfig": "int8dyn",
        "Float8WeightOnlyConfig": "fp8wo",
        "IntxWeightOnlyConfig": "intx4",
    }
    return f"torchao-{known[name]}"


def _modelopt(fields: Mapping[str, Any]) -> str:
    algorithm = str(fields["quant_algo"]).lower()
    known = {
        "fp8": "fp8",
        "fp8_per_channel_per_token": "fp8-pc",
        "fp8_pb_wo": "fp8-block",
        "nvfp4": "nvfp4",
        "w4a16_nvfp4": "nvfp4",
        "w4a16_awq": "int4",
    }
    return f"modelopt-{known[algorithm]}"


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": lambda fields: f"awq-{int(fields['bits'])}",
    "auto-round": lambda fields: f"autoround-{int(fields['bits'])}",
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "modelopt": _modelopt,
    "fewbit": lambda fields: "fewbit",
}


def _gguf_kind(path: Path) -> str:
    """By the type that most weights of the blocks have."""
    counts: Counter[str] = Counter()
    for name, tensor in GgufFile(path).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            counts[tensor.type.name.lower()] += prod(tensor.shape)
    if not counts:
        raise CheckpointError(f"'{path}' has no tensors of blocks", "download or write it again")
    most = counts.most_common(1)[0][0]
    return f"gguf-{'f16' if most == 'f32' else most}"
