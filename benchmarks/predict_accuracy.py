"""How far predictions for devices that were never seen are off: leave-one-device-out over published measurements.

For each device, the priors of its family are fitted without it; then the device's 16-bit decode time alone calibrates, and the 8-bit and
4-bit decode times are predicted and compared with the published ones. Beside it two baselines that use the same 16-bit time:

    byte ratio            t = t16 * bytes / bytes16
    constant overhead     t = t16 - (bytes16 - bytes) / (0.93 * bandwidth): what remains of the 16-bit step at 93 % of the bandwidth stays;
                          only where the bandwidth is known

    python benchmarks/predict_accuracy.py [--data FILE] [--devices] [--json FILE]
    python benchmarks/predict_accuracy.py --write-priors        # src/fewbit/predict/priors.toml from all devices

Batches are not in that file: what unpacking costs in them comes from `measurements/batched.csv` (`_batched.py`), printed after the tables.

Which rows count was decided before fitting (`_measurements.EXCLUDED_FLAGS`). The bars on discrete and Apple GPUs are over the main set
(`use_in_analysis` yes) of rows that state the size of their weights, one row per format; the sweeps over longer contexts, which are many
rows of few devices, and the rows without a size, whose bytes are guessed from nominal bits, are printed apart. No row of an integrated GPU
states a size. Intervals are checked on all of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from _bars import Bar, NotMeasuredError, add_arguments, run_bars
from _batched import BATCHED_RUNTIMES, fit_sources, unpack_prior
from _measurements import DATA, Group, read_groups

from fewbit.predict.calibration import Z90
from fewbit.predict.efficiency import FACTORS, Prior, prior_of
from fewbit.predict.fit import fit_prior, widened
from fewbit.predict.hardware import Kind

_PRIORS = Path(__file__).parents[1] / "src" / "fewbit" / "predict" / "priors.toml"
# Classes of device as the bars speak of them.
_CLASSES = {
    "gpu": "GPU",
    "nvidia_unified": "GPU",
    "amd_unified": "integrated",
    "intel_unified": "integrated",
    "apple": "Apple",
    "cpu": "CPU",
}
_SIZED = ("GPU", "Apple")
_SETS = ("main", "sweeps", "no size")
# A family with too few devices takes the prior of the one that is most like it, widened.
_RELATIVES = {"nvidia_unified": "gpu", "amd_unified": "intel_unified"}
# A Jetson's multiprocessors are those of the discrete GPUs of its generation: what differs is the memory beside them, and the launches.
_SAME_UNITS = {"nvidia_unified": ("compute", "native", "unpack")}
_LEAST_DEVICES_OF_A_RUNTIME = 3
_FAMILY_OF_KINDS: dict[str, tuple[Kind, ...]] = {
    "gpu": ("nvidia_datacenter", "nvidia_workstation", "nvidia_consumer", "amd_datacenter", "intel_datacenter"),
    "nvidia_unified": ("nvidia_unified",),
    "amd_unified": ("amd_unified",),
    "apple": ("apple",),
    "intel_unified": ("intel_unified",),
    "cpu": ("cpu",),
}
_SHARE_OF_BANDWIDTH = 0.93


@dataclass(frozen=True)
class Error:
    """One predicted row. `error` is the logarithm of predicted over measured; `inside`: the measured time lies in the 90 % interval."""

    group: Group
    row_id: str
    bits: int
    predicted_ms: float
    measured_ms: float
    inside: bool
    byte_ratio_ms: float
    constant_ms: float | None

    def percent(self, predicted: float | None = None) -> float:
        """Absolute error of the prediction, or of another one, in percent of the measured time."""
        return abs((predicted or self.predicted_ms) / self.measured_ms - 1) * 100


def family_prior(groups: Sequence[Group], family: str, runtime: str | None = None) -> Prior:
    """The prior of a family, fitted on these groups: on those of one runtime where enough devices ran it, else on all."""
    start = prior_of("unknown")
    relative = _RELATIVES.get(family)
    if relative is not None:
        start = widened(family_prior(groups, relative, runtime), _SAME_UNITS.get(family, ()))
    known = [g.observed for g in groups if g.observed.family == family and not g.sweep]
    same = [one for one in known if one.runtime == runtime]
    if len({one.device for one in same}) >= _LEAST_DEVICES_OF_A_RUNTIME:
        known = same
    prior = fit_prior(known, start)
    return unpack_prior(prior, runtime) if family == "gpu" and runtime in (None, *BATCHED_RUNTIMES) else prior


def leave_one_out(groups: Sequence[Group]) -> list[Error]:
    """Every device predicted with priors that were fitted without it."""
    errors = []
    for device in dict.fromkeys(group.observed.device for group in groups):
        others = [group for group in groups if group.observed.device != device]
        priors: dict[tuple[str, str], Prior] = {}
        for group in groups:
            if group.observed.device == device:
                key = (group.observed.family, group.observed.runtime)
                if key not in priors:
                    priors[key] = family_prior(others, *key)
                errors += _errors(group, priors[key])
    return errors


def _errors(group: Group, prior: Prior) -> Iterable[Error]:
    base = group.observed.baseline
    assert base.weight_bytes is not None
    for point, bits, row_id, prediction in zip(
        group.observed.others, group.observed.bits, group.row_ids[1:], group.observed.predict(prior), strict=True
    ):
        assert point.weight_bytes is not None
        saved = base.weight_bytes - point.weight_bytes
        per_ms = _SHARE_OF_BANDWIDTH * group.observed.hardware.bandwidth_gb_s * 1e6
        yield Error(
            group=group,
            row_id=row_id,
            bits=bits,
            predicted_ms=prediction.milliseconds.value,
            measured_ms=point.milliseconds,
            inside=prediction.milliseconds.low <= point.milliseconds <= prediction.milliseconds.high,
            byte_ratio_ms=base.milliseconds * point.weight_bytes / base.weight_bytes,
            constant_ms=base.milliseconds - saved / per_ms if group.known_bandwidth else None,
        )


def set_of(error: Error) -> str:
    """`main`, `sweeps` over longer contexts, or `no size`: a discrete or Apple GPU's row whose source does not state the bytes."""
    if error.group.sweep:
        return "sweeps"
    return "no size" if error.group.nominal and _CLASSES[error.group.observed.family] in _SIZED else "main"


