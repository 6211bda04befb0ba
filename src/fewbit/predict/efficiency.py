"""What a data sheet does not say: how much of its rates a runtime reaches, and what each operator costs besides.

A step's time is predicted from a few factors, each with a prior for its class of device: a median and the spread in which a device's own
value lies (a standard deviation of the logarithm; 0.1 is ten percent). `calibration` narrows them with measured points. The priors are data
(`priors.toml`), with where each comes from.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewbit.predict.hardware import Hardware, Kind

__all__ = ["FACTORS", "MEMORY_LIMITED", "Factors", "Prior", "byte_ratio_errors", "known_runtimes", "prior_of", "prior_of_device"]


@dataclass(frozen=True)
class Factors:
    """Factors of one device and runtime.

    Attributes:
        memory: share of the bandwidth that reading 16-bit weights reaches.
        operator_us: microseconds that each operator costs besides its work: launch, synchronization, framework.
        read_8, read_4: speed of reading fused 8-bit and 4-bit weights, relative to 16-bit ones: what unpacking costs where memory limits.
        cache: share of the bandwidth that reading keys and values reaches.
        compute: share of the 16-bit peak that large products reach.
        native: the same of a low-precision peak, relative to `compute`.
        unpack: share of the vector rate that dequantizing inside a product reaches.
        copy: share of the bandwidth that separate passes over memory reach (dequantization into a copy, quantization of activations).
    """

    memory: float
    operator_us: float
    read_8: float
    read_4: float
    cache: float
    compute: float
    native: float
    unpack: float
    copy: float

    @classmethod
    def from_logs(cls, logs: NDArray[np.float64]) -> Factors:
        """The factors of a vector of logarithms in the order of `FACTORS`."""
        return cls(*(math.exp(value) for value in logs))

    def logs(self) -> NDArray[np.float64]:
        """The inverse."""
        return np.log([getattr(self, name) for name in FACTORS])


_BYTE_RATIO = "byte_ratio"
_MEASURED = "measured"  # the prior of a device whose kernels' rates were measured
_LEAST_OPERATOR_US = 0.01
# Correlation of the shares of the bandwidth that reading weights and reading the cache reach: the second is the first times how good the
# attention kernel is. With the spreads of discrete GPUs, 0.2 of the memory and 0.3 of both together, 0.2 / 0.3.
_SHARED = 2 / 3
FACTORS: tuple[str, ...] = tuple(f.name for f in fields(Factors))
# Devices whose 16-bit kernels wait for memory alone. CPUs convert 16-bit weights on the way; and of the published 8-bit and 4-bit rows of
# CPUs and integrated GPUs (133, `benchmarks/predict_accuracy.py`), six are faster than intervals allow that end at the 16-bit rows' speed.
MEMORY_LIMITED: frozenset[Kind] = frozenset(
    {"nvidia_datacenter", "nvidia_workstation", "nvidia_consumer", "nvidia_unified", "amd_datacenter", "intel_datacenter", "apple"}
)


@dataclass(frozen=True)
class Prior:
    """Factors before anything was measured.

    Attributes:
        factors: medians. spread: standard deviations of the logarithms, in the order of `FACTORS`.
        residual: standard deviation of what the model cannot explain even with the right factors; measurements have the same.
        source: where the figures come from.
    """

    factors: Factors
    spread: NDArray[np.float64]
    residual: float
    source: str

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Of the logarithms, [n, n]. Weights and cache come from one memory, so `memory` and `cache` err together (`_SHARED`), except
        where the cache is known better than the memory, because it was measured for itself."""
        covariance = np.diag(self.spread**2)
        memory, cached = FACTORS.index("memory"), FACTORS.index("cache")
        if self.spread[cached] >= self.spread[memory]:
            covariance[memory, cached] = covariance[cached, memory] = _SHARED * self.spread[memory] * self.spread[cached]
        return covariance


def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("fewbit.predict").joinpath("priors.toml").read_text(encoding="utf-8"))


def _read() -> Mapping[str, Prior]:
    table = _table()
    table.pop(_BYTE_RATIO)
    default = table["default"]
    priors = {}
    for kind, row in table.items():
        values = {name: row.get(name, default[name]) for name in FACTORS}
        priors[kind] = Prior(
            factors=Factors(**{name: value[0] for name, value in values.items()}),
            spread=np.array([values[name][1] for name in FACTORS], dtype=np.float64),
            residual=float(row.get("residual", default["residual"])),
            source=str(row.get("source", default["source"])),
        )
    return priors


_PRIORS = _read()


def prior_of(kind: Kind | Literal["unknown"], runtime: str | None = None) -> Prior:
    """The prior of a class of device, of one runtime where enough devices ran it; the widest of all for one that nothing is known of."""
    return _PRIORS.get(f"{kind}@{runtime}", _PRIORS.get(kind, _PRIORS["default"]))


def prior_of_device(hardware: Hardware, runtime: str | None = None) -> Prior:
    """The prior of a device: where its kernels' rates were measured, that the measurement holds; else its class's (`prior_of`)."""
    if hardware.rates is None:
        return prior_of(hardware.kind, runtime)
    prior = _PRIORS[_MEASURED]
    return replace(prior, factors=replace(prior.factors, operator_us=max(hardware.rates.operator_us, _LEAST_OPERATOR_US)))


def known_runtimes() -> tuple[str, ...]:
    """Runtimes that some class of device has a prior of its own for."""
    return tuple(sorted({name.partition("@")[2] for name in _PRIORS if "@" in name}))


@cache
def byte_ratio_errors(bits: int, *, calibrated: bool) -> tuple[float, float]:
    """What published decode times were over the estimate from bytes alone: 5 % and 95 % quantiles (`priors.toml`, table byte_ratio).

    Args:
        bits: of the weights; below 4, of which little is published, the 4-bit figures with the upper one doubled.
        calibrated: the estimate was scaled by a measured 16-bit time of the device.
    """
    table = _table()[_BYTE_RATIO]
    known = [16, 8, 4]
    row = next((width for width in known if bits >= width), 4)
    low, high = table[f"calibrated_{row}"]
    if bits < known[-1]:
        high *= 2.0
    if not calibrated:
        least, most = table["uncalibrated_16"]
        low, high = low * least, high * most
    return float(low), float(high)
