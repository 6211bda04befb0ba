"""What runs a format on a device: runtime, kernel, path, and what it falls back to. Data (`kernels.toml`), read here.

Fewer bits become speed only where a kernel reads them as they are. Whether one exists is a fact about software that changes with releases,
so it is a table with sources, one row per runtime, kernel and class of device, and not knowledge in code.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from fewbit.formats.spec import Scheme
from fewbit.predict.hardware import Hardware

__all__ = ["Serving", "cache_option", "format_class", "runtime_names", "serving_of", "serving_with_cache"]

Path = Literal["native", "fused", "unfused", "dense"]


@dataclass(frozen=True)
class Serving:
    """How a format runs on a device.

    Attributes:
        runtime, kernel: names. path: see `kernels.toml`. layout: of the checkpoint. source: where the support is documented.
        fallback: what runs where the kernel cannot; with its price.
        make: the command of the runtime's own tool that makes the checkpoint, with {model} and {out}; empty where fewbit makes it.
    """

    runtime: str
    kernel: str
    path: Path
    layout: str
    source: str
    fallback: str
    make: str = ""


def format_class(scheme: Scheme) -> str:
    """The name under which `kernels.toml` knows a scheme's weights and inputs.

    Weight-only integers are `w4a16`, `w8a16`, ... whatever their group; with quantized inputs `w8a8`, `fp8`.
    """
    spec, inputs = scheme.weights, scheme.input_activations
    if spec is None:
        return "bf16"
    if spec.grid_name == "fp4_e2m1":
        return "nvfp4" if spec.global_scale else "mxfp4"
    if spec.type == "nf":
        return "nf4"
    if spec.type == "float":
        return "fp8-weights" if inputs is None else "fp8"
    return f"w{spec.num_bits}a16" if inputs is None else f"w{spec.num_bits}a{inputs.num_bits}"


def runtime_names(hardware: Hardware) -> list[str]:
    """Runtimes that run 16-bit weights on a device, the first choice first."""
    return list(dict.fromkeys(row["runtime"] for row in _weight_rows("bf16", hardware)))


def _is(row: Mapping[str, Any], runtime: str) -> bool:
    """Whether a row is of a runtime, by its name with or without the remark in parentheses, in any case; of any for an empty one."""
    return runtime.lower() in ("", row["runtime"].lower(), row["runtime"].lower().partition(" (")[0])


def _weight_rows(name: str, hardware: Hardware, runtime: str = "") -> list[dict[str, Any]]:
    """Rows that run a class of formats on a device, the fastest first; native ones only where its matrix units multiply the format."""
    needs = {"fp8": "fp8", "w8a8": "int8", "nvfp4": "fp4", "mxfp4": "fp4"}.get(name)
    rows = [row for row in _table()["weights"] if _is(row, runtime) and _fits(row, name, hardware)]
    return [row for row in rows if row["path"] != "native" or needs is None or hardware.multiplies(needs)]


def serving_with_cache(scheme: Scheme, cached: Scheme | None, hardware: Hardware, runtime: str = "") -> tuple[Serving, str] | None:
    """What runs a scheme's linears beside a cache in another scheme's format, and the option that switches that on.

    One runtime must have both, so that with a quantized cache it may be another one than without. None: no such runtime is known.

    Args:
        runtime: the only one that may be used; any when empty.
    """
    if cached is None or cached.kv_keys is None:
        known = not runtime or _weight_rows(format_class(scheme), hardware, runtime)
        return (serving_of(scheme, hardware, runtime), "") if known else None
    cache_rows = [row for row in _table()["cache"] if _fits(row, _cache_class(cached), hardware)]
    for row in _weight_rows(format_class(scheme), hardware, runtime):
        option = next((one["option"] for one in cache_rows if one["runtime"] == row["runtime"]), None)
        if option is not None:
            fields = (row["runtime"], row["kernel"], row["path"], row["layout"], row["source"], "", row.get("make", ""))
            return Serving(*fields), option
    return None


def _cache_class(scheme: Scheme) -> str:
    assert scheme.kv_keys is not None
    return f"kv-{scheme.kv_keys.type if scheme.kv_keys.type == 'int' else 'fp'}{scheme.kv_keys.num_bits}"


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(files("fewbit.decide").joinpath("kernels.toml").read_text(encoding="utf-8"))


def _fits(row: Mapping[str, Any], name: str, hardware: Hardware) -> bool:
    kinds = row["kinds"]
    family = "nvidia" if hardware.kind.startswith("nvidia") else hardware.kind
    least, below = row.get("capability", (0.0, 99.0))
    capable = "capability" not in row or (hardware.capability is not None and least <= hardware.capability < below)
    return name in row["formats"] and family in kinds and capable


def serving_of(scheme: Scheme, hardware: Hardware, runtime: str = "") -> Serving:
    """What runs a scheme's linears on a device, in one runtime or in whichever does it best.

    A native row counts only where the device's matrix units multiply the format. Where no row fits, the weight is dequantized into a
    16-bit copy before each product, which any runtime can do and which is slower than BF16.
    """
    name = format_class(scheme)
    rows = _weight_rows(name, hardware, runtime)
    unfused = "a 16-bit copy before each product (unfused): slower than BF16"
    if not rows:
        return Serving("transformers", "dequantization before each product", "unfused", "compressed-tensors", "", unfused)
    first = rows[0]
    fallback = "" if name == "bf16" else f"{rows[1]['runtime']}: {rows[1]['kernel']} ({rows[1]['path']})" if len(rows) > 1 else unfused
    return Serving(first["runtime"], first["kernel"], first["path"], first["layout"], first["source"], fallback, first.get("make", ""))


def cache_option(scheme: Scheme, hardware: Hardware, runtime: str = "") -> tuple[str, str]:
    """(runtime, option) that switches a scheme's cache format on; two empty texts where no runtime is known to have it, or it is BF16.

    Args:
        runtime: preferred, when it has the format.
    """
    if scheme.kv_keys is None:
        return "", ""
    rows = [row for row in _table()["cache"] if _fits(row, _cache_class(scheme), hardware)]
    chosen = next((row for row in rows if runtime.startswith(row["runtime"])), rows[0] if rows else None)
    return (chosen["runtime"], chosen["option"]) if chosen else ("", "")
