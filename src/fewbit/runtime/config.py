"""QuantizationConfig: which linear of a model gets which method. The vocabulary is vLLM's.

    config = QuantizationConfig(get_scheme("W4A16"))
    method = config.get_quant_method(layer, prefix="model.layers.0.mlp.up_proj")     # -> LinearMethod, or None: not a linear

Model code never branches on a format: it asks the configuration once, at load, and afterwards only calls the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fewbit.formats.scales import Observer
from fewbit.formats.spec import Scheme
from fewbit.kernels.base import Compute
from fewbit.runtime.linear import KernelLinearMethod, LinearMethod, QuantLinear, UnquantizedLinearMethod

__all__ = ["QuantizationConfig"]


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
    """

    scheme: Scheme
    kernel: str | None = None
    strict: bool = False
    ignore: tuple[str, ...] = ("lm_head",)
    observer: Observer = "minmax"
    compute: Compute = "exact"

    def is_ignored(self, prefix: str) -> bool:
        """Whether the linear of that dotted name stays in high precision."""
        last = prefix.rpartition(".")[2]
        return any(fnmatchcase(prefix, pattern) or fnmatchcase(last, pattern) for pattern in self.ignore)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """The method of one module; None when the module is not a linear.

        Args:
            layer: the module as the model defines it.
            prefix: its dotted name in the model.
        """
        if not isinstance(layer, torch.nn.Linear | QuantLinear):
            return None
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
