"""QuantizationConfig: which linear of a model gets which method. The vocabulary is vLLM's.

    config = QuantizationConfig(get_scheme("W4A16"))
    method = config.get_quant_method(layer, prefix="model.layers.0.mlp.up_proj")     # -> LinearMethod, or None: not a linear

Model code never branches on a format: it asks the configuration once, at load, and afterwards only calls the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fewbit.errors import UsageError
from fewbit.formats.scales import Observer
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.kernels.base import Compute
from fewbit.kernels.dispatch import UNFUSED
from fewbit.runtime.linear import KernelLinearMethod, LinearMethod, QuantLinear, UnquantizedLinearMethod

__all__ = ["HEAD_FORMATS", "QuantizationConfig", "compute_mode", "head_format"]

# What `--lm-head` understands, and the scheme whose weight format it is.
HEAD_FORMATS = {
    "int8": "W8A16",
    "int4": "W4A16",
    "int3": "W3A16",
    "int2": "W2A16",
    "fp8": "FP8A16",
    "nf4": "NF4",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}


def head_format(name: str | None) -> QuantSpec | None:
    """The format of the output head by its name; None for `bf16` and None.

    Raises:
        UsageError: no such format.
    """
    if name is None or name.lower() == "bf16":
        return None
    scheme = HEAD_FORMATS.get(name.lower())
    if scheme is None:
        raise UsageError(f"unknown format '{name}' of the output head", f"choose one of bf16, {', '.join(HEAD_FORMATS)}")
    return get_scheme(scheme).weights


def compute_mode(name: str) -> Compute:
    """The compute mode of that name.

    Raises:
        UsageError: no such mode.
    """
    if name == "exact":
        return "exact"
    if name == "int8-activations":
        return "int8-activations"
    raise UsageError(f"unknown compute mode '{name}'", "choose exact or int8-activations")


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model's linears are quantized and run.

    Attributes:
        scheme: the number formats.
        kernel: a kernel's name, or `unfused`, to pin the quantized linears to it; None for the fastest.
        strict: a fallback to an unfused kernel is an error when a fused one exists for the format.
        ignore: linears that stay in high precision: shell patterns on the dotted module name or on its last part.
        observer: how scales are chosen when a high-precision weight is quantized at load: `minmax` or `mse`.
        compute: `exact`, or `int8-activations` where a kernel has that mode (`KernelRequest`).
        lm_head: format of the output head's weight, whatever `ignore` says; None: as `ignore` says. A small model reads its head for half
            of a step's bytes, and peers keep it in 8 or 6 bits; quality figures of such a row contain what it costs.
    """

    scheme: Scheme
    kernel: str | None = None
    strict: bool = False
    ignore: tuple[str, ...] = ("lm_head",)
    observer: Observer = "minmax"
    compute: Compute = "exact"
    lm_head: QuantSpec | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any linear gets a format."""
        return self.scheme.weights is not None or self.lm_head is not None

    def is_head(self, prefix: str) -> bool:
        """Whether that linear is the output head and has a format of its own."""
        return self.lm_head is not None and prefix.rpartition(".")[2] == "lm_head"

    def is_ignored(self, prefix: str) -> bool:
        """Whether the linear of that dotted name stays in high precision."""
        last = prefix.rpartition(".")[2]
        return not self.is_head(prefix) and any(fnmatchcase(prefix, pattern) or fnmatchcase(last, pattern) for pattern in self.ignore)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """The method of one module; None when the module is not a linear.

        Args:
            layer: the module as the model defines it.
            prefix: its dotted name in the model.
        """
        if not isinstance(layer, torch.nn.Linear | QuantLinear):
            return None
        if self.is_head(prefix):
            # A pinned kernel is the body's and need not know the head's format; `unfused` means every linear.
            kernel = self.kernel if self.kernel == UNFUSED else None
            return KernelLinearMethod(self.lm_head, kernel=kernel, strict=self.strict, observer=self.observer, compute=self.compute)
        if self.scheme.weights is None or self.is_ignored(prefix):
            return UnquantizedLinearMethod()
        return KernelLinearMethod(
            self.scheme.weights,
            self.scheme.input_activations,
            kernel=self.kernel,
            strict=self.strict,
            observer=self.observer,
            compute=self.compute,
        )
