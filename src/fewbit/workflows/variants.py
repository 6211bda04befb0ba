"""The rows of `fewbit compare`: which scheme, on which kernel.

A variant is a scheme plus, where the point of the row is the kernel, the kernel it is pinned to: `int4-w4a16` and `int4-w4a16-unfused`
hold the very same integers and differ only in how the matmul runs. Every scheme of `formats.spec.SCHEMES` is also a variant under its own
name (`W3A16`, `mxfp4`, ...), on the fastest kernel there is for it, or on the unfused path with the suffix `-unfused`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.errors import UsageError
from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
from fewbit.kernels.base import Compute
from fewbit.results import VariantInfo
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format

__all__ = ["BASELINE", "DEFAULT_VARIANTS", "VARIANTS", "Variant", "parse_variants", "with_options"]

UNFUSED = "unfused"
_METHOD = "rtn"


@dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    Attributes:
        name: what the user types and what results are filed under.
        label: what a person reads.
        scheme: the number formats.
        kernel: None for the fastest, `unfused`, or a kernel's name.
        compute: what the kernels may do with the inputs, see `KernelRequest`.
        lm_head: name of the output head's format (`runtime.config.HEAD_FORMATS`); None for high precision.
    """

    name: str
    label: str
    scheme: Scheme
    kernel: str | None = None
    compute: Compute = "exact"
    lm_head: str | None = None

    @property
    def changes_linears(self) -> bool:
        """Whether the linears run another kernel than in BF16; KV-cache variants keep them as they are."""
        return self.scheme.weights is not None or self.lm_head is not None

    def quantization(self, *, strict: bool = False) -> QuantizationConfig:
        """How a model is loaded for this row."""
        return QuantizationConfig(self.scheme, kernel=self.kernel, strict=strict, compute=self.compute, lm_head=head_format(self.lm_head))

    def info(self) -> VariantInfo:
        """The row's description as it stands in a results file."""
        scheme = self.scheme
        cache = scheme.kv_keys
        window = f", newest {scheme.kv_residual_window} in BF16" if cache and scheme.kv_residual_window else ""
        return VariantInfo(
            name=self.name,
            label=self.label,
            scheme=scheme.name,
            weights=_describe(scheme.weights),
            input_activations=_describe(scheme.input_activations),
            kv_cache=_describe(cache) + window,
            method=_METHOD if scheme.weights else "none",
            bits_nominal=float(scheme.weights.num_bits) if scheme.weights else 16.0,
            compute=self.compute,
            lm_head="BF16" if self.lm_head is None else _describe(head_format(self.lm_head)),
        )


def _describe(spec: QuantSpec | None) -> str:
    return "BF16" if spec is None else f"{spec}{', dynamic' if spec.dynamic else ''}"


def _variant(name: str, label: str, scheme: str, kernel: str | None = None) -> Variant:
    return Variant(name, label, get_scheme(scheme), kernel)


BASELINE = _variant("bf16", "BF16", "BF16")
DEFAULT_VARIANTS: tuple[Variant, ...] = (
    BASELINE,
    _variant("int8-w8a16", "INT8 weights (W8A16)", "W8A16"),
    _variant("int4-w4a16", "INT4 g128 (W4A16)", "W4A16"),
    _variant("int4-w4a16-unfused", "INT4 g128, unfused", "W4A16", UNFUSED),
    _variant("nf4-unfused", "NF4 g64, unfused", "NF4", UNFUSED),
    _variant("fp8-w8a16", "FP8 weights (E4M3)", "FP8A16"),
    _variant("w8a8", "INT8 W8A8, dynamic", "W8A8"),
    _variant("kv-int8", "KV cache INT8", "KV-INT8"),
    _variant("kv-fp8", "KV cache FP8", "KV-FP8"),
    _variant("kv-int4", "KV cache INT4", "KV-INT4"),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in DEFAULT_VARIANTS}


def with_options(variant: Variant, *, compute: str = "exact", lm_head: str | None = None) -> Variant:
    """The same row in another compute mode and with another output head; rows whose weights stay in BF16 keep both as they are.

    Args:
        compute: `exact` or `int8-activations`.
        lm_head: a name of `runtime.config.HEAD_FORMATS`, `bf16` or None.

    Raises:
        UsageError: no such mode or format.
    """
    mode, head = compute_mode(compute), None if head_format(lm_head) is None else str(lm_head).lower()
    if variant.scheme.weights is None or (mode == "exact" and head is None):
        return variant
    additions = [*(["INT8 activations"] if mode != "exact" else []), *([f"{head.upper()} head"] if head else [])]
    return replace(variant, label=", ".join([variant.label, *additions]), compute=mode, lm_head=head)


def _by_scheme_name(name: str) -> Variant | None:
    base, unfused = (name[: -len("-unfused")], True) if name.endswith("-unfused") else (name, False)
    scheme = SCHEMES.get(base.upper())
    if scheme is None or (unfused and scheme.weights is None):
        return None
    label = f"{scheme.name}{', unfused' if unfused else ''}"
    return Variant(name.lower(), label, scheme, UNFUSED if unfused else None)


def parse_variants(names: str | None) -> tuple[Variant, ...]:
    """The variants of a comma-separated list, BF16 first; the default rows for None.

    Raises:
        UsageError: a name that is neither a row nor a scheme, or an empty list.
    """
    if names is None:
        return DEFAULT_VARIANTS
    chosen: dict[str, Variant] = {BASELINE.name: BASELINE}
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError("--variants is empty", f"name some of {', '.join(VARIANTS)}")
    for name in wanted:
        variant = VARIANTS.get(name) or _by_scheme_name(name)
        if variant is None:
            known = ", ".join(VARIANTS)
            raise UsageError(f"unknown variant '{name}'", f"choose from {known}, or a scheme: {', '.join(s.lower() for s in SCHEMES)}")
        chosen.setdefault(variant.name, variant)
    return tuple(chosen.values())
