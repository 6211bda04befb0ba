"""What a checkpoint layout is: how the weight of one linear lies on disk, and what config.json says about it.

A layout is one file of this folder with three things, each small:

    Layout          which schemes it holds, the tensors of one linear, the fields of config.json
    LinearsReader   the way back: which linears of a directory are quantized, their scheme, one linear at a time
    the header      the byte layout, drawn

`Layout.stored` answers with the scheme that is really written: GPTQ keeps its scales in FP16, so a scheme with BF16 scales becomes one
with FP16 scales *before* anything is rounded with them, and nothing is lost at the end. `convert` asks `Layout.nearest` instead: which of
the layout's formats has the grid of a tensor that exists already (`checkpoints.express`).

Readers are given files by strangers. They see only what the header of the safetensors files and config.json say, check it against each
other before a tensor is read, and raise CheckpointError with the tensor's name; nothing is allocated on the word of a header that the
file's length contradicts (`checkpoints.safetensors_files`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.errors import CheckpointError, FormatError, ModelNotFoundError
from fewbit.formats.spec import SCHEMES, QuantSpec, ScaleDtype, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = [
    "REWRITE",
    "SCALE_DTYPES",
    "Layout",
    "LinearsReader",
    "boolean",
    "finite",
    "integer",
    "is_cache_scale",
    "named",
    "part",
    "quantization_fields",
    "quantizer_name",
    "same_but_scales",
    "sole_format",
    "systematic_name",
    "torch_dtype",
]

SCALE_DTYPES: Mapping[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.uint8: "e8m0",
}
REWRITE = "the checkpoint is damaged or not in this layout: write or download it again"


class Layout(ABC):
    """One layout, as a writer.

    Class attributes:
        name: as `--format` and `quant_method` say it.
        single_file: True where a checkpoint is one file (GGUF) and not a Hugging Face directory.
    """

    name: str
    single_file = False

    @abstractmethod
    def supports(self, scheme: Scheme) -> str | None:
        """None when the layout can hold the scheme, else the reason why not, one line."""

    def stored(self, scheme: Scheme) -> Scheme:
        """The scheme as the layout stores it: the same grids, with the dtypes of scales and zero points that it has."""
        return scheme

    @abstractmethod
    def nearest(self, spec: QuantSpec) -> QuantSpec | None:
        """The layout's format for weights that exist already in `spec`: one that holds their grid; None when none does."""

    def check_shape(self, name: str, rows: int, columns: int, spec: QuantSpec) -> None:
        """Whether a linear [rows, columns] can be stored.

        Raises:
            FormatError: with the linear's name, the number that does not fit and what to do.
        """
        return

    @abstractmethod
    def format_name(self, scheme: Scheme) -> str:
        """What the layout calls its own format for a scheme, for example `pack-quantized` or `gptq_v2`."""

    @abstractmethod
    def write_linear(self, prefix: str, q: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        """The tensors of one linear by name.

        Args:
            prefix: the linear's dotted name.
            q: its weight, in the format `scheme.weights`.
            scheme: as `stored` gives it.

        Raises:
            FormatError: `q` is in another format, or has something that the layout does not store.
        """

    @abstractmethod
    def config_fields(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            ignore: dotted names of the linears that stay in high precision.
        """

    def companions(self, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
        """Further JSON files that readers of the layout look for, by name."""
        return {}

    def metadata(self, scheme: Scheme, shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> dict[str, str]:
        """What the safetensors header says besides the tensors.

        Args:
            scheme: as `stored` gives it.
            shapes: of the quantized linears, by dotted name.
            names: every tensor of the model by its high-precision name.
        """
        return {}


class LinearsReader(ABC):
    """The quantized linears of a Hugging Face directory.

    Args:
        directory: config.json with a `quantization_config`, and safetensors.
        fields: the `quantization_config`, read already.

    Raises:
        ModelNotFoundError: no weights.
        CheckpointError: damaged files or fields.
        UnsupportedModelError: something of this layout that fewbit does not read.
    """

    def __init__(self, directory: str | Path, fields: Mapping[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        self.fields = quantization_fields(self.directory) if fields is None else dict(fields)
        self.files = SafetensorsFiles(self.directory)

    @property
    @abstractmethod
    def ignore(self) -> tuple[str, ...]:
        """What stays in high precision, in the layout's own words."""

    @property
    @abstractmethod
    def linears(self) -> tuple[str, ...]:
        """The dotted names of the quantized linears."""

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """The number formats; a preset's name where it is one. Single linears may differ from it in what only their tensors say."""

    @abstractmethod
    def read(self, prefix: str) -> QuantizedTensor:
        """The weight of one linear, unpacked.

        Args:
            prefix: one of `linears`.

        Raises:
            CheckpointError: a tensor is missing, has a shape or dtype that contradicts the others, or a scale is not finite.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the checkpoint is not carried out here, one line each."""
        return ()

    @cached_property
    def owned(self) -> frozenset[str]:
        """Names of the tensors that belong to quantized linears or to the layout, and are none of the high-precision model's."""
        return frozenset({name for parts in self._parts.values() for name in parts} | set(self.cache_scales))

    def parts(self, prefix: str) -> tuple[str, ...]:
        """Names of the tensors that one linear is stored as, its bias not among them."""
        return tuple(self._parts.get(prefix, ()))

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {prefix: [] for prefix in self.linears}
        for name in self.files.names():
            prefix = self.linear_of(name)
            if prefix in found and not name.endswith(".bias"):
                found[prefix].append(name)
        return found

    def linear_of(self, name: str) -> str:
        """The dotted name of the linear that a tensor would belong to."""
        return name.rpartition(".")[0]

    @cached_property
    def cache_scales(self) -> tuple[str, ...]:
        """Names of the static scales of the KV cache, where the checkpoint has them."""
        return tuple(name for name in self.files.names() if is_cache_scale(name))


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is the static scale of a layer's keys or values: `self_attn.k_scale`, ModelOpt's `k_proj.k_scale`."""
    return name.rpartition(".")[2] in ("k_scale", "v_scale")


def quantization_fields(directory: Path) -> dict[str, Any]:
    """The `quantization_config` of a directory's config.json.

    Raises:
        ModelNotFoundError: no config.json.
        CheckpointError: it is no JSON object, or has no such field.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"no config.json in '{directory}'", "give the directory of a Hugging Face model")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' has no quantization_config that can be read", REWRITE) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"'{path}' has a quantization_config that is no JSON object", REWRITE)
    return fields


def integer(fields: Mapping[str, Any], name: str, directory: Path, default: int | None = None) -> int:
    """An integer of a `quantization_config`.

    Raises:
        CheckpointError: it is missing or none.
    """
    value = fields.get(name, default)
    if type(value) is not int:
        raise CheckpointError(f"the quantization_config of '{directory}' says {name} = {value!r}, which is no integer", REWRITE)
    return value


def boolean(fields: Mapping[str, Any], name: str, directory: Path, default: bool) -> bool:
    """A boolean of a `quantization_config`; `default` when it is missing or null.

    Raises:
        CheckpointError: it is something else.
    """
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise CheckpointError(f"the quantization_config of '{directory}' says {name} = {value!r}, which is neither true nor false", REWRITE)
    return value


def part(
    files: SafetensorsFiles, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None, *, ndim: int = 2
) -> torch.Tensor:
    """One tensor of a linear, checked before it is read.

    Args:
        shape: what it must have; None for any shape of `ndim` dimensions without a zero among them.

    Raises:
        CheckpointError: it is missing, or its dtype or shape is another.
    """
    found, has = files.shape(name), files.dtype(name)
    fits = found == shape if shape is not None else len(found) == ndim and all(found)
    if has not in dtypes or not fits:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"{list(shape)} in {kinds}" if shape is not None else f"{ndim}-dimensional in {kinds}"
        raise CheckpointError(f"'{name}' in '{files.directory}' is {list(found)} in {has}, not {expected}", REWRITE)
    return files.get(name)


def finite(scale: torch.Tensor, name: str, files: SafetensorsFiles) -> torch.Tensor:
    """The scales themselves.

    Raises:
        CheckpointError: one of them is NaN or infinite.
    """
    if scale.is_floating_point() and not bool(scale.float().isfinite().all()):
        raise CheckpointError(f"'{name}' in '{files.directory}' has NaN or infinite scales", REWRITE)
    return scale


def torch_dtype(scale_dtype: ScaleDtype) -> torch.dtype:
    """The dtype in which scales are stored (E8M0: uint8 exponents)."""
    return next(dtype for dtype, name in SCALE_DTYPES.items() if name == scale_dtype)


def named(scheme: Scheme) -> Scheme:
    """The scheme under its preset's name, whatever dtype the stored scales have; under a systematic one when it is none."""
    presets = (preset.name for preset in SCHEMES.values() if same_but_scales(preset, scheme))
    return replace(scheme, name=next(presets, systematic_name(scheme)))


def same_but_scales(preset: Scheme, scheme: Scheme) -> bool:
    """Whether a scheme is the preset, whatever it is called and whatever dtype the stored scales of its weights have."""
    if preset.weights is None or scheme.weights is None:
        return False
    return replace(preset, name="", weights=replace(preset.weights, scale_dtype=scheme.weights.scale_dtype)) == replace(scheme, name="")


def systematic_name(scheme: Scheme) -> str:
    """W4A16-G64 and the like, for what is no preset."""
    if scheme.weights is None:
        return "KV" + (f"-{scheme.kv_keys.grid_name.upper()}" if scheme.kv_keys else "")
    spec, activations = scheme.weights, scheme.input_activations
    kind = {"float": "FP", "nf": "NF", "codebook": "CB"}.get(spec.type, "W")
    parts = [f"{kind}{spec.num_bits}A{activations.num_bits if activations else 16}"]
    parts += [f"G{spec.group_size}"] if spec.strategy == "group" else [spec.strategy.upper()]
    return "-".join(parts + ([] if spec.symmetric else ["ASYM"]) + (["KV8"] if scheme.kv_keys else []))


def sole_format(prefix: str, q: QuantizedTensor, scheme: Scheme) -> QuantSpec:
    """The format that a writer is about to store.

    Raises:
        FormatError: the weight is in another one.
    """
    if scheme.weights is None or q.spec != scheme.weights:
        raise FormatError(f"'{prefix}' is quantized as {q.spec}, the scheme {scheme.name} has {scheme.weights}")
    return scheme.weights


def quantizer_name() -> str:
    """What config.json calls the program that made a checkpoint."""
    from fewbit import __version__

    return f"fewbit:{__version__}"
