"""What a CPU's kernels and fewbit's engine reach on a machine, measured with the very kernels that run (`fewbit bench --machine`)."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN

__all__ = ["AttentionRate", "EngineRates", "KernelRate"]


@dataclass(frozen=True, config=FROZEN)
class KernelRate:
    """How fast one of fewbit's CPU kernels multiplies, the weights coming from memory.

    Attributes:
        scheme: a preset of `formats.spec.SCHEMES`. compute: `exact` or `int8-activations`. kernel: its name.
        bits: that a weight takes, scales included. columns: input features of the weights.
        tokens: rows of the inputs, ascending. ps_per_weight: picoseconds of a product over the weights, for each number of tokens.
    """

    scheme: str
    compute: str
    kernel: str
    bits: float
    columns: int
    tokens: list[int]
    ps_per_weight: list[float]


@dataclass(frozen=True, config=FROZEN)
class AttentionRate:
    """How long the engine's attention takes.

    Attributes:
        phase: `decode` or `prefill`. cache: `BF16` or the preset of the cache's format.
        head_dim: of keys and values. group: query heads that share a key head.
        ns: nanoseconds for each cached token and key head (decode), or for each pair of a new token and one that it sees (prefill).
    """

    phase: str
    cache: str
    head_dim: int
    group: int
    ns: float


@dataclass(frozen=True, config=FROZEN)
class EngineRates:
    """What the engine and its kernels reach on this machine.

    Attributes:
        read_bandwidth_gb_s: of the memory while this was measured. threads: that were used.
        kernels, attention: rates, see there.
        operator_us: microseconds per operator of a step besides its work. ns_per_activation: nanoseconds for each number that goes into or
            comes out of a product (norms, activation functions, residuals).
    """

    read_bandwidth_gb_s: float
    threads: int
    kernels: list[KernelRate]
    attention: list[AttentionRate]
    operator_us: float
    ns_per_activation: float
