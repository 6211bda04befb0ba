"""Schemes that exist for the servers' sake: formats that only a checkpoint can say, with scales that calibration fixes.

    FP8-STATIC    FP8 weights and inputs, one scale per tensor each, the inputs' fixed at calibration
    FP8-KV        FP8 weights per channel, inputs per token; the KV cache in FP8, calibrated scales for each layer's keys and values

`fewbit compare` measures formats as they run here, where scales of inputs and of the cache are computed from the values: FP8 and KV-FP8
are those rows. What a fixed scale costs beyond that is in the checkpoint's gate and in `fewbit evaluate DIR`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme

__all__ = ["SERVED", "checkpoint_scheme"]

_KV = QuantSpec(8, "float", "tensor", exponent_bits=4)
_FP8 = SCHEMES["FP8"]
_TENSOR = SCHEMES["FP8-TENSOR"]

SERVED: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "FP8-STATIC", weights=_TENSOR.weights, input_activations=QuantSpec(8, "float", "tensor", exponent_bits=4, scale_dtype="float32")
        ),
        Scheme("FP8-KV", weights=_FP8.weights, input_activations=_FP8.input_activations, kv_keys=_KV, kv_values=_KV),
    )
}


def checkpoint_scheme(name: str) -> Scheme:
    """The scheme of that name, of these or of the presets.

    Raises:
        UsageError: no such scheme.
    """
    found = SERVED.get(name.upper())
    return found if found is not None else get_scheme(name)
