"""Static scales of an FP8 KV cache: one for the keys and one for the values of each layer.

    scale = largest |k| (after rotary embedding) that calibration saw / 448        stored BF16 [1] as `model.layers.N.self_attn.k_scale`

vLLM stores k / scale in FP8 E4M3 and multiplies again when it reads. FP8 is a float, so that a scale that is somewhat too large costs
little, and one that is too small saturates: the maximum is taken, no percentile. What the model's own attention writes into a cache is
what is measured, in high precision; the whole model is in memory for it, unlike the walk's one block.
"""

from __future__ import annotations

import re

import torch
from transformers import DynamicCache

from fewbit.checkpoints.sources import TensorSource
from fewbit.errors import UnsupportedModelError
from fewbit.formats.scales import scale_divisor
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model

__all__ = ["kv_scales", "needs_kv_scales"]

_ATTENTION = re.compile(r"(.*\.(\d+)\.self_attn)\.k_proj\.weight")


def needs_kv_scales(scheme: Scheme) -> bool:
    """Whether a scheme's KV cache has scales that calibration fixes."""
    return scheme.kv_keys is not None and not scheme.kv_keys.dynamic


@torch.inference_mode()
def kv_scales(source: TensorSource, scheme: Scheme, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scales by name.

    Args:
        source: the model in high precision.
        scheme: `kv_keys` and `kv_values` are static, per tensor.
        windows: int64 [samples, T], calibration text.

    Returns:
        BF16 [1] each.

    Raises:
        UnsupportedModelError: attention that is not called `self_attn` with a `k_proj`, or whose layers keep no keys.
    """
    assert scheme.kv_keys is not None and scheme.kv_values is not None
    prefixes = {int(found[2]): found[1] for name in source.names() if (found := _ATTENTION.fullmatch(name))}
    loaded = load_model(source, QuantizationConfig(get_scheme("BF16")))
    largest: dict[int, tuple[float, float]] = {}
    for window in windows:
        cache = DynamicCache(config=loaded.config)
        loaded.model(window[None], past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None:
                continue
            before = largest.get(index, (0.0, 0.0))
            largest[index] = (max(before[0], float(keys.abs().max())), max(before[1], float(values.abs().max())))
    if not prefixes or set(prefixes) != set(largest):
        raise UnsupportedModelError(
            f"'{source.describe()}' has {len(prefixes)} layers with a k_proj and {len(largest)} that cache keys: scales would be missing",
            "choose a scheme without a KV cache format",
        )
    scales = {}
    for index, prefix in prefixes.items():
        for part, spec, most in zip("kv", (scheme.kv_keys, scheme.kv_values), largest[index], strict=True):
            scales[f"{prefix}.{part}_scale"] = _scale(most, spec)
    return scales


def _scale(largest: float, spec: QuantSpec) -> torch.Tensor:
    """Rounded up to BF16, so that the largest value does not saturate."""
    exact = torch.tensor([max(largest, 1e-6) / scale_divisor(spec)])
    rounded = exact.to(torch.bfloat16)
    return torch.where(rounded.float() < exact, rounded * (1 + 2**-7), rounded).to(torch.bfloat16)
