"""The choice among torch's paths: when each is taken, that a switch is thrown back, and that results agree."""

from __future__ import annotations

import pytest
import torch

from fewbit.kernels import high_precision
from fewbit.kernels.high_precision import fastest_path, linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_precision, "_has_avx512", lambda: True)


@pytest.mark.parametrize(("rows", "device", "onednn"), [(1, "cpu", False), (2, "cpu", True), (1, "meta", True)])
def test_only_a_single_token_on_the_cpu_leaves_onednn(rows: int, device: str, onednn: bool) -> None:
    with fastest_path(rows, torch.device(device)):
        assert torch.backends.mkldnn.enabled is onednn
    assert torch.backends.mkldnn.enabled


def test_cpus_without_avx512_keep_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_precision, "_has_avx512", lambda: False)
    with fastest_path(1, CPU):
        assert torch.backends.mkldnn.enabled


def test_it_is_thrown_back_after_an_error_and_a_users_choice_stays() -> None:
    with pytest.raises(RuntimeError), fastest_path(1, CPU):
        raise RuntimeError
    assert torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with fastest_path(1, CPU):
            pass
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True


def test_both_paths_agree() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(1, 512, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    with fastest_path(1, CPU):
        y = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=0.1)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which F.linear was asked to multiply."""
    real, dtypes = torch.nn.functional.linear, []

    def spy(x: torch.Tensor, *arguments: torch.Tensor | None) -> torch.Tensor:
        dtypes.append(x.dtype)
        return real(x, *arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    return dtypes


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("rows", [31, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_rows_are_multiplied_in_fp32_only_where_16_bits_are_emulated(
    emulated: bool, rows: int, dtype: torch.dtype, multiplied: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    high_precision._is_emulated.cache_clear()
    monkeypatch.setattr(high_precision, "cpu_flags", lambda: frozenset({"avx512f"} if emulated else {"avx512_bf16", "avx512_fp16"}))
    with fastest_path(rows, CPU):
        linear(torch.ones(rows, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype))
    high_precision._is_emulated.cache_clear()
    assert multiplied == [torch.float32 if emulated and rows == 32 else dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((2, 40, 129), 9000), ((33, 64), 1), ((0, 64), 5), ((64, 1), 70)])
def test_tiles_in_fp32_round_once(
    dtype: torch.dtype, with_bias: bool, shape: tuple[int, ...], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(high_precision, "_is_emulated", lambda dtype: True)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).to(dtype) for size in (shape, (outputs, shape[-1])))
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    with fastest_path(64, CPU):
        y = linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == exact.shape and y.dtype == dtype
    # One rounding: half a unit in the last place, and sums in FP32 before it.
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-4).all()


def test_outside_of_measurements_it_is_torchs_own(multiplied: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_precision, "_is_emulated", lambda dtype: True)
    x, weight = torch.randn(64, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with fastest_path(64, CPU):
        pass
    linear(x, weight)
    assert multiplied == [torch.bfloat16]


def test_what_is_trained_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_precision, "_is_emulated", lambda dtype: True)
    x, weight = torch.ones(64, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with fastest_path(64, CPU):
        linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_infinities_and_nans_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_precision, "_is_emulated", lambda dtype: True)
    x = torch.ones(40, 8, dtype=torch.bfloat16)
    x[3, 2], x[5, 1] = float("nan"), float("inf")
    with fastest_path(40, CPU):
        y = linear(x, torch.ones(4, 8, dtype=torch.bfloat16))
    assert y[3].isnan().all() and y[5].isinf().all() and y[[0, 1, 2, 4, *range(6, 40)]].isfinite().all()
