"""What a format costs in quality: measured where somebody measured it, else a stated prior with its source and its width.

The loss is the increase of perplexity over BF16 in percent. Weights and cache lose independently and little, so their losses add. A prior
is a lognormal through a median and a 95 % point (`quality_priors.toml`); a measurement is a normal distribution as wide as its interval, or
a point when none was given. The sum is taken on quantiles: with Q values of each, all Q x Q pairs are equally likely.

What follows for a decision is one number: the probability that the loss stays within the threshold. At or above `CONFIDENCE` a format
passes, at or below 1 - CONFIDENCE it fails, between them nobody knows until it is measured.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as frozen

from fewbit.decide.serving import format_class
from fewbit.errors import UsageError
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.predict.calibration import Z90
from fewbit.predict.prediction import Estimate

__all__ = ["CONFIDENCE", "MeasuredQuality", "Quality", "estimate_quality", "measured_from_perplexities", "parse_perplexities"]

CONFIDENCE = 0.8
_QUANTILES = 99
_SMALL_MODEL = 3e9
# What people call formats that have other names here.
_ALIASES = {"INT8": "W8A16", "INT4": "W4A16", "INT2": "W2A16", "FP16": "BF16", "SMOOTHQUANT": "W8A8", "AWQ": "W4A16", "GPTQ": "W4A16"}
_POINTS = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
_NORMAL = np.array([NormalDist().inv_cdf(float(p)) for p in _POINTS])


@dataclass(frozen=True)
class MeasuredQuality:
    """A measured loss of one scheme.

    Attributes:
        scheme: of weights or of the cache, a name of `formats.spec.SCHEMES`.
        loss_percent: increase of perplexity. low, high: its 95 % interval; None where none was given.
        source: for messages.
    """

    scheme: str
    loss_percent: float
    low: float | None = None
    high: float | None = None
    source: str = ""


@frozen(frozen=True, config=ConfigDict(extra="forbid"))
class Quality:
    """Loss of a candidate.

    Attributes:
        loss_percent: with its 90 % interval.
        probability: that the loss stays within the threshold.
        verdict: `pass`, `fail`, or `unknown` until it is measured.
        measured: weights and cache both were, where they are quantized.
        source: where the figures come from.
    """

    loss_percent: Estimate
    probability: float
    verdict: Literal["pass", "fail", "unknown"]
    measured: bool
    source: str


@cache
def _priors() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    return tomllib.loads(files("fewbit.decide").joinpath("quality_priors.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Part:
    values: NDArray[np.float64]
    measured: bool
    source: str


def _prior(table: str, name: str, parameters: float) -> _Part:
    row = _priors()[table].get(name)
    if row is None:
        raise UsageError(f"nothing is known of the quality of {name}", "measure it with fewbit compare and give the result")
    factor = row.get("small", 1.0) if parameters < _SMALL_MODEL else 1.0
    spread = math.log(row["high"] / row["median"]) / Z90
    return _Part(factor * row["median"] * np.exp(spread * _NORMAL), False, f"prior for {name}: {row['source']}")


def _measured(one: MeasuredQuality) -> _Part:
    if one.low is None or one.high is None:
        return _Part(np.full(_QUANTILES, one.loss_percent), True, f"measured {one.loss_percent:+.2f} %, no interval given; {one.source}")
    spread = (one.high - one.low) / 2 / 1.959964
    text = f"measured {one.loss_percent:+.2f} % [{one.low:+.2f}, {one.high:+.2f}]; {one.source}"
    return _Part(one.loss_percent + spread * _NORMAL, True, text)


def estimate_quality(
    scheme: Scheme, cache_scheme: Scheme | None, parameters: float, threshold_percent: float, measured: Sequence[MeasuredQuality] = ()
) -> Quality:
    """Loss of weights in one scheme with a cache in another.

    Args:
        parameters: of the model; small ones lose more.
        threshold_percent: loss that is allowed.
        measured: goes before priors; the last of a scheme counts.

    Raises:
        UsageError: a scheme without a prior that was not measured.
    """
    known = {one.scheme: one for one in measured}
    parts = []
    if scheme.weights is not None:
        found = known.get(scheme.name)
        parts.append(_measured(found) if found else _prior("weights", _prior_name(scheme), parameters))
    if cache_scheme is not None and cache_scheme.kv_keys is not None:
        found = known.get(cache_scheme.name)
        parts.append(_measured(found) if found else _prior("cache", cache_scheme.name.lower(), parameters))
    if not parts:
        return Quality(Estimate(0.0, 0.0, 0.0), 1.0, "pass", True, "nothing is quantized")
    total = parts[0].values
    for part in parts[1:]:
        total = (total[:, None] + part.values[None, :]).ravel()
    low, middle, high = (float(value) for value in np.quantile(total, (0.05, 0.5, 0.95)))
    probability = float(np.mean(total <= threshold_percent))
    verdict: Literal["pass", "fail", "unknown"] = (
        "pass" if probability >= CONFIDENCE else "fail" if probability <= 1 - CONFIDENCE else "unknown"
    )
    return Quality(Estimate(middle, low, high), probability, verdict, all(p.measured for p in parts), "; ".join(p.source for p in parts))


def _prior_name(scheme: Scheme) -> str:
    name = format_class(scheme)
    return "fp8" if name == "fp8-weights" else name


def resolve_scheme(name: str) -> str:
    """The name in `formats.spec.SCHEMES` of what people write: `int8`, `nf4`, `w4a16`.

    Raises:
        UsageError: nothing of that name.
    """
    wanted = name.strip().upper()
    return get_scheme(_ALIASES.get(wanted, wanted)).name


def parse_perplexities(text: str) -> dict[str, float]:
    """The schemes and perplexities of `bf16=12.4,int8=12.48,nf4=13.39`.

    Raises:
        UsageError: not of this form, an unknown format, a format twice, or a number that is no perplexity.
    """
    found: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        scheme = resolve_scheme(name) if equals else ""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not scheme or not math.isfinite(number) or number < 1.0:
            raise UsageError(f"'{part}' is no perplexity", "write for example bf16=12.4,int8=12.48; a perplexity is 1 or more")
        if scheme in found:
            raise UsageError(f"two perplexities for {scheme}", "give each format once")
        found[scheme] = number
    return found


def measured_from_perplexities(perplexities: Mapping[str, float], source: str = "given perplexities") -> list[MeasuredQuality]:
    """Losses from perplexities, which must contain BF16's.

    Raises:
        UsageError: BF16 is missing.
    """
    base = perplexities.get("BF16")
    if base is None:
        raise UsageError("perplexities without BF16's say nothing of a loss", "add bf16=... on the same text")
    return [
        MeasuredQuality(name, 100 * (value / base - 1), source=f"{source}: {value:g} against {base:g} in BF16")
        for name, value in perplexities.items()
        if name != "BF16"
    ]
