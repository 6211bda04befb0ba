"""The plane of shares: each point has one name, and the thresholds lie where the documentation says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.bench.bound import name_bound

SHARE = st.floats(min_value=0, max_value=1.5)


@pytest.mark.parametrize(
    ("overhead", "bandwidth", "compute", "expected"),
    [
        (0.9, 0.1, 0.1, "overhead"),
        (0.5, 0.9, 0.1, "overhead"),
        (0.49, 0.5, 0.1, "bandwidth"),
        (0.1, 0.8, 0.05, "bandwidth"),
        (0.1, 0.2, 0.9, "compute"),
        (0.1, 0.2, 0.05, "compute"),  # an unfused kernel: neither the memory nor the GEMM is busy, but the cores are
        (0.1, 0.6, 0.9, "compute"),  # a prefill that streams and multiplies: the busier of the two names it
        (0.0, 1.1, 0.3, "bandwidth"),  # measured shares can exceed 1 a little
    ],
)
def test_names(overhead: float, bandwidth: float, compute: float, expected: str) -> None:
    assert name_bound(overhead_share=overhead, bandwidth_share=bandwidth, compute_share=compute) == expected


@given(overhead=SHARE, bandwidth=SHARE, compute=SHARE)
def test_overhead_wins_from_half_on_and_never_below(overhead: float, bandwidth: float, compute: float) -> None:
    bound = name_bound(overhead_share=overhead, bandwidth_share=bandwidth, compute_share=compute)
    assert (bound == "overhead") == (overhead >= 0.5)
    if bound == "bandwidth":
        assert bandwidth >= 0.5
