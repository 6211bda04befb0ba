"""QuantizedTensor: the one type that methods, checkpoints and kernels exchange.

Values are kept one per element, unpacked, so that every layer sees the same thing; dense packing is a matter of the place that stores them
(a checkpoint layout, a kernel's weight format). Layouts of values by `spec.type`:

    int        int8, in [-2**(b-1), 2**(b-1)-1], symmetric or affine (zero points live in the same signed range)
    float 8    torch.float8_e4m3fn or torch.float8_e5m2
    float 4    uint8 codes 0..15 (sign, 2 exponent bits, 1 mantissa bit)
    nf         uint8 indices into the NormalFloat table, ascending
    codebook   integer indices into `codebook`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbit.formats.spec import QuantSpec

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight of shape [out, in] (or any 2-D tensor).

    Attributes:
        values: one element per weight, shape [out, in], dtype by `spec.type` as in the module's header.
        scale: stored in `spec.scale_dtype` (`e8m0` as uint8 exponents, bias 127); shape by strategy: tensor [1, 1], channel and token
            [out, 1], group [out, in / group_size], block [ceil(out / rows), ceil(in / columns)].
        zero_point: int8, same shape as `scale`, when affine; else None.
        spec: the number format.
        g_idx: int32 [in], the group of each input column, when columns were quantized out of order; else None.
        global_scale: float32 [1], multiplies the block scales: x ~ value * (scale * global_scale); else None.
        codebook: the entries that indices point to, when `spec.type` is `codebook`.
        input_scale: float32 [1]: of a linear whose inputs have a static format, their scale (`formats.static`); else None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    spec: QuantSpec
    zero_point: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.values.shape[0], self.values.shape[1])
