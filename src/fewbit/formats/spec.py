"""One vocabulary for number formats: QuantSpec names the format of one tensor, Scheme says which tensors get one.

The words are the field's (compressed-tensors' QuantizationArgs uses the same): num_bits, type, strategy, group_size, symmetric, dynamic.
A scheme has three separate targets that are never mixed up: weights, input activations, KV cache. Presets are rows of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fewbit.errors import FormatError, UsageError

__all__ = ["SCHEMES", "QuantSpec", "Scheme", "get_scheme"]

NumberType = Literal["int", "float", "nf", "codebook"]
Strategy = Literal["tensor", "channel", "group", "block", "token"]
ScaleDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "e8m0"]
ZeroPointDtype = Literal["int8", "uint8"]


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one tensor.

    Attributes:
        num_bits: bits of one stored value.
        type: `int`, `float` (with `exponent_bits`), `nf` (NormalFloat, arXiv 2305.14314) or `codebook`.
        strategy: what shares a scale. For weights of shape [out, in]: `tensor`, `channel` (one row), `group` (`group_size` neighbours in a
            row), `block` (`block_shape` rows x columns). For activations of shape [tokens, in]: `tensor`, `token` (one row), `group`.
            For KV of shape [batch, heads, tokens, head_dim]: `token` (one token of one head), `channel` (one channel of one head over
            `group_size` tokens, KIVI's keys) and `group` (`group_size` neighbours within one token of one head).
        group_size: values that share a scale; set for `group` (and KIVI's `channel`), else None.
        block_shape: (rows, columns) that share a scale; set for `block`, else None.
        symmetric: True: no zero point. False: affine, x ~ (q - zero_point) * scale with integer zero point.
        dynamic: scales are computed from the values at run time (activations, KV cache).
        scale_dtype: how scales are stored; `e8m0` is a power of two in a byte (OCP MX).
        zero_point_dtype: how zero points are stored when affine; sub-byte formats pack them as densely as the values.
        exponent_bits: exponent width of a `float`: 4 is E4M3 (8 bit), 5 is E5M2, 2 is E2M1 (4 bit).
        global_scale: a second, FP32 scale per tensor on top of the stored ones (NVFP4).
        outlier_threshold: of input activations: columns in which any value is larger in magnitude stay in high precision (LLM.int8()).

    Raises:
        FormatError: the fields contradict each other.
    """

    num_bits: int
    type: NumberType = "int"
    strategy: Strategy = "tensor"
    group_size: int | None = None
    block_shape: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: ScaleDtype = "bfloat16"
    zero_point_dtype: ZeroPointDtype | None = None
    exponent_bits: int | None = None
    global_scale: bool = False
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_bits <= 8:
            raise FormatError(f"num_bits is {self.num_bits}, a quantized value has 1 to 8 bits")
        if (self.strategy == "group") and (self.group_size is None or self.group_size < 1):
            raise FormatError(f"strategy 'group' needs a positive group_size, not {self.group_size}")
        if self.group_size is not None and self.strategy not in ("group", "channel"):
            raise FormatError(f"group_size {self.group_size} has no meaning for strategy '{self.strategy}'")
        if (self.strategy == "block") != (self.block_shape is not None):
            raise FormatError("block_shape belongs to strategy 'block' and only to it")
        if (self.type == "float") != (self.exponent_bits is not None):
            raise FormatError("exponent_bits belongs to type 'float' and only to it")
        if self.outlier_threshold is not None and not (self.outlier_threshold > 0 and self.dynamic and self.strategy == "token"):
            raise FormatError("outlier_threshold is a positive number and belongs to dynamic formats per token (input activations)")
        if not self.symmetric and self.type != "int":
            raise FormatError(f"type '{self.type}' is symmetric by construction; affine needs type 'int'")
        if not self.symmetric and self.zero_point_dtype is None:
            object.__setattr__(self, "zero_point_dtype", "int8")

    @property
    def grid_name(self) -> str:
        """The grid's name in `formats.grids`: int4, int8, fp8_e4m3, fp8_e5m2, fp4_e2m1, nf4, ..."""
        if self.type == "float":
            return f"fp{self.num_bits}_e{self.exponent_bits}m{self.num_bits - 1 - (self.exponent_bits or 0)}"
        return f"{self.type}{self.num_bits}"

    def __str__(self) -> str:
        where = {"group": f"group {self.group_size}", "block": f"block {self.block_shape}"}.get(self.strategy, f"per {self.strategy}")
        kind = "" if self.type != "int" else (", symmetric" if self.symmetric else ", affine")
        outliers = "" if self.outlier_threshold is None else f", columns beyond {self.outlier_threshold:g} in 16 bit"
        return f"{self.grid_name.upper()} {where}{kind}{outliers}"


