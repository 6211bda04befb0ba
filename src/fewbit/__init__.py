"""fewbit: which quantization to deploy, decided by memory, latency and quality measured together.

    import fewbit

    results = fewbit.compare(variants="bf16,int8-w8a16,int4-w4a16")     # every figure of the table, as frozen dataclasses
    loaded = fewbit.load("quantized/w4a16")                             # any layout: a directory, a GGUF file, a hub id

Each name below is imported from its layer when it is first used, so that `import fewbit` and `fewbit --help` do not wait for torch.
`fewbit.bench` and `fewbit.evaluate` are layers, which is why their workflows are called `bench_model` and `evaluate_model` here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fewbit.runtime.transformers_hook import install as _tell_transformers

if TYPE_CHECKING:
    from fewbit.checkpoints.sources import open_source
    from fewbit.errors import FewbitError
    from fewbit.formats.quantize import dequantize, quantize
    from fewbit.formats.spec import SCHEMES, QuantSpec, Scheme, get_scheme
    from fewbit.formats.tensor import QuantizedTensor
    from fewbit.methods.gptq import GPTQSettings, gptq
    from fewbit.methods.rtn import rtn
    from fewbit.methods.statistics import InputStatistics
    from fewbit.report.results_file import read_results
    from fewbit.results import CompareResults, ConvertResult, Environment, EvaluateResults, InspectResult, QuantizeResult, VerifyResult
    from fewbit.runtime.config import QuantizationConfig
    from fewbit.runtime.generate import generate
    from fewbit.runtime.load import LoadedModel, load_model
    from fewbit.walk.settings import CalibrationChoice, GateChoice, WalkSettings
    from fewbit.workflows.bench import bench as bench_model
    from fewbit.workflows.compare import CompareSettings, compare
    from fewbit.workflows.convert import convert_checkpoint
    from fewbit.workflows.decide import decide_deployment
    from fewbit.workflows.environment import environment
    from fewbit.workflows.evaluate import evaluate as evaluate_model
    from fewbit.workflows.formats import describe_formats
    from fewbit.workflows.generate import generate_text
    from fewbit.workflows.inspect import inspect_checkpoint
    from fewbit.workflows.kernels import list_kernels
    from fewbit.workflows.load import load
    from fewbit.workflows.plan import plan_model
    from fewbit.workflows.predict import predict_model
    from fewbit.workflows.quantize import quantize_model
    from fewbit.workflows.report import build_report
    from fewbit.workflows.verify import verify_checkpoint

__all__ = [
    "SCHEMES",
    "CalibrationChoice",
    "CompareResults",
    "CompareSettings",
    "ConvertResult",
    "Environment",
    "EvaluateResults",
    "FewbitError",
    "GPTQSettings",
    "GateChoice",
    "InputStatistics",
    "InspectResult",
    "LoadedModel",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizeResult",
    "QuantizedTensor",
    "Scheme",
    "VerifyResult",
    "WalkSettings",
    "__version__",
    "bench_model",
    "build_report",
    "compare",
    "convert_checkpoint",
    "decide_deployment",
    "dequantize",
    "describe_formats",
    "environment",
    "evaluate_model",
    "generate",
    "generate_text",
    "get_scheme",
    "gptq",
    "inspect_checkpoint",
    "list_kernels",
    "load",
    "load_model",
    "open_source",
    "plan_model",
    "predict_model",
    "quantize",
    "quantize_model",
    "read_results",
    "rtn",
    "verify_checkpoint",
]

__version__ = "0.1.0"

# Where each public name lives: the imports above once more, for the running program.
_HOMES = {
    "CalibrationChoice": "fewbit.walk.settings:CalibrationChoice",
    "CompareResults": "fewbit.results:CompareResults",
    "CompareSettings": "fewbit.workflows.compare:CompareSettings",
    "ConvertResult": "fewbit.results:ConvertResult",
    "Environment": "fewbit.results:Environment",
    "EvaluateResults": "fewbit.results:EvaluateResults",
    "FewbitError": "fewbit.errors:FewbitError",
    "GPTQSettings": "fewbit.methods.gptq:GPTQSettings",
    "GateChoice": "fewbit.walk.settings:GateChoice",
    "InputStatistics": "fewbit.methods.statistics:InputStatistics",
    "InspectResult": "fewbit.results:InspectResult",
    "LoadedModel": "fewbit.runtime.load:LoadedModel",
    "QuantSpec": "fewbit.formats.spec:QuantSpec",
    "QuantizationConfig": "fewbit.runtime.config:QuantizationConfig",
    "QuantizeResult": "fewbit.results:QuantizeResult",
    "QuantizedTensor": "fewbit.formats.tensor:QuantizedTensor",
    "SCHEMES": "fewbit.formats.spec:SCHEMES",
    "Scheme": "fewbit.formats.spec:Scheme",
    "VerifyResult": "fewbit.results:VerifyResult",
    "WalkSettings": "fewbit.walk.settings:WalkSettings",
    "bench_model": "fewbit.workflows.bench:bench",
    "build_report": "fewbit.workflows.report:build_report",
    "compare": "fewbit.workflows.compare:compare",
    "convert_checkpoint": "fewbit.workflows.convert:convert_checkpoint",
    "decide_deployment": "fewbit.workflows.decide:decide_deployment",
    "dequantize": "fewbit.formats.quantize:dequantize",
    "describe_formats": "fewbit.workflows.formats:describe_formats",
    "environment": "fewbit.workflows.environment:environment",
    "evaluate_model": "fewbit.workflows.evaluate:evaluate",
    "generate": "fewbit.runtime.generate:generate",
    "generate_text": "fewbit.workflows.generate:generate_text",
    "get_scheme": "fewbit.formats.spec:get_scheme",
    "gptq": "fewbit.methods.gptq:gptq",
    "inspect_checkpoint": "fewbit.workflows.inspect:inspect_checkpoint",
    "list_kernels": "fewbit.workflows.kernels:list_kernels",
    "load": "fewbit.workflows.load:load",
    "load_model": "fewbit.runtime.load:load_model",
    "open_source": "fewbit.checkpoints.sources:open_source",
    "plan_model": "fewbit.workflows.plan:plan_model",
    "predict_model": "fewbit.workflows.predict:predict_model",
    "quantize": "fewbit.formats.quantize:quantize",
    "quantize_model": "fewbit.workflows.quantize:quantize_model",
    "read_results": "fewbit.report.results_file:read_results",
    "rtn": "fewbit.methods.rtn:rtn",
    "verify_checkpoint": "fewbit.workflows.verify:verify_checkpoint",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fewbit' has no attribute '{name}'")
    module, _, attribute = home.partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_tell_transformers()