def select(errors: Sequence[Error], device_class: str, bits: int, name: str = "main") -> list[Error]:
    """Rows of one class, width and set (`set_of`)."""
    return [e for e in errors if _CLASSES[e.group.observed.family] == device_class and e.bits == bits and set_of(e) == name]


def _figure(errors: Callable[[], list[Error]], device_class: str, bits: int, quantile: float) -> float:
    chosen = select(errors(), device_class, bits)
    if not chosen:
        raise NotMeasuredError(f"no {bits}-bit rows of {device_class} in the data")
    return float(np.quantile([e.percent() for e in chosen], quantile))


def _coverage(errors: Callable[[], list[Error]]) -> float:
    chosen = [e for e in errors() if e.bits in (8, 4)]
    return 100 * sum(e.inside for e in chosen) / len(chosen)


def print_tables(errors: Sequence[Error], *, devices: bool) -> None:
    """The distribution of errors per class and width, baselines beside it; per device with `devices`."""
    print("class       bits set     rows devices  median%   p90%  inside%   byte ratio%  constant overhead% (rows, ours there)")
    for device_class in dict.fromkeys(_CLASSES.values()):
        for bits in sorted({e.bits for e in errors}, reverse=True):
            for name in _SETS:
                chosen = select(errors, device_class, bits, name)
                if chosen:
                    print(_line(f"{device_class:11s} {bits:4d} {name:7s}", chosen))
    if devices:
        print("\nmedian of the signed error per device, percent (rows)")
        found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for e in errors:
            found[_CLASSES[e.group.observed.family], e.group.observed.device][e.bits].append(100 * (e.predicted_ms / e.measured_ms - 1))
        for (device_class, device), widths in sorted(found.items()):
            figures = "   ".join(
                f"{bits} bit {median(values):+.1f} ({len(values)})" for bits, values in sorted(widths.items(), reverse=True)
            )
            print(f"{device_class:11s} {device:36s} {figures}")


def print_batched() -> None:
    """What unpacking costs where a batch shares it, per source, and how well its rows are then reproduced."""
    print("\nbatches          kernel           device       unpack [90 %]        median% of packed rows")
    for one in fit_sources():
        low, high = (one.unpack * math.exp(sign * Z90 * one.log_sd) for sign in (-1, 1))
        error = 100 * (math.exp(median(one.errors)) - 1)
        share = f"{one.unpack:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{one.source:16s} {one.kernel:16s} {one.device:12s} {share:20s} {error:8.1f} ({len(one.errors)})")


def _line(name: str, chosen: Sequence[Error]) -> str:
    own = [e.percent() for e in chosen]
    constant = [e.percent(e.constant_ms) for e in chosen if e.constant_ms]
    inside = 100 * sum(e.inside for e in chosen) / len(chosen)
    devices = len({e.group.observed.device for e in chosen})
    there = [e.percent() for e in chosen if e.constant_ms]
    beside = f"{median(e.percent(e.byte_ratio_ms) for e in chosen):12.1f}  {median(constant) if constant else math.nan:18.1f}"
    beside += f" ({len(constant)}, {median(there):.1f})" if there else ""
    return f"{name} {len(chosen):5d} {devices:7d}  {median(own):7.1f}  {np.quantile(own, 0.9):5.1f}  {inside:7.0f}  {beside}"


