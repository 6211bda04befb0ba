"""A linear layer that knows nothing about formats, and the methods that do.

The interface is vLLM's (LinearMethodBase), so that what is learned here reads the same there:

    create_weights                  at construction: declare the high-precision weight, choose the kernel
    process_weights_after_loading   once the weight is there: quantize if need be, repack for the kernel, drop the original
    apply                           at every forward

`load_weight` joins the last two steps of loading for a loader that streams tensors: it takes one weight, high-precision or quantized
already, and leaves only the kernel's packed tensors on the layer, so that at most one linear is resident in high precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewbit.errors import FormatError
from fewbit.formats.scales import Observer
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.base import Compute, KernelRequest, PassedOver, Selection
from fewbit.kernels.dispatch import select
from fewbit.methods.rtn import rtn
from fewbit.results import KernelUse, PassedOverKernel

if TYPE_CHECKING:
    from fewbit._native import Linear

__all__ = ["KernelLinearMethod", "LinearMethod", "QuantLinear", "UnquantizedLinearMethod", "kernel_uses"]


class LinearMethod(ABC):
    """How one linear holds and applies its weight.

    Attributes:
        request: what the linear needs; set by `create_weights`.
        selection: the kernel that runs it and why no better one does; set by `create_weights`.
    """

    request: KernelRequest
    selection: Selection

    @abstractmethod
    def create_weights(self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: str = "cpu") -> None:
        """Declare `layer.weight` [out, in] on the meta device and choose the kernel.

        Raises:
            KernelError: no kernel can run this linear, or only a slow one and the method is strict.
        """

    @abstractmethod
    def load_weight(self, layer: nn.Module, weight: torch.Tensor | QuantizedTensor) -> None:
        """Quantize `weight` if need be and leave its packed form on the layer.

        Raises:
            FormatError: the shape or the format does not fit.
        """

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace `layer.weight`, filled by a loader, by its packed form. Does nothing when that has happened already."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out]."""

    @abstractmethod
    def packed(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors that the kernel keeps on the layer, by name; empty before loading."""

    def native(self, layer: nn.Module) -> Linear | None:
        """What the engine multiplies with, over the very tensors of `packed`; None when the kernel has no native form."""
        return None


class KernelLinearMethod(LinearMethod):
    """Runs a linear on the kernel that the dispatcher selects for its format.

    Args:
        weights: format of the weight; None for high precision.
        input_activations: format the inputs are quantized to at run time; None for high precision.
        kernel: a kernel's name or `unfused`; None for the fastest.
        strict: see `dispatch.select`.
        observer: how scales are chosen when a high-precision weight is loaded.
        compute: see `KernelRequest`.
    """

    def __init__(
        self,
        weights: QuantSpec | None,
        input_activations: QuantSpec | None = None,
        *,
        kernel: str | None = None,
        strict: bool = False,
        observer: Observer = "minmax",
        compute: Compute = "exact",
    ) -> None:
        self._weights = weights
        self._input_activations = input_activations
        self._kernel = kernel
        self._strict = strict
        self._observer: Observer = observer
        self._compute: Compute = compute
        self._packed_names: tuple[str, ...] = ()

    def create_weights(self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: str = "cpu") -> None:
        request = KernelRequest(self._weights, self._input_activations, out_features, in_features, device, dtype, compute=self._compute)
        self._select(request)
        weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def load_weight(self, layer: nn.Module, weight: torch.Tensor | QuantizedTensor) -> None:
        expected = (self.request.out_features, self.request.in_features)
        if tuple(weight.shape) != expected:
            raise FormatError(f"a weight of shape {list(weight.shape)} was given to a linear of shape {list(expected)}")
        if isinstance(weight, torch.Tensor) and self._weights is not None:
            weight = rtn(weight, self._weights, observer=self._observer)
        if isinstance(weight, QuantizedTensor):
            self._accept(weight)
        packed = self.selection.kernel.pack(weight, self.request)
        for name in ("weight", *self._packed_names):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, tensor in packed.items():
            layer.register_buffer(name, tensor, persistent=False)
        self._packed_names = tuple(packed)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not self._packed_names:
            self.load_weight(layer, layer.get_parameter("weight").detach())

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.selection.kernel.apply(x, self.packed(layer), bias, self.request)

    def packed(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        buffers = layer._buffers
        return {name: tensor for name in self._packed_names if (tensor := buffers[name]) is not None}

    def native(self, layer: nn.Module) -> Linear | None:
        return self.selection.kernel.native(self.packed(layer), self.request)

    def _select(self, request: KernelRequest) -> None:
        self.request = request
        self.selection = select(request, prefer=self._kernel, strict=self._strict)

    def _accept(self, weight: QuantizedTensor) -> None:
        """A checkpoint's tensor may differ from the plan in what only the file knows (column order, scale dtype): choose again for it."""
        if self._weights is None:
            raise FormatError(f"a weight in {weight.spec} was given to a linear that stays in high precision", "take it out of `ignore`")
        now = (weight.spec, weight.g_idx is not None)
        if now != (self.request.weights, self.request.has_g_idx):
            self._select(replace(self.request, weights=now[0], has_g_idx=now[1]))


class UnquantizedLinearMethod(KernelLinearMethod):
    """A linear in high precision: the same path, with no format."""

    def __init__(self) -> None:
        super().__init__(None)


class QuantLinear(nn.Module):
    """A linear layer, y = x @ W.T + bias, that calls its method and knows nothing else.

    Args:
        in_features, out_features: the weight's shape is [out_features, in_features].
        quant_method: holds and applies the weight; one object per layer.
        bias: [out_features] or None.
        dtype: of inputs, outputs and bias.
        device: where the packed weight lives.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_method: LinearMethod,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device=device, dtype=dtype), requires_grad=False)
        self.quant_method = quant_method
        quant_method.create_weights(self, in_features, out_features, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.quant_method.apply(self, x, self.bias)

    def extra_repr(self) -> str:
        method = self.quant_method
        weights = method.request.weights or method.request.dtype
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={weights}, kernel={method.selection.kernel.name}"


def kernel_uses(model: nn.Module) -> list[KernelUse]:
    """Which kernel runs how many of the model's QuantLinears, and why no better one does; the most used first.

    Linears count together when kernel and reasons are the same; a reason that names a shape therefore makes a row of its own.
    """
    counts: Counter[tuple[str, tuple[PassedOver, ...]]] = Counter()
    kernels = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            selection = module.quant_method.selection
            counts[(selection.kernel.name, selection.passed_over)] += 1
            kernels[selection.kernel.name] = selection.kernel
    return [
        KernelUse(
            kernel=name,
            description=kernels[name].description,
            fused=kernels[name].fused,
            linears=linears,
            passed_over=[PassedOverKernel(kernel=entry.kernel, reason=entry.reason) for entry in passed_over],
        )
        for (name, passed_over), linears in counts.most_common()
    ]
