"""fewbit's layout in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import fewbit`.

    before loading   each nn.Linear that is quantized on disk gives way to a holder with one empty parameter per stored tensor
    loading          transformers fills them as it fills any parameter, in the parameter's dtype, which is that of the disk
    after loading    each holder gives way to a QuantLinear whose LinearMethod takes the tensors and packs them for its kernel

`register` puts it into transformers' registry; `runtime.transformers_hook` calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.checkpoints.own import METHOD, is_ignored, parse_scheme, stored_shapes, stored_tensor
from fewbit.errors import UsageError
from fewbit.formats.spec import Scheme
from fewbit.runtime.linear import KernelLinearMethod, QuantLinear

__all__ = ["FewbitConfig", "FewbitQuantizer", "StoredLinear", "register"]


def register() -> None:
    """Into transformers' registry, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(FewbitConfig)
        register_quantizer(METHOD)(FewbitQuantizer)


class FewbitConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json, as transformers keeps it.

    Args:
        fields: `format_version`, `scheme` and `ignore` of the layout.

    Raises:
        CheckpointError, UnsupportedModelError: as `parse_scheme`.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = METHOD  # transformers' own methods are an enumeration, others' are names
        self.fields = {name: value for name, value in fields.items() if name != "quant_method"}
        self.scheme = parse_scheme(self.fields, "config.json")
        self.ignore = tuple(str(name) for name in self.fields.get("ignore") or ())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What transformers calls."""
        found = cls(**config_dict)
        return (found, kwargs) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        """As on disk."""
        return {"quant_method": METHOD, **self.fields}


class StoredLinear(nn.Module):
    """A linear's stored tensors, waiting to be filled.

    Args:
        linear: the one in the model. scheme: the checkpoint's.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        inputs = scheme.input_activations
        assert scheme.weights is not None
        self.weights = scheme.weights
        shapes = stored_shapes(
            scheme.weights, linear.out_features, linear.in_features, static_inputs=inputs is not None and not inputs.dynamic
        )
        for name, (shape, dtype) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        self.stored = tuple(shapes)
        self.bias = linear.bias

    def loaded(self, dtype: torch.dtype) -> QuantLinear:
        """The linear that runs."""
        tensors = {name: self.get_parameter(name).detach() for name in self.stored}
        method = KernelLinearMethod(self.scheme.weights, self.scheme.input_activations)
        bias = None if self.bias is None else self.bias.detach()
        device = str(tensors["weight_codes"].device)
        linear = QuantLinear(self.in_features, self.out_features, method, bias=bias, dtype=dtype, device=device)
        method.load_weight(linear, stored_tensor(tensors, self.weights, self.in_features))
        return linear


class FewbitQuantizer(HfQuantizer):
    """What `from_pretrained` calls before and after it loads the weights."""

    requires_calibration = True
    quantization_config: FewbitConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises UsageError for what is not written by fewbit already."""
        if not self.pre_quantized:
            raise UsageError("transformers loads fewbit's checkpoints and makes none", "fewbit quantize --format fewbit")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not is_ignored(name, self.quantization_config.ignore):
                model.set_submodule(name, StoredLinear(module, self.quantization_config.scheme))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dtype = next((p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "norm" in name), torch.bfloat16)
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                model.set_submodule(name, module.loaded(dtype))
        return model

    def is_serializable(self) -> bool:
        """No: the tensors are packed for a kernel by then."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False
