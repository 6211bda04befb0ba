"""The short name of a format of keys and values, as both engines' caches know it."""

from __future__ import annotations

from fewbit.formats.spec import QuantSpec

__all__ = ["kv_kind"]


def kv_kind(spec: QuantSpec | None) -> str | None:
    """`none`, `int8`, `fp8` or `int4`; None when no engine has such a cache."""
    if spec is None:
        return "none"
    if spec.scale_dtype != "bfloat16" or spec.global_scale:
        return None
    row = (spec.type, spec.num_bits, spec.exponent_bits, spec.strategy, spec.group_size, spec.symmetric)
    known = {
        ("int", 8, None, "token", None, True): "int8",
        ("float", 8, 4, "token", None, True): "fp8",
        ("int", 4, None, "group", 32, False): "int4",
    }
    return known.get(row)
