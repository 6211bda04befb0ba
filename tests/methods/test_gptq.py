"""GPTQ against a direct transcription of the paper, its objective against the definition, and the edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats.quantize import dequantize
from fewbit.formats.scales import compute_scales
from fewbit.formats.spec import SCHEMES, QuantSpec
from fewbit.methods.gptq import GPTQSettings, gptq
from fewbit.methods.rtn import rtn
from fewbit.methods.statistics import InputStatistics

K = 256
INT4 = QuantSpec(4, strategy="group", group_size=64, scale_dtype="float32")
SPECS = {name: scheme.weights for name, scheme in SCHEMES.items() if scheme.weights is not None}


def inputs(tokens: int = 600, columns: int = K, seed: int = 0) -> torch.Tensor:
    """Correlated, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.rand(columns, generator=generator).mul(3).exp()
    return (torch.randn(tokens, columns, generator=generator) @ mixing) * sizes


def statistics(x: torch.Tensor, reference: torch.Tensor | None = None) -> InputStatistics:
    result = InputStatistics(x.shape[1], hessian=True, cross=reference is not None)
    for start in range(0, len(x), 250):
        result.update(x[start : start + 250], None if reference is None else reference[start : start + 250])
    return result


def weight(rows: int = 48, columns: int = K, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(w: torch.Tensor, w_hat: torch.Tensor, x: torch.Tensor) -> float:
    return float(((w - w_hat).double() @ x.double().T).square().sum()) / len(x)


def paper(w: torch.Tensor, x: torch.Tensor, spec: QuantSpec, order: torch.Tensor, dampening: float) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 with min-max scales of the original groups and the explicit inverse, in float64."""
    scale = compute_scales(w, spec)[0].double().repeat_interleave(spec.group_size or w.shape[1], 1)
    h = x.double().T @ x.double() / len(x)
    h.diagonal().add_(dampening * h.diagonal().mean())
    w, scale, h = w.double()[:, order].clone(), scale[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rounded = torch.empty_like(w)
    for i in range(w.shape[1]):
        low, high = -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1) - 1
        rounded[:, i] = (w[:, i] / scale[:, i]).round().clamp(low, high) * scale[:, i]
        error = (w[:, i] - rounded[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return rounded[:, torch.argsort(order)].float()


@pytest.mark.parametrize("actorder", ["none", "static"])
def test_it_is_the_papers_algorithm(actorder: str) -> None:
    x, w = inputs(), weight()
    order = torch.arange(K) if actorder == "none" else torch.argsort(x.square().sum(0), descending=True, stable=True)
    expected = paper(w, x, INT4, order, 0.01)
    (result,) = gptq([w], INT4, statistics(x), GPTQSettings(actorder=actorder, observer="minmax"))  # type: ignore[arg-type]
    different = (dequantize(result.quantized) != expected).float().mean()
    assert different < 0.01  # float32 against float64: a tie that falls the other way moves what follows
    assert output_error(w, dequantize(result.quantized), x) == pytest.approx(output_error(w, expected, x), rel=0.01)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("FP8-TENSOR",)])
@pytest.mark.parametrize("actorder", ["none", "static"])
def test_it_beats_rounding_to_nearest_in_every_format(name: str, actorder: str) -> None:
    spec, x, w = SPECS[name], inputs(), weight()
    (result,) = gptq([w], spec, statistics(x), GPTQSettings(actorder=actorder))  # type: ignore[arg-type]
    nearest = rtn(w, spec, observer="mse", importance=statistics(x).mean_square)
    assert result.quantized.spec == spec
    assert output_error(w, dequantize(result.quantized), x) < output_error(w, dequantize(nearest), x)


def test_the_objective_is_the_output_error_with_the_dampening() -> None:
    x, w = inputs(), weight()
    (result,) = gptq([w], INT4, statistics(x))
    error = w - dequantize(result.quantized)
    damping = 0.01 * float(x.square().mean(0).mean())
    assert result.objective == pytest.approx(
        output_error(w, dequantize(result.quantized), x) + damping * float(error.square().sum()), rel=1e-3
    )


def test_weights_that_share_an_input_come_out_as_if_alone() -> None:
    x, first, second = inputs(), weight(40), weight(24, seed=2)
    together = gptq([first, second], INT4, statistics(x))
    for w, result in zip((first, second), together, strict=True):
        (alone,) = gptq([w], INT4, statistics(x))
        assert torch.equal(alone.quantized.scale, result.quantized.scale)
        assert (alone.quantized.values != result.quantized.values).float().mean() < 0.01
        assert alone.objective == pytest.approx(result.objective, rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_dynamic_order_groups_columns_as_they_are_processed(num_bits: int, symmetric: bool) -> None:
    spec, x, w = dataclasses.replace(INT4, num_bits=num_bits, symmetric=symmetric), inputs(), weight()
    (result,) = gptq([w], spec, statistics(x), GPTQSettings(actorder="dynamic"))
    g_idx = result.quantized.g_idx
    assert g_idx is not None
    order = torch.argsort(x.square().sum(0), descending=True, stable=True)
    assert torch.equal(g_idx[order].long(), torch.arange(K) // 64)
    nearest = rtn(w, spec, observer="mse")
    assert output_error(w, dequantize(result.quantized), x) < output_error(w, dequantize(nearest), x)


def test_compensation_comes_closer_to_the_reference_output() -> None:
    reference, w = inputs(), weight()
    x = reference + 0.1 * inputs(seed=5) + 0.05 * reference.roll(1, dims=1)

    def distance(compensation: float) -> float:
        (result,) = gptq([w], INT4, statistics(x, reference), GPTQSettings(compensation=compensation))
        return float((reference @ w.T - x @ dequantize(result.quantized).T).square().sum())

    assert distance(1.0) < distance(0.5) < distance(0.0)


def test_without_any_difference_compensation_changes_nothing() -> None:
    x, w = inputs(), weight()
    (plain,) = gptq([w], INT4, statistics(x))
    (compensated,) = gptq([w], INT4, statistics(x, x), GPTQSettings(compensation=1.0))
    assert torch.equal(plain.quantized.values, compensated.quantized.values)


def test_columns_without_input_are_rounded_to_nearest() -> None:
    x, w = inputs(), weight()
    x[:, 10:20] = 0.0
    (result,) = gptq([w], INT4, statistics(x))
    assert result.dead_columns == 10
    scale = result.quantized.scale[:, 0:1]
    assert torch.equal(result.quantized.values[:, 10:20].float(), (w[:, 10:20] / scale).round().clamp(-8, 7))


def test_a_rank_deficient_hessian_is_dampened_until_it_factorizes() -> None:
    x, w = inputs(tokens=3), weight()
    (result,) = gptq([w], INT4, statistics(x), GPTQSettings(dampening=3e-7))
    assert 3e-7 < result.dampening <= 3e-5 * 1.01
    assert bool(dequantize(result.quantized).isfinite().all())


def test_inputs_of_zeros_leave_rounding_to_nearest() -> None:
    w = weight()
    (result,) = gptq([w], INT4, statistics(torch.zeros(50, K)), GPTQSettings(observer="minmax"))
    assert torch.equal(result.quantized.values, rtn(w, INT4).values)
    assert result.dead_columns == K


def test_weights_of_zeros_stay_zeros() -> None:
    (result,) = gptq([torch.zeros(8, K)], INT4, statistics(inputs()))
    assert not bool(dequantize(result.quantized).any())


def test_it_does_not_change_what_it_is_given() -> None:
    x, w = inputs(), weight()
    gathered = statistics(x, x)
    moments, before = gathered.moments, w.clone()
    assert moments is not None
    kept = moments.clone()
    gptq([w], INT4, gathered, GPTQSettings(compensation=1.0))
    assert torch.equal(w, before) and torch.equal(moments, kept)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"actorder": "random"}, "column order"),
        ({"dampening": 0.0}, "dampening"),
        ({"dampening": float("nan")}, "dampening"),
        ({"compensation": 2.0}, "compensation"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        GPTQSettings(**settings)  # type: ignore[arg-type]


def test_what_it_refuses() -> None:
    w = weight()
    with pytest.raises(FormatError, match="second moments"):
        gptq([w], INT4, InputStatistics(K))
    with pytest.raises(FormatError, match="second moments"):
        gptq([w], INT4, InputStatistics(K, hessian=True))
    with pytest.raises(FormatError, match="cross moments"):
        gptq([w], INT4, statistics(inputs()), GPTQSettings(compensation=1.0))
    with pytest.raises(FormatError, match="forms groups"):
        gptq([w], QuantSpec(8, strategy="channel"), statistics(inputs()), GPTQSettings(actorder="dynamic"))
    with pytest.raises(FormatError, match="columns"):
        gptq([weight(columns=128)], INT4, statistics(inputs()))
