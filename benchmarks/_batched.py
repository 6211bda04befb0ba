"""What unpacking costs inside fused kernels, from published times over batches (`measurements/batched.csv`, sources beside it).

A decode step of one sequence says nothing of it: the memory is slower, and unpacking hides behind it. As the batch grows, the weights are
read once and unpacked for every block of rows, and the time leaves the line of the bytes. For each source the factors of the model are
calibrated with all its rows at once, 16-bit ones included, from the prior of their class with a prior of `unpack` so wide that it says
nothing (`_WIDE`); what comes out is the device's own `unpack` with its uncertainty, which is large where all rows were bound by something
else.

Kernels of TensorRT-LLM 0.15 unpack at less than half of the speed of Marlin's, so a runtime of `BATCHED_RUNTIMES` has a prior of its own.
The family's prior is what the others, which `src/fewbit/decide/kernels.toml` tries first, say of the next kernel on the next device: with
log u_i ~ N(mu, tau^2) and a measured x_i ~ N(log u_i, s_i^2),

    p(mu, tau | x)  ~  half-normal(tau; TAU) prod_i N(x_i; mu, tau^2 + s_i^2),        predicted: N(mean of mu, var of mu + mean of tau^2)

on a grid (Gelman, "Prior distributions for variance parameters in hierarchical models", 2006). Three sources cannot tell tau; `TAU` is the
judgement that good kernels for one format differ by less than a factor of two.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewbit.formats.spec import get_scheme
from fewbit.models.inventory_sources import bare_inventory, read_inventory
from fewbit.predict.calibration import calibrate
from fewbit.predict.efficiency import FACTORS, Factors, Prior, prior_of
from fewbit.predict.hardware import Hardware, get_hardware
from fewbit.predict.outline import LinearGroup, Outline, outline_of
from fewbit.predict.prediction import StepPoint
from fewbit.predict.step import Work, choose_path, step_time, step_work

__all__ = ["BATCHED", "BATCHED_RUNTIMES", "TAU", "Fitted", "fit_sources", "unpack_prior"]

BATCHED = Path(__file__).parent / "measurements" / "batched.csv"
# bench.py of IST-DASLab/marlin, Llama13B: (in, out) of the joined linears of a block.
_MARLIN_13B = ((5120, 15360), (5120, 5120), (5120, 27136), (13568, 5120))
TAU = 0.35
_WIDE = 1.5
_RESIDUAL = 0.05  # tables over batches are rounded, and run at other clocks
BATCHED_RUNTIMES = ("tensorrt-llm",)
_AT = FACTORS.index("unpack")


@dataclass(frozen=True)
class Fitted:
    """One source.

    Attributes:
        unpack: most likely share of the vector rate. log_sd: of its logarithm.
        errors: |log(predicted / measured)| of its rows with packed weights.
    """

    source: str
    device: str
    runtime: str
    kernel: str
    unpack: float
    log_sd: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class _Row:
    """Steps with how often each happens, on a device, and the milliseconds that were measured."""

    hardware: Hardware
    steps: tuple[tuple[float, list[Work]], ...]
    milliseconds: float
    packed: bool

    def log_time(self, logs: NDArray[np.float64]) -> float:
        factors = Factors.from_logs(logs)
        return math.log(sum(times * step_time(work, self.hardware, factors).milliseconds for times, work in self.steps))


def _outline(model: str) -> Outline:
    if model != "marlin-bench-13b":
        return outline_of(read_inventory(model))
    groups = tuple(LinearGroup(f"linear_{n}", rows, columns, 1, 1, 1) for n, (columns, rows) in enumerate(_MARLIN_13B))
    return Outline(bare_inventory(sum(group.weights for group in groups)), groups, heads=0, depth=0)


def _row(row: dict[str, str], outline: Outline) -> _Row:
    hardware, scheme, batch = get_hardware(row["device"]), row["scheme"], int(row["batch"])
    path = choose_path(get_scheme(scheme), hardware, None if scheme in ("BF16", "FP8") else "fused")

    def work(phase: str, context: int) -> list[Work]:
        return step_work(outline, StepPoint("prefill" if phase == "prefill" else "decode", scheme, "BF16", batch, context, path), path)

    if row["what"] == "products":
        steps: tuple[tuple[float, list[Work]], ...] = ((1.0, [one for one in work("decode", 0) if one.weight_bytes]),)
    else:
        prompt, answer = int(row["prompt"]), int(row["new_tokens"])
        decode = work("decode", prompt + answer // 2)
        steps = ((1.0, decode),) if row["what"] == "step" else ((1.0, work("prefill", prompt)), (answer - 1.0, decode))
    return _Row(hardware, steps, float(row["ms"]), path == "fused")


@cache
def fit_sources(path: Path = BATCHED) -> tuple[Fitted, ...]:
    """`unpack` of every source of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    outlines = {model: _outline(model) for model in {row["model"] for row in rows}}
    sources: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        sources[row["source"]].append(row)
    return tuple(_fit(name, same, [_row(row, outlines[row["model"]]) for row in same]) for name, same in sources.items())


def _fit(name: str, texts: Sequence[dict[str, str]], rows: Sequence[_Row]) -> Fitted:
    start = prior_of(rows[0].hardware.kind)
    spread = start.spread.copy()
    spread[_AT] = _WIDE
    prior = replace(start, factors=replace(start.factors, unpack=1.0), spread=spread, residual=_RESIDUAL)
    found = calibrate(prior, [row.log_time for row in rows], [math.log(row.milliseconds) for row in rows])
    errors = tuple(abs(row.log_time(found.mean) - math.log(row.milliseconds)) for row in rows if row.packed)
    sd = math.sqrt(found.covariance[_AT, _AT])
    first = texts[0]
    return Fitted(name, first["device"], first["runtime"], first["kernel"], math.exp(found.mean[_AT]), sd, errors)


def unpack_prior(prior: Prior, runtime: str | None = None, path: Path = BATCHED) -> Prior:
    """The same prior with `unpack` as the sources predict it for another device; of one runtime of `BATCHED_RUNTIMES`, or in general."""
    sources = [one for one in fit_sources(path) if (one.runtime in BATCHED_RUNTIMES) == (runtime in BATCHED_RUNTIMES)]
    logs, sds = np.array([math.log(one.unpack) for one in sources]), np.array([one.log_sd for one in sources])
    mu, tau = np.meshgrid(np.linspace(-3, 3, 601), np.linspace(0.005, 2, 400), indexing="ij")
    variance = tau[..., None] ** 2 + sds**2
    log_density = -0.5 * (tau / TAU) ** 2 - 0.5 * (np.log(variance) + (logs - mu[..., None]) ** 2 / variance).sum(axis=-1)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    middle = float((weight * mu).sum())
    spread = prior.spread.copy()
    spread[_AT] = math.sqrt(float((weight * ((mu - middle) ** 2 + tau**2)).sum()))
    return replace(prior, factors=replace(prior.factors, unpack=math.exp(middle)), spread=spread)
