"""Grids against ml_dtypes, torch's float8 casts, gguf and the NormalFloat construction of the QLoRA paper."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.formats.grids import GRIDS, NF4_VALUES, decode_values, encode_values, get_grid, round_to_grid, value_dtype
from fewbit.formats.spec import QuantSpec

FP8_E4M3 = QuantSpec(8, "float", exponent_bits=4)
FP8_E5M2 = QuantSpec(8, "float", exponent_bits=5)
FP4 = QuantSpec(4, "float", exponent_bits=2)
NF4 = QuantSpec(4, "nf")
INTS = [QuantSpec(b) for b in (8, 4, 3, 2)]
FLOATS = [(FP8_E4M3, ml_dtypes.float8_e4m3fn), (FP8_E5M2, ml_dtypes.float8_e5m2), (FP4, ml_dtypes.float4_e2m1fn)]
ALL = [*INTS, FP8_E4M3, FP8_E5M2, FP4, NF4]


@pytest.mark.parametrize(("spec", "reference"), FLOATS)
def test_every_code_of_a_float_has_the_value_that_ml_dtypes_gives_it(spec: QuantSpec, reference: type) -> None:
    codes = np.arange(2**spec.num_bits, dtype=np.uint8)
    expected = codes.view(reference).astype(np.float32)
    np.testing.assert_array_equal(np.array(get_grid(spec.grid_name).codes, dtype=np.float32), expected)
    stored = torch.from_numpy(codes).view(value_dtype(spec))
    np.testing.assert_array_equal(decode_values(stored, spec).numpy(), expected)
    info = ml_dtypes.finfo(reference)
    grid = get_grid(spec.grid_name)
    assert (grid.maximum, grid.smallest, grid.epsilon) == (float(info.max), float(info.smallest_subnormal), float(info.eps))


def interesting_floats(maximum: float) -> torch.Tensor:
    """Random values over all exponents, every midpoint between grid points and its neighbours in float32."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(20_000, generator=generator) * torch.exp2(torch.randint(-20, 17, (20_000,), generator=generator).float())
    random = random[random.abs() <= maximum]
    return torch.cat([random, torch.zeros(1), -torch.zeros(1)])


