"""fewbit's layout in vLLM: an out-of-tree quantization method, found through the entry-point group `vllm.general_plugins`.

vLLM asks `FewbitVllmConfig.get_quant_method` for each linear; q, k and v are one linear there, gate and up another. The layout's tensors
have the weight's rows, so that vLLM's own loader puts the parts under each other, and cuts them for tensor parallelism, as it does with a
weight. After loading they become one QuantizedTensor, and fewbit's LinearMethod runs it on the kernel that fits.

Formats whose scale belongs to a whole tensor or a block (FP8 per tensor, blocks, NVFP4's second scale) are refused: vLLM runs them itself
from compressed-tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit.checkpoints.own import METHOD, is_ignored, parse_scheme, stored_shapes, stored_tensor
from fewbit.errors import UnsupportedModelError
from fewbit.formats.spec import Scheme
from fewbit.runtime.linear import KernelLinearMethod

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.utils import set_weight_attrs

    class FewbitVllmMethod(LinearMethodBase):  # type: ignore[misc]
        """One linear, by fewbit's own LinearMethod."""

        def __init__(self, scheme: Scheme) -> None:
            assert scheme.weights is not None
            self._spec = scheme.weights
            self._method = KernelLinearMethod(scheme.weights, scheme.input_activations)
            self._holder = nn.Module()  # of the packed tensors; one method serves one layer
            self._shape, self._dtype, self._loaded = (0, 0), torch.bfloat16, False

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: Any,
        ) -> None:
            rows, columns = sum(output_partition_sizes), input_size_per_partition
            for name, (shape, dtype) in stored_shapes(self._spec, rows, columns).items():
                parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
                dims = {"output_dim": 0} | ({"input_dim": 1} if shape[1] > 1 else {})
                set_weight_attrs(parameter, {**dims, **extra_weight_attrs})
                layer.register_parameter(name, parameter)
            self._shape, self._dtype = (rows, columns), params_dtype

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            if self._loaded:
                return
            rows, columns = self._shape
            tensors = {name: layer.get_parameter(name).detach() for name in stored_shapes(self._spec, rows, columns)}
            for name in tensors:
                delattr(layer, name)
            device = str(tensors["weight_codes"].device)
            self._method.create_weights(self._holder, columns, rows, self._dtype, device)
            self._method.load_weight(self._holder, stored_tensor(tensors, self._spec, columns))
            self._loaded = True

        def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return self._method.apply(self._holder, x, bias)

    class FewbitVllmConfig(QuantizationConfig):  # type: ignore[misc]
        """The `quantization_config` of config.json."""

        def __init__(self, scheme: Scheme, ignore: tuple[str, ...]) -> None:
            super().__init__()
            self._scheme, self._ignore = scheme, ignore

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls(_checked(parse_scheme(config, "config.json")), tuple(config.get("ignore") or ()))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            last = prefix.rpartition(".")[2]
            parts = [prefix.removesuffix(last) + part for part in self.packed_modules_mapping.get(last, [last])]
            ignored = {is_ignored(part, self._ignore) for part in parts}
            if len(ignored) > 1:
                raise UnsupportedModelError(f"of {', '.join(parts)}, which vLLM runs as one, only some are quantized")
            return UnquantizedLinearMethod() if ignored == {True} else FewbitVllmMethod(self._scheme)

    register_quantization_config(METHOD)(FewbitVllmConfig)


def _checked(scheme: Scheme) -> Scheme:
    """The scheme, if its tensors can be merged row by row.

    Raises:
        UnsupportedModelError: they cannot.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    if weights.strategy not in ("group", "channel") or weights.global_scale or (inputs is not None and not inputs.dynamic):
        raise UnsupportedModelError(
            f"fewbit's vLLM plugin has formats in groups and channels, not {scheme.name}", "fewbit convert --format compressed-tensors"
        )
    return scheme
