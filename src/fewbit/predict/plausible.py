"""Whether a measured time can be true: no step is faster than its bytes over the bandwidth and its operations over the peak.

A time below that floor means that the device, the model, the format or the unit is another one than was said. It is not used, and the
answer says so. A time far above the floor is possible (a framework without fused kernels, a busy machine) and is used, with a warning.
"""

from __future__ import annotations

from fewbit.formats.spec import get_scheme
from fewbit.predict.efficiency import prior_of_device
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import Outline
from fewbit.predict.prediction import MeasuredPoint, MeasuredStep
from fewbit.predict.step import choose_path, step_time, step_work
from fewbit.results import Bound

__all__ = ["examine"]

_SLOW = 20.0  # times the floor, of a step that its launches do not explain
_TOLERANCE = 1.02  # figures are rounded


def examine(hardware: Hardware, outline: Outline, measured: MeasuredPoint) -> MeasuredStep:
    """What a measured step says of the device, and whether it can be used.

    Raises:
        UsageError: an unknown scheme or cache format, or sizes that are not positive.
    """
    point = measured.point
    path = choose_path(get_scheme(point.scheme), hardware, point.path)
    work = step_work(outline, point, path, weight_bytes=measured.weight_bytes)
    time = step_time(work, hardware, prior_of_device(hardware).factors)
    moved = sum(one.weight_bytes + one.cache_bytes for one in work)
    operations = sum(one.operations for one in work)
    seconds = measured.milliseconds / 1e3
    gb_s, tflop_s = moved / seconds / 1e9, operations / seconds / 1e12
    peak = hardware.dense_tflop_s.get(next((one.number_format for one in work if one.weight_bytes), "bf16"), hardware.dense_tflop_s["bf16"])
    launches = sum(one.operators for one in work) * prior_of_device(hardware).factors.operator_us / 1e3
    bound: Bound = "bandwidth" if gb_s / hardware.bandwidth_gb_s >= tflop_s / peak else "compute"
    if launches > 0.5 * measured.milliseconds:
        bound = "overhead"
    problem, used = "", True
    what = f"{point.scheme} {point.phase} in {measured.milliseconds:g} ms" + (f" ({measured.source})" if measured.source else "")
    if measured.milliseconds * _TOLERANCE < time.floor_milliseconds:
        used = False
        over_bandwidth = gb_s / hardware.bandwidth_gb_s >= tflop_s / peak
        rate = f"{gb_s:,.0f} GB/s, and {hardware.label} reads {hardware.bandwidth_gb_s:,.0f} GB/s"
        if not over_bandwidth:
            rate = f"{tflop_s:,.1f} TFLOP/s, and the dense peak of {hardware.label} is {peak:,.0f} TFLOP/s"
        problem = f"impossible: {what} would be {rate}; check device, model, format and unit; the point is not used"
    elif measured.milliseconds > _SLOW * (time.floor_milliseconds + launches):
        problem = (
            f"{what} is {measured.milliseconds / time.floor_milliseconds:,.0f} times the floor of bytes and operations; check the unit"
        )
    return MeasuredStep(
        measured=measured,
        operations=operations,
        bytes=moved,
        tflop_s=tflop_s,
        gb_s=gb_s,
        compute_share=tflop_s / peak,
        bandwidth_share=gb_s / hardware.bandwidth_gb_s,
        bound=bound,
        used=used,
        problem=problem,
    )
