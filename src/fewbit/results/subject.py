"""What was measured and on what: the machine, the model, the quantization. Every result file says all three."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fewbit.results.base import FROZEN
from fewbit.results.rates import EngineRates

__all__ = ["Environment", "MachineResult", "ModelInfo", "VariantInfo"]


@dataclass(frozen=True, config=FROZEN)
class Environment:
    """What a bug report and a reproduction need."""

    fewbit: str
    python: str
    platform: str
    cpu: str
    cpu_flags: list[str]
    cpu_cores: int
    memory_bytes: int
    device: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True, config=FROZEN)
class MachineResult:
    """What this machine can do, measured in the same run.

    Attributes:
        read_bandwidth_gb_s: DRAM reads, 1e9 bytes per second, best of the passes.
        bandwidth_method: how it was measured.
        gemm_gflop_s: dense matrix product in `gemm_dtype`, 1e9 operations per second.
        time_per_null_op_us: time of one smallest tensor operation, the framework's overhead per operator.
        rates: of the kernels that run; None where they were not asked for, or without the native extension.
    """

    read_bandwidth_gb_s: float
    bandwidth_method: str
    gemm_gflop_s: float
    gemm_dtype: str
    time_per_null_op_us: float
    rates: EngineRates | None = None


@dataclass(frozen=True, config=FROZEN)
class ModelInfo:
    """Which model was measured.

    Attributes:
        source: the directory, the hub id, or `shapes:NAME`.
        weights_sha256: hash over the weight files; None for random weights.
        parameters: all parameters, tied ones counted once.
        quantizable_parameters: those in the linears that a weight scheme quantizes.
        layers_measured, layers_total: differ when only a slice of the stack was run and scaled.
    """

    source: str
    architecture: str
    parameters: int
    quantizable_parameters: int
    layers_measured: int
    layers_total: int
    weights_sha256: str | None = None
    random_weights: bool = False


@dataclass(frozen=True, config=FROZEN)
class VariantInfo:
    """Which quantization; `name` is unique in a results file.

    Attributes:
        compute: `exact`, or `int8-activations` where kernels were allowed to quantize their inputs on the fly (they name themselves).
        lm_head: format of the output head.
    """

    name: str
    label: str
    scheme: str
    weights: str
    input_activations: str
    kv_cache: str
    method: str
    bits_nominal: float
    compute: str = "exact"
    lm_head: str = "BF16"
