"""Number formats: what a number becomes when it gets few bits. Pure tensor functions.

    spec.py       QuantSpec, Scheme: the vocabulary, presets as data
    grids.py      the numbers each format can hold, rounding to them, who has them in hardware
    grouping.py   which values share a scale
    scales.py     how wide a step is: min-max or least squared error
    quantize.py   quantize, dequantize; dynamic formats for activations and KV
    tensor.py     QuantizedTensor, what the other layers exchange
    packing.py    dense bit packing
    sizes.py      bytes from shapes alone, without torch
    cost.py       bytes and effective bits of a quantized tensor

A new format is one row in `grids.GRIDS` and, when its codes are not covered by a type there, one case in `encode_values` and
`decode_values`.

The names below are imported when they are first used: `formats.spec` and `formats.sizes` need no torch, and `fewbit plan` does not wait
for it. `quantize` is the submodule here; the function is `fewbit.quantize`, or `quantize` in it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewbit.formats.cost import effective_bits, packed_bytes
    from fewbit.formats.grids import GRIDS, Grid, get_grid
    from fewbit.formats.packing import pack_bits, pack_values, unpack_bits, unpack_values
    from fewbit.formats.quantize import dequantize, dequantize_dynamic, fake_quantize, quantize_dynamic
    from fewbit.formats.scales import compute_scales
    from fewbit.formats.sizes import storage_bytes
    from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
    from fewbit.formats.tensor import QuantizedTensor

__all__ = [
    "GRIDS",
    "SCHEMES",
    "Grid",
    "QuantSpec",
    "QuantizedTensor",
    "Scheme",
    "compute_scales",
    "dequantize",
    "dequantize_dynamic",
    "effective_bits",
    "fake_quantize",
    "get_grid",
    "get_scheme",
    "pack_bits",
    "pack_values",
    "packed_bytes",
    "quantize_dynamic",
    "storage_bytes",
    "unpack_bits",
    "unpack_values",
]

_HOMES = {
    "GRIDS": "grids",
    "SCHEMES": "spec",
    "Grid": "grids",
    "QuantSpec": "spec",
    "QuantizedTensor": "tensor",
    "Scheme": "spec",
    "compute_scales": "scales",
    "dequantize": "quantize",
    "dequantize_dynamic": "quantize",
    "effective_bits": "cost",
    "fake_quantize": "quantize",
    "get_grid": "grids",
    "get_scheme": "spec",
    "pack_bits": "packing",
    "pack_values": "packing",
    "packed_bytes": "cost",
    "quantize_dynamic": "quantize",
    "storage_bytes": "sizes",
    "unpack_bits": "packing",
    "unpack_values": "packing",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fewbit.formats' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"fewbit.formats.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
