"""The result types that cross layers and go to JSON.

Every type is a frozen pydantic dataclass: it validates when it is read back, and its JSON Schema is generated from the very fields
(`src/fewbit/report/results.schema.json` is that schema, kept in the repository and compared in the tests). Units stand in the field names.
Fields are only ever added, with a default, so that older files stay readable. None means "not measured", never zero.
"""

from __future__ import annotations

from fewbit.results.base import SCHEMA_VERSION, Interval
from fewbit.results.compare import BenchResults, CompareResults, ShapesResult, VariantResult
from fewbit.results.convert import ConvertResult
from fewbit.results.formats import FormatData, FormatErrors, FormatInfo, FormatsResult, HardwareSupport
from fewbit.results.inspect import InspectResult, RuntimeCell, StoredFormat
from fewbit.results.kernels import KernelInfo, KernelsReport, KernelUse, PassedOverKernel, SchemeKernel
from fewbit.results.latency import Bound, Counters, LatencyResult, OperatorTimes
from fewbit.results.memory import MemoryResult
from fewbit.results.quality import EvaluateResults, NoiseFloor, ProtocolInfo, QualityResult
from fewbit.results.quantize import BlockReport, CalibrationInfo, ExpertsReport, GateResult, LayerReport, QuantizeEstimate, QuantizeResult
from fewbit.results.rates import AttentionRate, EngineRates, KernelRate
from fewbit.results.subject import Environment, MachineResult, ModelInfo, VariantInfo
from fewbit.results.verify import RuntimeCheck, VerifyResult

__all__ = [
    "SCHEMA_VERSION",
    "AttentionRate",
    "BenchResults",
    "BlockReport",
    "Bound",
    "CalibrationInfo",
    "CompareResults",
    "ConvertResult",
    "Counters",
    "EngineRates",
    "Environment",
    "EvaluateResults",
    "ExpertsReport",
    "FormatData",
    "FormatErrors",
    "FormatInfo",
    "FormatsResult",
    "GateResult",
    "HardwareSupport",
    "InspectResult",
    "Interval",
    "KernelInfo",
    "KernelRate",
    "KernelUse",
    "KernelsReport",
    "LatencyResult",
    "LayerReport",
    "MachineResult",
    "MemoryResult",
    "ModelInfo",
    "NoiseFloor",
    "OperatorTimes",
    "PassedOverKernel",
    "ProtocolInfo",
    "QualityResult",
    "QuantizeEstimate",
    "QuantizeResult",
    "RuntimeCell",
    "RuntimeCheck",
    "SchemeKernel",
    "ShapesResult",
    "StoredFormat",
    "VariantInfo",
    "VariantResult",
    "VerifyResult",
]
