"""Reading the compressed-tensors layout of fewbit, llm-compressor and AutoRound; the bytes are in `checkpoints.compressed_tensors`.

Besides what fewbit writes, files by others have

    weight_g_idx            columns out of order (`actorder: group`)
    mxfp8-quantized         P.weight F8_E4M3, P.weight_scale U8 [out, in/32]: q * 2**(e - 127)
    int-quantized, 4 bits   P.weight I8 with values of -8 .. 7 and FP8 inputs (W4A8)
    dense                   nothing but `kv_cache_scheme` with scales self_attn.k_scale, v_scale [1]
    [out] for [out, 1]      scales per channel, by AutoRound
    input_global_scale      NVFP4 inputs: FP4 in groups of 16 under a calibrated scale. Their weights are read; the inputs stay in high
                            precision here (`CompressedTensorsReader.notes` says so), because no kernel of fewbit rounds them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization import QuantizationConfig as LayoutConfig

from fewbit.checkpoints.layout import REWRITE, SCALE_DTYPES, LinearsReader, named, torch_dtype
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.grouping import scale_shape
from fewbit.formats.packing import packed_length
from fewbit.formats.spec import QuantSpec, ScaleDtype, Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["INT8_INPUTS", "CompressedTensorsReader", "StoredLinears"]

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "dense",
)
INT8_INPUTS = QuantSpec(8, strategy="token", dynamic=True, scale_dtype="float32")  # what outlier columns are taken out of


class CompressedTensorsReader(LinearsReader):
    """A checkpoint in the compressed-tensors layout, read linear by linear.

    Args:
        directory: config.json with a `quantization_config`, and safetensors.

    Raises:
        ModelNotFoundError: no config.json, or no weights.
        CheckpointError: damaged files.
        UnsupportedModelError: a `quantization_config` of another tool, or something of this layout that fewbit does not read yet.
    """

    def __init__(self, directory: str | Path, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__(directory, fields)
        self._config = _layout_config(self.fields, self.directory)
        self._layout = _only_group(self._config, self.directory)
        self._format = _checked_format((self._layout.format if self._layout else None) or self._config.format, self.directory)

    @property
    def ignore(self) -> tuple[str, ...]:
        """The linears that stay in high precision, as the checkpoint names them (`re:` marks a regular expression)."""
        return tuple(self._config.ignore or ())

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The dotted names of the quantized linears."""
        return tuple(name.removesuffix(".weight_scale") for name in self.files.names() if name.endswith(".weight_scale"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the checkpoint is not carried out here."""
        if self._layout is None or not _is_calibrated_fp4(self._layout.input_activations):
            return ()
        return ("its inputs are NVFP4 under a calibrated scale; here they stay in high precision",)

    @cached_property
    def scheme(self) -> Scheme:
        """The number formats; the preset's name where it is one.

        Raises:
            CheckpointError: no linear is quantized, although config.json says so.
        """
        cache = self._config.kv_cache_scheme
        keys = _spec(cache, "bfloat16") if cache else None
        if self._layout is None:
            return named(Scheme("", kv_keys=keys, kv_values=keys))
        if not self.linears:
            raise CheckpointError(f"'{self.directory}' says that it is quantized, and no linear in it is", REWRITE)
        dtype = self.files.dtype(f"{self.linears[0]}.weight_scale")
        if dtype not in SCALE_DTYPES:
            raise CheckpointError(f"'{self.directory}' has scales in {dtype}", REWRITE)
        activations = self._layout.input_activations
        inputs = _own_inputs(self.fields, self.directory)
        if activations is not None and not _is_calibrated_fp4(activations):
            microscaled = activations.scale_dtype is not None and "uint8" in str(activations.scale_dtype)
            inputs = _spec(activations, "e8m0" if microscaled else "float32")
        try:
            return named(Scheme("", _spec(self._layout.weights, SCALE_DTYPES[dtype]), inputs, keys, keys))
        except FormatError as error:
            raise CheckpointError(f"the quantization_config of '{self.directory}' contradicts itself: {error.problem}", REWRITE) from error

    def read(self, prefix: str) -> QuantizedTensor:
        """The weight of one linear, unpacked.

        Args:
            prefix: one of `linears`.

        Raises:
            CheckpointError: a tensor is missing, has a shape or dtype that contradicts the others, or a scale is not finite.
        """
        return StoredLinears(self.files, self.scheme, self._format).read(prefix)


class StoredLinears:
    """Linears of one format in safetensors files."""

    def __init__(self, files: SafetensorsFiles, scheme: Scheme, layout: str) -> None:
        assert scheme.weights is not None
        self.files, self._spec, self._format = files, scheme.weights, layout
        self._static_inputs = scheme.input_activations is not None and not scheme.input_activations.dynamic
        self.directory = files.directory

    def read(self, prefix: str) -> QuantizedTensor:
        """The weight of one linear."""
        spec = self._spec
        values = self._values(prefix, spec)
        try:
            shape = scale_shape(spec, *values.shape)
        except FormatError as error:
            raise CheckpointError(f"'{prefix}' in '{self.directory}': {error.problem}", REWRITE) from error
        stored: tuple[int, ...] = (1,) if spec.strategy == "tensor" else shape
        if spec.strategy == "channel" and len(self.files.shape(f"{prefix}.weight_scale")) == 1:
            stored = (shape[0],)
        scale = self._tensor(prefix, "weight_scale", torch_dtype(spec.scale_dtype), stored).view(shape)
        if scale.is_floating_point() and not bool(scale.float().isfinite().all()):
            raise CheckpointError(f"'{prefix}.weight_scale' in '{self.directory}' has NaN or infinite scales", REWRITE)
        return QuantizedTensor(
            values,
            scale,
            spec,
            self._zero_point(prefix, spec, scale),
            self._columns(prefix, spec, values.shape[1]),
            self._global_scale(prefix, spec),
            input_scale=self._input_scale(prefix),
        )

    def _columns(self, prefix: str, spec: QuantSpec, columns: int) -> torch.Tensor | None:
        """int32 [in], the group of each column, where columns are out of order."""
        if f"{prefix}.weight_g_idx" not in self.files or spec.group_size is None:
            return None
        g_idx = self._tensor(prefix, "weight_g_idx", torch.int32, (columns,))
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= columns // spec.group_size:
            raise CheckpointError(f"'{prefix}.weight_g_idx' in '{self.directory}' points to groups that are not there", REWRITE)
        return None if torch.equal(g_idx, torch.arange(columns, dtype=torch.int32) // spec.group_size) else g_idx

    def _values(self, prefix: str, spec: QuantSpec) -> torch.Tensor:
        if self._format == "pack-quantized":
            out, columns = self._tensor(prefix, "weight_shape", torch.int64, (2,)).tolist()
            packed = self._tensor(prefix, "weight_packed", torch.int32, (out, _words(columns, spec.num_bits)))
            return _unpacked(packed, spec.num_bits, out, columns, dim=1)
        if self._format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            packed = self._tensor(prefix, "weight_packed", torch.uint8)
            return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
        return self._tensor(prefix, "weight", torch.int8 if spec.type == "int" else torch.float8_e4m3fn)

    def _zero_point(self, prefix: str, spec: QuantSpec, scale: torch.Tensor) -> torch.Tensor | None:
        if spec.symmetric:
            return None
        rows, groups = scale.shape
        if self._format != "pack-quantized":
            return self._tensor(prefix, "weight_zero_point", torch.int8, (rows, groups))
        packed = self._tensor(prefix, "weight_zero_point", torch.int32, (_words(rows, spec.num_bits), groups))
        return _unpacked(packed, spec.num_bits, rows, groups, dim=0)

    def _global_scale(self, prefix: str, spec: QuantSpec) -> torch.Tensor | None:
        if not spec.global_scale:
            return None
        divisor = self._tensor(prefix, "weight_global_scale", torch.float32, (1,))
        if not bool((divisor.isfinite() & (divisor > 0)).all()):
            raise CheckpointError(f"'{prefix}.weight_global_scale' in '{self.directory}' is no positive number", REWRITE)
        return 1 / divisor

    def _input_scale(self, prefix: str) -> torch.Tensor | None:
        """float32 [1], where inputs are static; stored in any floating dtype."""
        name = f"{prefix}.input_scale"
        if not self._static_inputs:
            return None
        if name not in self.files:
            raise CheckpointError(f"'{name}' is missing in '{self.directory}', and its inputs are static", REWRITE)
        scale = self.files.get(name).float().reshape(-1)
        if scale.shape != (1,) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(f"'{name}' in '{self.directory}' is no positive number", REWRITE)
        return scale

    def _tensor(self, prefix: str, part: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor of a linear, checked before it is read; `shape` None accepts any matrix."""
        name = f"{prefix}.{part}"
        found, has = self.files.shape(name), self.files.dtype(name)
        if has != dtype or (found != shape if shape is not None else len(found) != 2):
            expected = f"{list(shape)} in {dtype}" if shape is not None else f"a matrix in {dtype}"
            raise CheckpointError(f"'{name}' in '{self.directory}' is {list(found)} in {has}, not {expected}", REWRITE)
        return self.files.get(name)


def _unpacked(packed: torch.Tensor, num_bits: int, rows: int, columns: int, dim: Literal[0, 1]) -> torch.Tensor:
    """int8 [rows, columns] of the words that were packed along `dim`."""
    values: torch.Tensor = unpack_from_int32(packed, num_bits, torch.Size((rows, columns)), packed_dim=dim)
    return values.contiguous()


def _words(count: int, num_bits: int) -> int:
    """int32 words that hold `count` values."""
    return -(-packed_length(count, num_bits) // 4)


def _layout_config(fields: Mapping[str, Any], directory: Path) -> LayoutConfig:
    if fields.get("quant_method") not in ("compressed-tensors", "auto-round"):
        raise UnsupportedModelError(f"'{directory}' is a checkpoint of '{fields.get('quant_method')}'", "this reads compressed-tensors")
    if fields.get("sparsity_config") or fields.get("transform_config"):
        raise UnsupportedModelError(f"'{directory}' has a sparsity or transform configuration", "fewbit reads plain quantization only")
    try:
        return LayoutConfig.model_validate(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"'{directory}' has no valid quantization_config: {reason}", REWRITE) from error


def _own_inputs(fields: Mapping[str, Any], directory: Path) -> QuantSpec | None:
    """The inputs' format that fewbit has left beside the layout's fields; None when there is none."""
    own = fields.get("fewbit")
    if own is None:
        return None
    try:
        return replace(INT8_INPUTS, outlier_threshold=float(own["input_activations"]["outlier_threshold"]))
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise CheckpointError(f"'{directory / 'config.json'}' has damaged fields of fewbit's own: {own}", REWRITE) from error


def _is_calibrated_fp4(activations: QuantizationArgs | None) -> bool:
    """NVFP4 inputs: groups under a scale of the tensor that was calibrated."""
    return activations is not None and activations.dynamic == "local"


def _checked_format(name: Any, directory: Path) -> str:
    """The format as a plain string (the library hands out strings and members of an enumeration)."""
    text = str(getattr(name, "value", name))
    if text not in _FORMATS:
        raise UnsupportedModelError(f"'{directory}' is in the format '{text}'", f"fewbit reads {', '.join(_FORMATS)}")
    return text


def _only_group(config: LayoutConfig, directory: Path) -> QuantizationScheme | None:
    """The one group of linears; None where only the KV cache is quantized."""
    groups = list(config.config_groups.values())
    if not groups and config.kv_cache_scheme is not None:
        return None
    if len(groups) != 1 or isinstance(groups[0], list) or groups[0].weights is None:
        raise UnsupportedModelError(f"'{directory}' mixes {len(groups)} formats of weights", "fewbit reads checkpoints with one")
    activations = groups[0].input_activations
    if activations is not None and activations.dynamic is not True and not _is_calibrated_fp4(activations):
        if activations.dynamic is not False or str(getattr(activations.strategy, "value", activations.strategy)) != "tensor":
            raise UnsupportedModelError(
                f"'{directory}' has scales of activations that are neither dynamic nor one per tensor", "fewbit reads those two"
            )
        if not activations.symmetric:
            raise UnsupportedModelError(f"'{directory}' has zero points of activations", "fewbit reads symmetric activation formats")
    return groups[0]


def _spec(args: QuantizationArgs, scale_dtype: ScaleDtype) -> QuantSpec:
    """A spec in the library's words, put back into ours."""
    exponent_bits = {4: 2, 8: 4}.get(args.num_bits) if args.type == "float" else None
    grouped = args.strategy in ("group", "tensor_group")
    return QuantSpec(
        num_bits=args.num_bits,
        type=args.type,
        strategy="group" if grouped else args.strategy,
        group_size=args.group_size if grouped else None,
        block_shape=tuple(args.block_structure) if args.block_structure else None,
        symmetric=args.symmetric,
        dynamic=bool(args.dynamic),
        scale_dtype=scale_dtype,
        exponent_bits=exponent_bits,
        global_scale=args.strategy == "tensor_group",
    )
