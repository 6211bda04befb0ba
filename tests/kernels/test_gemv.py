"""The switch between torch's two paths: when it is thrown, that it is thrown back, and that results agree."""

from __future__ import annotations

import pytest
import torch

from fewbit.kernels import gemv
from fewbit.kernels.gemv import single_token

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_has_avx512", lambda: True)


@pytest.mark.parametrize(("rows", "device", "onednn"), [(1, "cpu", False), (2, "cpu", True), (1, "meta", True)])
def test_only_a_single_token_on_the_cpu_leaves_onednn(rows: int, device: str, onednn: bool) -> None:
    with single_token(rows, torch.device(device)):
        assert torch.backends.mkldnn.enabled is onednn
    assert torch.backends.mkldnn.enabled


def test_cpus_without_avx512_keep_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_has_avx512", lambda: False)
    with single_token(1, CPU):
        assert torch.backends.mkldnn.enabled


def test_it_is_thrown_back_after_an_error_and_a_users_choice_stays() -> None:
    with pytest.raises(RuntimeError), single_token(1, CPU):
        raise RuntimeError
    assert torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with single_token(1, CPU):
            pass
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True


def test_both_paths_agree() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(1, 512, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    with single_token(1, CPU):
        y = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=0.1)
