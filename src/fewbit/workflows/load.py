"""`fewbit.load`: a model in any layout, ready to run in fewbit's runtime.

loaded = fewbit.load("quantized/w4a16-gptq")            # a directory, a GGUF file, a hub id
logits = loaded.model(input_ids).logits
loaded.kernel_uses                                      # which kernels run it, and why no faster ones do
"""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit.checkpoints.sources import open_source
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.kernels.base import Compute
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import LoadedModel, load_model

__all__ = ["load"]


def load(
    model: str | Path | None = None,
    *,
    scheme: str | Scheme | None = None,
    kernel: str | None = None,
    strict: bool = False,
    compute: Compute = "exact",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> LoadedModel:
    """Load a model as its checkpoint stores it.

    Args:
        model: a directory, a GGUF file or a hub id, in high precision or quantized in any layout that fewbit reads; the bundled
            reference model when None.
        scheme: of a model in high precision: quantize it while loading; of a quantized one: `BF16` to dequantize it.
        kernel, strict, compute: as in `runtime.config.QuantizationConfig`.
        dtype: of activations and of what stays in high precision.
        device: where it runs.

    Raises:
        UsageError: an unknown scheme, or one that would round a quantized checkpoint a second time.
        ModelError, CheckpointError, FormatError, KernelError: as `runtime.load.load_model`.
    """
    source = open_source(model)
    chosen = get_scheme(scheme) if isinstance(scheme, str) else scheme
    chosen = chosen or source.scheme or get_scheme("BF16")
    return load_model(source, QuantizationConfig(chosen, kernel=kernel, strict=strict, compute=compute), device=device, dtype=dtype)
