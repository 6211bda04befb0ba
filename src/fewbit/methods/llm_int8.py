"""LLM.int8() (Dettmers et al., arXiv 2208.07339): INT8 for all but the few input columns that carry outliers.

From some 6.7 billion parameters on, a few channels of the hidden state are a hundred times as large as all others, in every layer and for
every token. One INT8 scale per token must span them, and the other channels keep a handful of steps: W8A8 collapses. The paper splits the
product by columns of the input,

    O = { k : any |x[t, k]| > 6 }                      found anew for each input, at run time
    y = sum over k in O   x[:, k] W[:, k]^T            in 16 bit          about 0.1 % of the columns
      + s_x s_w (sum over k not in O   q_x q_w)        INT8, a scale per token and per output channel

Nothing is calibrated and nothing of it is in the weights: they are INT8 per channel, rounded to nearest, which at eight bits is as good as
any method. The threshold is part of the format of the inputs (`QuantSpec.outlier_threshold`, scheme LLM-INT8), and the kernels do the rest.
This file holds the definition that they are tested against. The weight's outlier columns are its dequantized INT8 ones, as in
bitsandbytes: what costs quality is the rounding of the outliers, not of the weights.
"""

from __future__ import annotations

import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize, fake_quantize, outlier_columns
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["llm_int8_matmul"]


def llm_int8_matmul(x: torch.Tensor, weight: QuantizedTensor, inputs: QuantSpec) -> torch.Tensor:
    """y = x W^T with the outlier columns of x apart, in float64: slow, and right.

    Args:
        x: [tokens, in], floating point.
        weight: [out, in], INT8.
        inputs: the format of x, with `outlier_threshold`.

    Returns:
        [tokens, out], float64.

    Raises:
        FormatError: `inputs` has no threshold.
    """
    if inputs.outlier_threshold is None:
        raise FormatError(f"{inputs} has no threshold for outliers", "set QuantSpec.outlier_threshold, 6.0 in the paper")
    outliers = outlier_columns(x, inputs.outlier_threshold)
    w = dequantize(weight).double()
    rest = fake_quantize(x.float().masked_fill(outliers, 0.0), inputs).double()
    return x[:, outliers].double() @ w[:, outliers].T + rest @ w.T
