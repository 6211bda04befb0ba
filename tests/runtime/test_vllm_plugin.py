"""The vLLM plugin against vLLM's interface, stood in for by classes with the same names: q, k and v merged, ignored linears, refusals.

Against vLLM itself it is tested by tests/runtimes (`make test-runtimes`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.checkpoints.registry import get_layout
from fewbit.errors import UnsupportedModelError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import get_scheme
from fewbit.methods.rtn import rtn
from fewbit.runtime import vllm_plugin


class LinearBase(nn.Module):
    pass


class Base:
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self) -> None:
        self.packed_modules_mapping = {}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """The registered configuration class."""
    registered: dict[str, type[Any]] = {}

    def register_quantization_config(name: str) -> Any:
        return lambda kind: registered.setdefault(name, kind)

    def set_weight_attrs(parameter: nn.Parameter, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(parameter, name, value)

    layers = "vllm.model_executor.layers"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {"LinearBase": LinearBase, "LinearMethodBase": object, "UnquantizedLinearMethod": type("Plain", (), {})},
        f"{layers}.quantization": {"register_quantization_config": register_quantization_config},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Base},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin.register()
    yield registered["fewbit"]


def fields(scheme: str, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    return get_layout("fewbit").config_fields(get_scheme(scheme), ignore)


@pytest.mark.parametrize("scheme", ["NF4", "W3A16-ASYM", "W2A16", "W8A8", "FP8"])
def test_merged_linears_compute_what_the_dequantized_weights_do(config: type[Any], scheme: str) -> None:
    quantization = config.from_config(fields(scheme))
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    method = quantization.get_quant_method(LinearBase(), "model.layers.0.self_attn.qkv_proj")
    layer, sizes = LinearBase(), [256, 64, 64]
    method.create_weights(layer, 128, sizes, 128, sum(sizes), torch.float32, weight_loader=None)
    generator, first, parts = torch.Generator().manual_seed(0), 0, []
    spec = get_scheme(scheme).weights
    assert spec is not None
    for size in sizes:
        q = rtn(torch.randn(size, 128, generator=generator), spec)
        parts.append(dequantize(q))
        for name, tensor in get_layout("fewbit").write_linear("p", q, get_scheme(scheme)).items():
            parameter = layer.get_parameter(name.removeprefix("p."))
            assert parameter.output_dim == 0 and parameter.dtype == tensor.dtype
            parameter.data.narrow(0, first, size).copy_(tensor)  # as vLLM's weight_loader does
        first += size
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)  # vLLM may call it again
    assert not list(layer.parameters())
    x = torch.randint(0, 2, (5, 128), generator=generator).float() * 2 - 1
    bias = torch.randn(sum(sizes), generator=generator)
    weight = torch.cat(parts)
    roundings = 2.0**-10 if get_scheme(scheme).input_activations is None else 2.0**-5  # kernels for 8-bit inputs may answer in BF16
    difference = (method.apply(layer, x, bias) - (x @ weight.T + bias)).abs()
    assert bool((difference <= roundings * weight.norm(dim=1)).all())


def test_ignored_linears_stay_and_half_ignored_ones_are_refused(config: type[Any]) -> None:
    quantization = config.from_config(fields("NF4", ("lm_head", "model.layers.0.mlp.gate_proj")))
    quantization.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert type(quantization.get_quant_method(LinearBase(), "lm_head")).__name__ == "Plain"
    assert quantization.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(UnsupportedModelError, match="only some"):
        quantization.get_quant_method(LinearBase(), "model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize("scheme", ["FP8-TENSOR", "FP8-BLOCK", "NVFP4", "W8A8-STATIC"])
def test_scales_that_belong_to_no_row_are_refused(config: type[Any], scheme: str) -> None:
    with pytest.raises(UnsupportedModelError, match="compressed-tensors"):
        config.from_config(fields(scheme))