@dataclass(frozen=True)
class Scheme:
    """Which tensors of a model get a number format; None keeps the target in high precision (BF16).

    Attributes:
        name: the field's standard name, for example `W4A16`.
        weights: format of the linears' weights.
        input_activations: format of the linears' inputs.
        kv_keys, kv_values: formats of the KV cache's keys and values (set together).
        kv_residual_window: newest tokens of the KV cache that stay in high precision.
    """

    name: str
    weights: QuantSpec | None = None
    input_activations: QuantSpec | None = None
    kv_keys: QuantSpec | None = None
    kv_values: QuantSpec | None = None
    kv_residual_window: int = 0


def _weight_int(num_bits: int, group_size: int | None, symmetric: bool = True) -> QuantSpec:
    strategy: Strategy = "channel" if group_size is None else "group"
    return QuantSpec(num_bits=num_bits, strategy=strategy, group_size=group_size, symmetric=symmetric)


_FP8 = QuantSpec(num_bits=8, type="float", exponent_bits=4, strategy="channel")
_INT8_TOKEN = QuantSpec(num_bits=8, strategy="token", dynamic=True, scale_dtype="float32")
_FP8_TOKEN = QuantSpec(num_bits=8, type="float", exponent_bits=4, strategy="token", dynamic=True, scale_dtype="float32")
_INT8_STATIC = QuantSpec(num_bits=8, strategy="tensor", scale_dtype="float32")
_INT8_OUTLIERS = replace(_INT8_TOKEN, outlier_threshold=6.0)
_KV8 = QuantSpec(num_bits=8, strategy="token", dynamic=True)
_KVFP8 = QuantSpec(num_bits=8, type="float", exponent_bits=4, strategy="token", dynamic=True)
_KV4 = QuantSpec(num_bits=4, strategy="group", group_size=32, symmetric=False, dynamic=True)
_KV4_KEYS_PER_CHANNEL = QuantSpec(num_bits=4, strategy="channel", group_size=32, symmetric=False, dynamic=True)

SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("BF16"),
        Scheme("W8A16", weights=_weight_int(8, None)),
        Scheme("W8A16-G128", weights=_weight_int(8, 128)),
        Scheme("W4A16", weights=_weight_int(4, 128)),
        Scheme("W4A16-G32", weights=_weight_int(4, 32)),
        Scheme("W4A16-ASYM", weights=_weight_int(4, 128, symmetric=False)),
        Scheme("W4A16-CHANNEL", weights=_weight_int(4, None)),
        Scheme("W3A16", weights=_weight_int(3, 128)),
        Scheme("W3A16-ASYM", weights=_weight_int(3, 128, symmetric=False)),
        Scheme("W2A16", weights=_weight_int(2, 128)),
        Scheme("W2A16-ASYM", weights=_weight_int(2, 128, symmetric=False)),
        Scheme("NF4", weights=QuantSpec(num_bits=4, type="nf", strategy="group", group_size=64)),
        Scheme("MXFP4", weights=QuantSpec(4, "float", "group", group_size=32, exponent_bits=2, scale_dtype="e8m0")),
        Scheme(
            "NVFP4",
            weights=QuantSpec(4, "float", "group", group_size=16, exponent_bits=2, scale_dtype="float8_e4m3fn", global_scale=True),
        ),
        Scheme("FP8A16", weights=_FP8),
        Scheme("FP8", weights=_FP8, input_activations=_FP8_TOKEN),
        Scheme("FP8-TENSOR", weights=replace(_FP8, strategy="tensor"), input_activations=_FP8_TOKEN),
        Scheme(
            "FP8-BLOCK",
            weights=QuantSpec(8, "float", "block", block_shape=(128, 128), exponent_bits=4, scale_dtype="float32"),
            input_activations=_FP8_TOKEN,
        ),
        Scheme("FP8-E5M2", weights=QuantSpec(8, "float", "channel", exponent_bits=5)),
        Scheme("W8A8", weights=_weight_int(8, None), input_activations=_INT8_TOKEN),
        Scheme("W8A8-STATIC", weights=_weight_int(8, None), input_activations=_INT8_STATIC),
        Scheme("LLM-INT8", weights=_weight_int(8, None), input_activations=_INT8_OUTLIERS),
        Scheme("KV-INT8", kv_keys=_KV8, kv_values=_KV8),
        Scheme("KV-FP8", kv_keys=_KVFP8, kv_values=_KVFP8),
        Scheme("KV-INT4", kv_keys=_KV4, kv_values=_KV4, kv_residual_window=32),
        Scheme("KV-INT4-KIVI", kv_keys=_KV4_KEYS_PER_CHANNEL, kv_values=_KV4, kv_residual_window=32),
    )
}


def get_scheme(name: str) -> Scheme:
    """The preset of that name, upper or lower case.

    Raises:
        UsageError: no such preset.
    """
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        raise UsageError(f"unknown scheme '{name}'", f"choose one of {', '.join(SCHEMES)}")
    return scheme