@pytest.mark.parametrize(("spec", "reference"), FLOATS)
def test_rounding_is_that_of_ml_dtypes_ties_and_subnormals_included(spec: QuantSpec, reference: type) -> None:
    grid = get_grid(spec.grid_name)
    points = grid.code_points()
    middles = (points[1:] + points[:-1]) / 2
    neighbours = torch.cat([torch.nextafter(middles, torch.tensor(math.inf)), torch.nextafter(middles, torch.tensor(-math.inf))])
    x = torch.cat([interesting_floats(grid.maximum), points, middles, neighbours])
    expected = x.numpy().astype(reference).view(np.uint8)
    if spec.num_bits == 4:
        expected = expected & 15
    np.testing.assert_array_equal(encode_values(x.clone(), spec).view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize("spec", [FP8_E4M3, FP8_E5M2])
def test_fp8_equals_torchs_cast_inside_the_range(spec: QuantSpec) -> None:
    x = interesting_floats(get_grid(spec.grid_name).maximum)
    assert torch.equal(encode_values(x.clone(), spec).view(torch.uint8), x.to(value_dtype(spec)).view(torch.uint8))


@pytest.mark.parametrize("spec", ALL)
def test_values_outside_the_range_saturate_and_never_become_infinite(spec: QuantSpec) -> None:
    grid = get_grid(spec.grid_name)
    far = torch.tensor([1e30, -1e30, grid.maximum * 1.01, math.inf, -math.inf])
    decoded = decode_values(encode_values(far, spec), spec)
    assert decoded.tolist() == [grid.maximum, grid.minimum, grid.maximum, grid.maximum, grid.minimum]


@pytest.mark.parametrize("spec", [FP8_E4M3, FP8_E5M2])
def test_nan_stays_nan_in_fp8(spec: QuantSpec) -> None:
    assert decode_values(encode_values(torch.tensor([math.nan]), spec), spec).isnan().all()


@pytest.mark.parametrize("spec", ALL)
def test_every_grid_point_is_a_fixed_point(spec: QuantSpec) -> None:
    points = get_grid(spec.grid_name).code_points()
    encoded = encode_values(points.clone(), spec)
    assert encoded.dtype == value_dtype(spec)
    assert torch.equal(decode_values(encoded, spec), points)
    for dtype in (torch.bfloat16, torch.float16):
        if spec.type != "nf":
            assert torch.equal(decode_values(encoded, spec, dtype=dtype).float(), points), f"{spec} is not exact in {dtype}"


@pytest.mark.parametrize("spec", ALL)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_rounding_goes_to_the_nearest_point_and_is_monotone(spec: QuantSpec, fractions: list[float]) -> None:
    grid = get_grid(spec.grid_name)
    x = (torch.tensor(fractions) * max(-grid.minimum, grid.maximum)).sort().values
    decoded = decode_values(encode_values(x.clone(), spec), spec)
    points = grid.code_points().double()
    nearest = (x.double().unsqueeze(-1) - points).abs().min(-1).values
    assert torch.equal((x.double() - decoded.double()).abs(), nearest)
    assert bool((decoded.diff() >= 0).all())


def test_nf4_is_the_papers_construction_from_normal_quantiles() -> None:
    """QLoRA, section 3: eight positive and seven negative quantiles, equally spaced in probability, a zero, scaled to [-1, 1]."""

    def quantile(p: torch.Tensor) -> torch.Tensor:
        return math.sqrt(2) * torch.erfinv(2 * p - 1)

    outermost = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = quantile(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -quantile(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))[:-1]
    derived = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    torch.testing.assert_close(torch.tensor(NF4_VALUES, dtype=torch.float64), derived / derived.max(), atol=2e-6, rtol=0)


def test_nf4_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    table = functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(torch.tensor(NF4_VALUES), table.float(), atol=1e-7, rtol=0)


def test_fp4_table_is_ggufs() -> None:
    quants = pytest.importorskip("gguf.quants")
    assert [2 * c for c in GRIDS["fp4_e2m1"].codes] == [float(v) for v in quants.MXFP4.kvalues]


def test_a_codebook_in_any_order_maps_to_its_nearest_entry() -> None:
    codebook = torch.tensor([3.0, -1.0, 0.25, 10.0])
    spec = QuantSpec(2, "codebook")
    x = torch.tensor([-50.0, 0.0, 1.0, 2.0, 6.0, 7.0])
    codes = encode_values(x.clone(), spec, codebook)
    assert codes.tolist() == [1, 2, 2, 0, 0, 3]
    assert decode_values(codes, spec, codebook).tolist() == [-1.0, 0.25, 0.25, 3.0, 3.0, 10.0]


@pytest.mark.parametrize("codebook", [None, torch.zeros(5), torch.zeros(2, 2), torch.zeros(1)])
def test_a_codebook_that_does_not_fit_is_refused(codebook: torch.Tensor | None) -> None:
    with pytest.raises(FormatError, match="codebook"):
        encode_values(torch.zeros(3), QuantSpec(2, "codebook"), codebook)


def test_unknown_grid_is_named() -> None:
    with pytest.raises(FormatError, match="int5"):
        get_grid("int5")


def test_every_format_names_its_sources() -> None:
    for grid in GRIDS.values():
        assert all(n.hardware and n.source for n in grid.native)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.grid_name)
def test_rounding_without_codes_is_encoding_and_decoding(spec: QuantSpec) -> None:
    points = GRIDS[spec.grid_name].code_points()
    middles = (points[1:] + points[:-1]) / 2
    inward, outward = torch.nextafter(middles, torch.zeros(())), torch.nextafter(middles, middles * 2)
    random = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * points[-1] / 2
    x = torch.cat([points, middles, inward, outward, random, 10 * random, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30])])
    assert torch.equal(round_to_grid(x.clone(), spec), decode_values(encode_values(x.clone(), spec), spec))
