"""Quantize and dequantize against compressed-tensors and gguf, and the properties that every format has."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.formats.cost import effective_bits, packed_bytes, storage_bytes
from fewbit.formats.grids import decode_values, get_grid
from fewbit.formats.packing import pack_bits, pack_values
from fewbit.formats.quantize import dequantize, dequantize_dynamic, fake_quantize, quantize, quantize_dynamic
from fewbit.formats.scales import SMALLEST_SCALE, compute_scales, round_scale, scale_as_float
from fewbit.formats.spec import SCHEMES, QuantSpec, ScaleDtype

WEIGHT_SPECS = {name: scheme.weights for name, scheme in SCHEMES.items() if scheme.weights is not None}
WEIGHT_SPECS["INT4 tensor"] = QuantSpec(4, strategy="tensor")
WEIGHT_SPECS["INT8 block, affine"] = QuantSpec(8, strategy="block", block_shape=(48, 80), symmetric=False)
DYNAMIC_SPECS = {
    "token": QuantSpec(8, strategy="token", dynamic=True),
    "token affine": QuantSpec(8, strategy="token", dynamic=True, symmetric=False, scale_dtype="float32"),
    "tensor": QuantSpec(8, strategy="tensor", dynamic=True, scale_dtype="float32"),
    "fp8 token": QuantSpec(8, "float", "token", dynamic=True, exponent_bits=4),
    "group": QuantSpec(4, strategy="group", group_size=32, dynamic=True, symmetric=False),
    "channel": QuantSpec(4, strategy="channel", group_size=32, dynamic=True, symmetric=False),
    "mxfp4": QuantSpec(4, "float", "group", group_size=32, dynamic=True, exponent_bits=2, scale_dtype="e8m0"),
}


def gaussian(rows: int = 192, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def steps_of(q: object, x: torch.Tensor) -> torch.Tensor:
    """The scale of each element, from the definition of the strategies and not through the code under test."""
    rows, columns = x.shape
    scale = scale_as_float(q.scale, q.spec, q.global_scale)  # type: ignore[attr-defined]
    tall, wide = q.spec.block_shape or (-(-rows // scale.shape[0]), -(-columns // scale.shape[1]))  # type: ignore[attr-defined]
    i, j = torch.meshgrid(torch.arange(rows) // tall, torch.arange(columns) // wide, indexing="ij")
    return scale[i, j]


@pytest.mark.parametrize("name", WEIGHT_SPECS)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_dequantized_weight_is_a_fixed_point_and_errs_at_most_half_a_step(name: str, observer: str) -> None:
    spec, weight = WEIGHT_SPECS[name], gaussian()
    scale, zero_point, global_scale = compute_scales(weight, spec, observer=observer)  # type: ignore[arg-type]
    q = quantize(weight, spec, scale=scale, zero_point=zero_point, global_scale=global_scale)
    back = dequantize(q)
    again = quantize(back, spec, scale=scale, zero_point=zero_point, global_scale=global_scale)
    assert torch.equal(dequantize(again), back)
    step = steps_of(q, weight)
    points = get_grid(spec.grid_name).code_points()
    half_gap = points.diff().max() / 2
    shift = (
        0.0
        if zero_point is None
        else steps_of(dataclasses.replace(q, scale=zero_point.float(), spec=dataclasses.replace(spec, scale_dtype="float32")), weight)
    )
    rim = 0.5 if spec.type == "int" else 0.0  # a value half a step beyond the last integer errs by half a step
    in_range = (weight / step + shift >= points[0] - rim) & (weight / step + shift <= points[-1] + rim)
    assert in_range.float().mean() > (0.95 if observer == "minmax" else 0.5)
    assert bool(((weight - back).abs() <= half_gap * step.abs() * (1 + 1e-5))[in_range].all())


@pytest.mark.parametrize("num_bits", [4, 3, 2])
def test_the_mse_observer_turns_a_symmetric_grid_over_when_the_positive_side_is_longer(num_bits: int) -> None:
    spec = QuantSpec(num_bits, strategy="channel", scale_dtype="float32")
    ends = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1)).float().repeat(4)  # every code, -8 to 7 at four bits
    scale, _, _ = compute_scales(torch.stack([ends, -ends]), spec, observer="mse")
    assert torch.allclose(scale.flatten(), torch.tensor([1.0, -1.0]))
    q = quantize(torch.stack([ends, -ends]), spec, scale=scale)
    assert torch.equal(dequantize(q), torch.stack([ends, -ends]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_bits", [8, 4, 3, 2])
def test_least_squares_scales_are_at_least_as_good_as_a_fine_series(num_bits: int, weighted: bool) -> None:
    spec, weight = QuantSpec(num_bits, strategy="group", group_size=64, scale_dtype="float32"), gaussian()
    importance = torch.rand(weight.shape[1]) + 0.1 if weighted else None
    scale, _, _ = compute_scales(weight, spec, observer="mse", importance=importance)

    def error(scales: torch.Tensor) -> torch.Tensor:
        difference = dequantize(quantize(weight, spec, scale=scales)) - weight
        squares = difference.square() if importance is None else difference.square() * importance
        return squares.view(weight.shape[0], -1, 64).sum(-1)

    minmax, _, _ = compute_scales(weight, spec)
    series = torch.stack([error(minmax * factor) for factor in torch.linspace(0.3, 1.0, 60)]).amin(0)
    assert bool((error(scale) <= error(minmax) * (1 + 1e-5)).all())
    assert error(scale).sum() <= series.sum() * 1.001


@pytest.mark.parametrize("num_bits", [8, 4, 3, 2])
def test_the_symmetric_integer_scale_errs_at_most_half_a_step_everywhere_with_an_exact_scale(num_bits: int) -> None:
    spec = QuantSpec(num_bits, strategy="channel", scale_dtype="float32")
    weight = gaussian()
    q = quantize(weight, spec)
    assert bool(((weight - dequantize(q)).abs() <= 0.5 * q.scale * (1 + 1e-4)).all())
    if num_bits <= 4:
        assert len(q.values.unique()) == 2**num_bits, "all codes are used, with two bits too"


def ct_args(spec: QuantSpec) -> object:
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    kwargs: dict[str, object] = {"num_bits": spec.num_bits, "type": spec.type, "strategy": spec.strategy, "symmetric": spec.symmetric}
    if spec.block_shape:
        kwargs["block_structure"] = list(spec.block_shape)
    return args(**kwargs, group_size=spec.group_size)


CT_NAMES = [
    "W8A16",
    "W8A16-G128",
    "W4A16",
    "W4A16-ASYM",
    "W4A16-CHANNEL",
    "W3A16",
    "W2A16",
    "W2A16-ASYM",
    "FP8A16",
    "FP8-BLOCK",
    "INT4 tensor",
]


@pytest.mark.parametrize("name", CT_NAMES)
def test_equals_compressed_tensors_given_equal_scales(name: str) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    spec, weight = WEIGHT_SPECS[name], gaussian(256)
    q = quantize(weight, spec)
    scale = q.scale.float()
    zero_point = torch.zeros_like(scale) if q.zero_point is None else q.zero_point.float()
    args = ct_args(spec)
    assert torch.equal(q.values.float(), forward.quantize(weight, scale, zero_point, args).float())
    assert torch.equal(dequantize(q), forward.dequantize(q.values.float(), scale, zero_point, args))
    assert torch.equal(dequantize(q), forward.fake_quantize(weight, scale, zero_point, args))


@pytest.mark.parametrize("name", ["W8A16", "W4A16", "W4A16-ASYM", "W3A16", "W2A16", "FP8A16"])
def test_the_scales_are_compressed_tensors(name: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    spec = dataclasses.replace(WEIGHT_SPECS[name], scale_dtype="float32")
    weight = gaussian()
    scale, zero_point, _ = compute_scales(weight, spec)
    groups = weight.view(*scale.shape, -1)
    expected, expected_zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), ct_args(spec))
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    if zero_point is not None:
        assert torch.equal(zero_point.int(), expected_zero.int())


def test_nvfp4_equals_compressed_tensors_given_equal_scales() -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args_class = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    weight = gaussian()
    q = quantize(weight, WEIGHT_SPECS["NVFP4"])
    assert q.global_scale is not None and float(q.scale.float().max()) == 448
    args = args_class(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    # compressed-tensors keeps the inverse of the global scale
    theirs = forward.fake_quantize(weight, q.scale.float(), torch.zeros_like(q.scale.float()), args, global_scale=1 / q.global_scale)
    torch.testing.assert_close(dequantize(q), theirs, rtol=1e-5, atol=0)


def test_mxfp4_scales_and_values_are_ggufs() -> None:
    quants, gguf = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf")
    weight = gaussian()
    q = quantize(weight, WEIGHT_SPECS["MXFP4"])
    blocks = quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4).reshape(-1, 17)
    np.testing.assert_array_equal(blocks[:, 0], q.scale.flatten().numpy())
    theirs = torch.from_numpy(quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)).view(weight.shape)
    # gguf breaks ties downwards; random weights have none
    assert torch.equal(dequantize(q), theirs)


@pytest.mark.parametrize(("layout", "num_bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_dequantization_is_ggufs_given_equal_scales(layout: str, num_bits: int) -> None:
    quants, gguf = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf")
    weight, kind = gaussian(), getattr(gguf.GGMLQuantizationType, layout)
    blocks = quants.quantize(weight.numpy(), kind).reshape(-1, 2 + 4 * num_bits)
    scale = torch.from_numpy(blocks[:, :2].copy().view(np.float16)).view(weight.shape[0], -1)
    spec = QuantSpec(num_bits, strategy="group", group_size=32, scale_dtype="float16")
    theirs = torch.from_numpy(quants.dequantize(blocks, kind)).view(weight.shape)
    if layout == "Q4_0":  # its scales carry a sign; ours are positive by construction, the arithmetic is the same
        scale, sign = scale.abs(), scale.sign().repeat_interleave(32, dim=1).float()
        assert torch.equal(dequantize(quantize(theirs * sign, spec, scale=scale)) * sign, theirs)
    else:
        assert torch.equal(dequantize(quantize(theirs, spec, scale=scale)), theirs)


def test_e8m0_scales_are_those_of_ml_dtypes_and_of_the_mx_equation() -> None:
    import ml_dtypes

    codes = torch.arange(255, dtype=torch.uint8)
    spec = WEIGHT_SPECS["MXFP4"]
    expected = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scale_as_float(codes, spec).numpy(), expected)
    for largest in (6.0, 4.0, 7.99, 8.0, 3.999, 1e-3, 2.0**-130):
        scale, _, _ = compute_scales(torch.full((1, 32), largest), spec)
        assert int(scale) == max(0, math.floor(math.log2(largest)) - 2 + 127), largest


@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_mse_is_never_worse_than_minmax_and_better_with_an_outlier(name: str) -> None:
    spec, weight = WEIGHT_SPECS[name], gaussian()
    weight[::7, 11] *= 12

    def error(observer: str) -> float:
        scale, zero_point, global_scale = compute_scales(weight, spec, observer=observer)  # type: ignore[arg-type]
        q = quantize(weight, spec, scale=scale, zero_point=zero_point, global_scale=global_scale)
        return float((dequantize(q).double() - weight).square().sum())

    assert error("mse") <= error("minmax") * (1 + 1e-6)
    if spec.type == "int" and spec.num_bits <= 4 and spec.block_shape is None:
        assert error("mse") < 0.97 * error("minmax")


def test_importance_moves_the_error_away_from_the_important_columns() -> None:
    spec, weight = QuantSpec(3, strategy="channel"), gaussian()
    important = torch.ones(256)
    important[:128] = 1000.0

    def error_on_important(importance: torch.Tensor | None) -> float:
        scale, _, _ = compute_scales(weight, spec, observer="mse", importance=importance)
        return float((dequantize(quantize(weight, spec, scale=scale)) - weight)[:, :128].square().sum())

    assert error_on_important(important) < error_on_important(None)
    with pytest.raises(FormatError, match="importance"):
        compute_scales(weight, spec, observer="mse", importance=torch.ones(3))


@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_zero_groups_tiny_groups_and_outlier_groups(name: str) -> None:
    spec = WEIGHT_SPECS[name]
    weight = gaussian(256)
    weight[:128] = 0.0
    weight[128:200] = 1e-42
    weight[201, 3] = 1e4
    q = quantize(weight, spec)
    back = dequantize(q)
    assert bool(back.isfinite().all())
    zeros = 96 if spec.block_shape == (48, 80) else 128  # its third row of blocks also holds other values
    assert not back[:zeros].any() and not decode_values(q.values[:zeros], spec).any()
    if q.global_scale is None and spec.scale_dtype != "float8_e4m3fn" and spec.strategy in ("channel", "group"):
        assert float(scale_as_float(q.scale, spec)[0, 0]) == 1.0
    assert float(back[201, 3]) == pytest.approx(1e4, rel=0.35)
    assert bool((back[201:].sign() * weight[201:].sign() >= 0).all())


@pytest.mark.parametrize("name", ["W4A16", "NF4", "FP8A16", "NVFP4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_their_place(name: str, bad: float) -> None:
    weight = gaussian()
    weight[5, 7] = weight[9, 1] = bad
    scale, zero_point, global_scale = compute_scales(gaussian(), WEIGHT_SPECS[name])
    for call in (
        lambda: quantize(weight, WEIGHT_SPECS[name]),
        lambda: quantize(weight, WEIGHT_SPECS[name], scale=scale, zero_point=zero_point, global_scale=global_scale),
    ):
        with pytest.raises(FormatError, match=r"2 NaN or infinite entries .* first at \[5, 7\]"):
            call()


def test_shapes_that_do_not_fit_are_refused_by_their_numbers() -> None:
    with pytest.raises(FormatError, match=r"group size 128 does not divide the 192 .*64"):
        quantize(torch.ones(4, 192), WEIGHT_SPECS["W4A16"])
    with pytest.raises(FormatError, match=r"\[4\]"):
        quantize(torch.ones(4), WEIGHT_SPECS["W8A16"])
    with pytest.raises(FormatError, match=r"shape \[4, 2\].*\[4, 1\]"):
        quantize(torch.ones(4, 256), WEIGHT_SPECS["W8A16"], scale=torch.ones(4, 2))
    with pytest.raises(FormatError, match="zero point"):
        quantize(torch.ones(4, 256), WEIGHT_SPECS["W4A16-ASYM"], scale=torch.ones(4, 2))
    with pytest.raises(FormatError, match="observer"):
        compute_scales(torch.ones(4, 256), WEIGHT_SPECS["W8A16"], observer="best")  # type: ignore[arg-type]


@given(st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8), st.sampled_from(sorted(WEIGHT_SPECS)))
@settings(max_examples=150, deadline=None)
def test_quantization_is_monotone_within_a_group(values: list[float], name: str) -> None:
    spec = WEIGHT_SPECS[name]
    row = torch.tensor(values).repeat(16).sort().values.unsqueeze(0)
    back = dequantize(quantize(row, spec))
    for group in back.split(spec.block_shape[1] if spec.block_shape else spec.group_size or 128, dim=1):
        assert bool((group.diff() >= 0).all())


def test_chunks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.formats import grouping

    weight = gaussian()
    for name in ("W4A16-ASYM", "NVFP4", "NF4", "FP8A16"):
        whole = quantize(weight, WEIGHT_SPECS[name])
        with monkeypatch.context() as patched:
            patched.setattr(grouping, "CHUNK_ELEMENTS", 1000)
            pieces = quantize(weight, WEIGHT_SPECS[name])
            assert torch.equal(dequantize(pieces), dequantize(whole))
        assert torch.equal(pieces.scale.float(), whole.scale.float())


@pytest.mark.parametrize("name", ["W4A16", "W4A16-ASYM", "NF4"])
def test_a_group_index_permutes_the_columns(name: str) -> None:
    spec, weight = WEIGHT_SPECS[name], gaussian()
    permutation = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    plain = dequantize(quantize(weight[:, permutation], spec))
    g_idx = torch.empty(256, dtype=torch.int32)
    g_idx[permutation] = torch.arange(256, dtype=torch.int32) // (spec.group_size or 1)
    q = quantize(weight, spec, g_idx=g_idx)
    assert torch.equal(dequantize(q)[:, permutation], plain)
    assert packed_bytes(q) == storage_bytes(spec, 192, 256, has_g_idx=True)
    with pytest.raises(FormatError, match="columns into each"):
        quantize(weight, spec, g_idx=torch.zeros(256, dtype=torch.int32))


def test_a_codebook_weight() -> None:
    spec, codebook = QuantSpec(4, "codebook", "channel"), torch.linspace(-2, 1, 16)
    weight = gaussian()
    q = quantize(weight, spec, codebook=codebook)
    expected = q.scale.float() * 2.0
    torch.testing.assert_close(expected, weight.abs().amax(1, keepdim=True), rtol=2**-8, atol=0)
    assert float((dequantize(q) - weight).norm() / weight.norm()) < 0.7
    assert effective_bits(q) == 8 * storage_bytes(spec, 192, 256) / weight.numel()


@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_effective_bits_are_the_packed_bytes(name: str) -> None:
    spec, weight = WEIGHT_SPECS[name], gaussian()
    q = quantize(weight, spec)
    stored = [pack_values(q.values, spec), q.scale]
    if q.zero_point is not None:
        stored.append(pack_bits((q.zero_point.flatten() & (2**spec.num_bits - 1)).view(torch.uint8), spec.num_bits))
    if q.global_scale is not None:
        stored.append(q.global_scale)
    total = sum(t.numel() * t.element_size() for t in stored)
    assert packed_bytes(q) == total == storage_bytes(spec, *weight.shape)
    assert effective_bits(q) == 8 * total / weight.numel()


@pytest.mark.parametrize(
    ("name", "bits"), [("W4A16", 4.125), ("W4A16-ASYM", 4.15625), ("NF4", 4.25), ("MXFP4", 4.25), ("W3A16", 3.125), ("W8A16-G128", 8.125)]
)
def test_effective_bits_of_the_literature(name: str, bits: float) -> None:
    assert effective_bits(quantize(gaussian(), WEIGHT_SPECS[name])) == bits


@pytest.mark.parametrize("scale_dtype", SMALLEST_SCALE)
def test_scales_saturate_at_both_ends_of_their_dtype(scale_dtype: ScaleDtype) -> None:
    spec = QuantSpec(8, scale_dtype=scale_dtype)
    low, high = scale_as_float(round_scale(torch.tensor([1e-45, 3e38]), scale_dtype), spec).tolist()
    assert low == SMALLEST_SCALE[scale_dtype]
    assert math.isfinite(high) and high > 400


@pytest.mark.parametrize("name", DYNAMIC_SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_quantization_has_the_documented_shapes_and_small_errors(name: str, dtype: torch.dtype) -> None:
    spec = DYNAMIC_SPECS[name]
    x = torch.randn(2, 64, 3, 96, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)  # strided, as keys and values are
    values, scale, zero_point = quantize_dynamic(x, spec)
    expected = {"token": (2, 3, 64, 1), "tensor": (1, 1, 1, 1), "group": (2, 3, 64, 3), "channel": (2, 3, 2, 96)}[spec.strategy]
    assert values.shape == x.shape and tuple(scale.shape) == expected
    assert (zero_point is None) == spec.symmetric and (zero_point is None or tuple(zero_point.shape) == expected)
    back = fake_quantize(x, spec)
    assert back.shape == x.shape and back.dtype == dtype
    error = float((back.double() - x.double()).norm() / x.double().norm())
    assert error < (0.012 if spec.num_bits == 8 and spec.type == "int" else 0.03 if spec.num_bits == 8 else 0.14), error
    assert torch.equal(dequantize_dynamic(values, scale, zero_point, spec, dtype), back)


def test_dynamic_per_token_equals_the_weight_path_per_row() -> None:
    spec = DYNAMIC_SPECS["token"]
    x = gaussian()
    values, scale, _ = quantize_dynamic(x, spec)
    q = quantize(x, spec)
    assert torch.equal(values, q.values) and torch.equal(scale, q.scale)


@pytest.mark.parametrize("name", DYNAMIC_SPECS)
def test_pieces_of_a_large_input_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fewbit.formats.quantize")  # the package's attribute of that name is the function
    x = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    whole = quantize_dynamic(x, DYNAMIC_SPECS[name])[0]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 500)
    assert torch.equal(quantize_dynamic(x, DYNAMIC_SPECS[name])[0].view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("name", DYNAMIC_SPECS)
def test_dynamic_zeros_come_back_as_zeros_and_a_nan_is_not_hidden(name: str) -> None:
    spec = DYNAMIC_SPECS[name]
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.0
    assert not fake_quantize(x, spec)[:, 0].any()
    if spec.scale_dtype != "e8m0":
        x[0, 1, 3, 5] = math.nan
        assert bool(fake_quantize(x, spec)[0, 1, 3, 5].isnan())


def test_dynamic_formats_that_make_no_sense_are_refused() -> None:
    x = torch.ones(2, 64)
    for spec in (QuantSpec(8, strategy="channel"), QuantSpec(8, strategy="block", block_shape=(2, 2)), WEIGHT_SPECS["NVFP4"]):
        with pytest.raises(FormatError):
            quantize_dynamic(x, spec)
    with pytest.raises(FormatError, match="group size 48 does not divide the 64"):
        quantize_dynamic(x, QuantSpec(4, strategy="group", group_size=48))


def test_affine_keeps_zero_exact() -> None:
    weight = gaussian().abs() + 0.3
    weight[:, ::5] = 0.0
    q = quantize(weight, WEIGHT_SPECS["W4A16-ASYM"])
    assert not dequantize(q)[:, ::5].any()
    assert int(decode_values(q.values, q.spec).min()) == -8
