"""RTN, round to nearest: the baseline that every other method has to beat.

    W_hat = scale * (nearest grid point of W / scale)

It looks at the weight alone, column by column independent, and needs no calibration data. At INT8 nothing better is needed; at four bits
and fewer the methods that look at the inputs (GPTQ, AWQ) earn their time. With observer `mse` the range of each group is shrunk to where
the squared error is least, and `importance` (mean square of each input channel) turns that into the error of the layer's output under the
assumption of uncorrelated inputs.
"""

from __future__ import annotations

import torch

from fewbit.formats.quantize import quantize
from fewbit.formats.scales import Observer, compute_scales
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["rtn"]


def rtn(weight: torch.Tensor, spec: QuantSpec, *, observer: Observer = "minmax", importance: torch.Tensor | None = None) -> QuantizedTensor:
    """Quantize one weight by rounding to nearest.

    Args:
        weight: [out, in], floating point; not changed.
        observer: how the scales are chosen, `minmax` or `mse`.
        importance: [in] or None, see `compute_scales`; only read by `mse`.

    Raises:
        FormatError: the weight or the importance does not fit the format.
    """
    scale, zero_point, global_scale = compute_scales(weight, spec, observer=observer, importance=importance)
    return quantize(weight, spec, scale=scale, zero_point=zero_point, global_scale=global_scale)
