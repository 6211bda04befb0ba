"""QuantLinear and the methods: what stays on the layer, what is refused, what is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.errors import FormatError, KernelError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import SCHEMES, get_scheme
from fewbit.methods.rtn import rtn
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.linear import KernelLinearMethod, QuantLinear, UnquantizedLinearMethod, kernel_uses

SHAPE = (64, 256)  # out, in


def make(
    scheme: str, *, shape: tuple[int, int] = SHAPE, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16, **options
) -> QuantLinear:
    config = QuantizationConfig(get_scheme(scheme), **options)
    method = config.get_quant_method(nn.Linear(1, 1), "model.layers.0.mlp.up_proj")
    assert method is not None
    return QuantLinear(shape[1], shape[0], method, bias=bias, dtype=dtype)


def weight(shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_forward_is_the_quantized_linear(scheme):
    bias = torch.randn(SHAPE[0]).bfloat16()
    layer = make(scheme, bias=bias)
    inputs, spec = SCHEMES[scheme].input_activations, SCHEMES[scheme].weights
    if inputs is not None and not inputs.dynamic:
        with pytest.raises(FormatError, match="calibrate"):
            layer.quant_method.load_weight(layer, weight())
        layer.quant_method.load_weight(layer, replace(rtn(weight(), spec), input_scale=torch.tensor([4 / 127.5])))
    else:
        layer.quant_method.load_weight(layer, weight())
    effective = weight().float() if spec is None else dequantize(rtn(weight(), spec))
    x = torch.randn(2, 3, SHAPE[1]).bfloat16()
    expected = torch.nn.functional.linear(x.float(), effective, bias.float())
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, SHAPE[0])
    tolerance = 0.05 if SCHEMES[scheme].input_activations else 0.01  # the inputs are quantized, too
    assert (y.float() - expected).norm() / expected.norm() < tolerance


def test_only_the_packed_weight_stays() -> None:
    layer = make("W4A16")
    assert layer.weight.is_meta  # nothing allocated before loading
    layer.quant_method.load_weight(layer, weight())
    assert not hasattr(layer, "weight") and not list(layer.parameters())
    packed = layer.quant_method.packed(layer)
    assert dict(layer.named_buffers()).keys() == packed.keys()
    assert sum(t.nbytes for t in packed.values()) <= 0.30 * 2 * SHAPE[0] * SHAPE[1]
    assert not layer.state_dict()  # packed tensors are no checkpoint


def test_three_ways_to_load_agree() -> None:
    online, ready, vllm = make("W4A16"), make("W4A16"), make("W4A16")
    online.quant_method.load_weight(online, weight())
    ready.quant_method.load_weight(ready, rtn(weight(), SCHEMES["W4A16"].weights))
    vllm.weight = nn.Parameter(weight(), requires_grad=False)
    vllm.quant_method.process_weights_after_loading(vllm)
    vllm.quant_method.process_weights_after_loading(vllm)  # a second call changes nothing
    x = torch.randn(3, SHAPE[1]).bfloat16()
    assert torch.equal(online(x), ready(x)) and torch.equal(online(x), vllm(x))


def test_observer_reaches_the_method() -> None:
    outlier = weight()
    outlier[:, 5] = 1.0
    minmax, mse = make("W4A16"), make("W4A16", observer="mse")
    for layer in (minmax, mse):
        layer.quant_method.load_weight(layer, outlier)
    x = torch.randn(64, SHAPE[1]).bfloat16()
    assert not torch.equal(minmax(x), mse(x))


def test_tied_weights_stay_tied() -> None:
    embedding = nn.Embedding(*SHAPE, dtype=torch.bfloat16)
    layer = make("BF16")
    layer.quant_method.load_weight(layer, embedding.weight)
    assert layer.quant_method.packed(layer)["weight"].data_ptr() == embedding.weight.data_ptr()


def test_wrong_shapes_and_formats() -> None:
    layer = make("W4A16")
    with pytest.raises(FormatError, match=r"\[64, 128\].*\[64, 256\]"):
        layer.quant_method.load_weight(layer, torch.zeros(64, 128))
    with pytest.raises(FormatError, match="96"):
        odd = make("W4A16", shape=(64, 96))
        odd.quant_method.load_weight(odd, torch.zeros(64, 96))
    plain = make("BF16")
    with pytest.raises(FormatError, match="high precision"):
        plain.quant_method.load_weight(plain, rtn(weight(), SCHEMES["W4A16"].weights))


def test_a_checkpoint_in_another_format_selects_again() -> None:
    layer = make("W4A16")
    assert layer.quant_method.selection.kernel.name == "cpu-int4-exact"
    layer.quant_method.load_weight(layer, rtn(weight(), SCHEMES["NF4"].weights))
    assert layer.quant_method.selection.kernel.name == "cpu-nf4"
    assert "nf4" in repr(layer).lower()


def test_ignore_patterns() -> None:
    config = QuantizationConfig(get_scheme("W4A16"), ignore=("lm_head", "*.layers.0.*", "gate_?roj"))
    linear = nn.Linear(2, 2)
    for prefix, ignored in [
        ("lm_head", True),
        ("model.lm_head", True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", False),
    ]:
        assert isinstance(config.get_quant_method(linear, prefix), UnquantizedLinearMethod) == ignored, prefix
    assert config.is_ignored("model.layers.1.mlp.gate_proj") and not config.is_ignored("model.layers.10.mlp.up_proj")
    assert config.get_quant_method(nn.LayerNorm(2), "norm") is None
    assert isinstance(QuantizationConfig(get_scheme("KV-INT8")).get_quant_method(linear, "a.b"), UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "x.y"), KernelLinearMethod)


def test_strict_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(KernelError, match=r"not torch\.float16"):
        make("W4A16", dtype=torch.float16, strict=True)


def test_kernel_uses_groups_by_kernel_and_reasons() -> None:
    model = nn.ModuleList(
        [make("W4A16"), make("W4A16"), make("W4A16", dtype=torch.float16), make("W4A16", kernel="unfused"), make("BF16"), nn.Linear(2, 2)]
    )
    uses = kernel_uses(model)
    assert [(use.kernel, use.linears) for use in uses] == [("cpu-int4-exact", 2), ("reference", 1), ("reference", 1), ("dense", 1)]
    assert uses[0].fused and uses[0].passed_over == []
    assert any("bfloat16 or float32, not torch.float16" in entry.reason for entry in uses[1].passed_over)
    assert all("not asked for" in entry.reason for entry in uses[2].passed_over)
