"""Names what bounds a phase, from three measured shares; nothing is assumed from the model's size or the format.

    overhead_share    time of a decode step with every linear and the cache emptied / time of the step
    bandwidth_share   bytes the step moves / time of the step / DRAM bandwidth measured on this machine in this run
    compute_share     operations of the step / time of the step / GEMM rate measured on this machine in this run

    overhead          at least half of the time remains when the linears are gone: no weight format can make the step twice as fast
    bandwidth         else, at least half of the memory bandwidth is used, and more of it than of the arithmetic
    compute           else: the memory waits while the cores execute instructions, be it the GEMM itself or unpacking and dequantizing

"compute" therefore does not say that the arithmetic units are used well: an unfused kernel that spends its time in dequantization is
bound by the instructions it executes although its compute_share, which counts only the GEMM's operations, is small. (The roofline
model: Williams, Waterman, Patterson, CACM 52(4), 2009; the overhead roof is what small batches add to it.)
"""

from __future__ import annotations

from fewbit.results import Bound

__all__ = ["BANDWIDTH_THRESHOLD", "OVERHEAD_THRESHOLD", "name_bound"]

OVERHEAD_THRESHOLD = 0.5
BANDWIDTH_THRESHOLD = 0.5


def name_bound(*, overhead_share: float, bandwidth_share: float, compute_share: float) -> Bound:
    """What bounds a phase with these shares, each a fraction of 1 (a measured share can exceed 1 a little)."""
    if overhead_share >= OVERHEAD_THRESHOLD:
        return "overhead"
    if bandwidth_share >= BANDWIDTH_THRESHOLD and bandwidth_share >= compute_share:
        return "bandwidth"
    return "compute"