def write_priors(groups: Sequence[Group]) -> None:
    """Write priors.toml: the default as it stands, every family and runtime fitted on all devices, the byte ratio."""
    text = _PRIORS.read_text(encoding="utf-8")
    mark = "# ---- fitted"
    head = text[: text.index(mark)] if mark in text else text[: text.index("# Decode times over")]
    parts = [head.rstrip() + f"\n\n{mark}: python benchmarks/predict_accuracy.py --write-priors\n", _byte_ratio(groups)]
    for family, kinds in _FAMILY_OF_KINDS.items():
        mine = [g.observed for g in groups if g.observed.family == family]
        named = {one.runtime: len({o.device for o in mine if o.runtime == one.runtime}) for one in mine}
        runtimes = [name for name, devices in sorted(named.items()) if devices >= _LEAST_DEVICES_OF_A_RUNTIME]
        runtimes = [*(runtimes if len(named) > 1 else []), *(BATCHED_RUNTIMES if family == "gpu" else ())]
        for runtime in [None, *runtimes]:
            prior = family_prior(groups, family, runtime)
            devices = named[runtime] if runtime in named else len({one.device for one in mine})
            rows = [f"{name} = [{getattr(prior.factors, name):.3g}, {prior.spread[i]:.3g}]" for i, name in enumerate(FACTORS)]
            source = f"{devices} devices of benchmarks/measurements{_of_relative(family)}{_of_batches(family, runtime)}"
            rows += [f"residual = {prior.residual:g}", f'source = "{source}"', ""]
            parts += ["\n".join([f'["{kind}{f"@{runtime}" if runtime else ""}"]', *rows]) for kind in kinds]
    _PRIORS.write_text("\n".join(parts), encoding="utf-8")


def _of_relative(family: str) -> str:
    return f", and {_RELATIVES[family]} widened" if family in _RELATIVES else ""


def _of_batches(family: str, runtime: str | None) -> str:
    return "; unpack of batched.csv" if "gpu" in (family, _RELATIVES.get(family)) and runtime in (None, *BATCHED_RUNTIMES) else ""


def _byte_ratio(groups: Sequence[Group]) -> str:
    """Quantiles of decode times over the estimate from nominal bytes alone."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        one, base = group.observed, group.observed.baseline
        assert base.weight_bytes is not None
        if group.known_bandwidth:
            ratios["uncalibrated_16"].append(base.milliseconds / (base.weight_bytes / (one.hardware.bandwidth_gb_s * 1e6)))
        for point, bits in zip(one.others, one.bits, strict=True):
            ratios[f"calibrated_{bits}"].append(point.milliseconds / (base.milliseconds * bits / 16))
    rows = [
        f"{name} = [{np.quantile(ratios[name], 0.05):.3g}, {np.quantile(ratios[name], 0.95):.3g}]"
        for name in ("uncalibrated_16", "calibrated_8", "calibrated_4")
    ]
    return "\n".join(
        [
            "# Decode times over the estimate from nominal bytes alone, [5 %, 95 %] of the published rows: of 16 bit over the data sheet's",
            "# bandwidth, and of fewer bits over the 16-bit time scaled by the bits.",
            "[byte_ratio]",
            rows[0],
            "calibrated_16 = [0.95, 1.05]",
            *rows[1:],
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help="measurements of the same form")
    parser.add_argument("--devices", action="store_true", help="also print the error of each device")
    parser.add_argument("--write-priors", action="store_true", help="fit on all devices and write the package's priors")
    options = parser.parse_args()
    if options.write_priors:
        write_priors(read_groups(options.data))
        return 0
    found: list[Error] = []

    def errors() -> list[Error]:
        if not found:
            found.extend(leave_one_out(read_groups(options.data)))
        return found

    bars = [
        Bar(f"{name}-{bits}-bit-{label}", partial(_figure, errors, device_class, bits, quantile), "<=", limit, "percent of decode time")
        for name, device_class, bits, label, quantile, limit in (
            ("gpu", "GPU", 8, "median", 0.5, 5.0),
            ("gpu", "GPU", 4, "median", 0.5, 9.0),
            ("gpu", "GPU", 8, "p90", 0.9, 12.0),
            ("gpu", "GPU", 4, "p90", 0.9, 20.0),
            ("apple", "Apple", 8, "median", 0.5, 3.0),
            ("apple", "Apple", 4, "median", 0.5, 5.0),
            ("integrated", "integrated", 8, "median", 0.5, 10.0),
            ("integrated", "integrated", 4, "median", 0.5, 20.0),
        )
    ]
    bars.append(Bar("interval-coverage-low", partial(_coverage, errors), ">=", 85.0, "percent inside the 90 % interval, all classes"))
    bars.append(Bar("interval-coverage-high", partial(_coverage, errors), "<=", 95.0, "percent inside the 90 % interval, all classes"))
    if not options.list:
        print_tables(errors(), devices=options.devices)
        print_batched()
        print()
    return run_bars(bars, list_only=options.list, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
