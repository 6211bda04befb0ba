"""Number formats: what a number becomes when it gets few bits. Pure tensor functions.

    spec.py       QuantSpec, Scheme: the vocabulary, presets as data
    grids.py      the numbers each format can hold, rounding to them, who has them in hardware
    grouping.py   which values share a scale
    scales.py     how wide a step is: min-max or least squared error
    quantize.py   quantize, dequantize; dynamic formats for activations and KV
    tensor.py     QuantizedTensor, what the other layers exchange
    packing.py    dense bit packing
    cost.py       effective bits, bytes

A new format is one row in `grids.GRIDS` and, when its codes are not covered by a type there, one case in `encode_values` and
`decode_values`.
"""

from __future__ import annotations

from fewbit.formats.cost import effective_bits, packed_bytes, storage_bytes
from fewbit.formats.grids import GRIDS, Grid, get_grid
from fewbit.formats.packing import pack_bits, pack_values, unpack_bits, unpack_values
from fewbit.formats.quantize import dequantize, dequantize_dynamic, fake_quantize, quantize, quantize_dynamic
from fewbit.formats.scales import compute_scales
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
    "quantize",
    "quantize_dynamic",
    "storage_bytes",
    "unpack_bits",
    "unpack_values",
]
