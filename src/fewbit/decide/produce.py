"""How a checkpoint of a scheme is usually made: the method, and the command.

W4A16 by AWQ, whose scales are searched against the activations; W8A8 by SmoothQuant, because INT8 activations have outliers; FP8 and
8-bit weights by rounding, which loses next to nothing; 4-bit floats by GPTQ; 2 and 3 bits by GPTQ with learned rounding.
"""

from __future__ import annotations

from fewbit.decide.serving import Serving
from fewbit.formats.spec import Scheme

__all__ = ["produce_command", "usual_method"]


def usual_method(scheme: Scheme) -> str:
    """The chain of methods, as `fewbit quantize --method` takes it."""
    spec = scheme.weights
    if spec is None:
        return ""
    if scheme.input_activations is not None and spec.type == "int":
        return "smoothquant"
    if spec.num_bits >= 8 or spec.type == "nf":
        return "rtn"
    if spec.type == "float":
        return "gptq"
    return "awq" if spec.num_bits == 4 else "gptq+autoround"


def produce_command(model: str, scheme: Scheme, serving: Serving, option: str = "") -> str:
    """What makes the checkpoint, and how the cache format is switched on when it is served."""
    if scheme.weights is None:
        command = "none: serve the model as it is"
    elif scheme.weights.type == "nf":
        command = f"none: {serving.runtime} rounds to NF4 when it loads the model"
    elif serving.make:
        command = serving.make.format(model=model, out=_out(model, scheme))
    else:
        layout = "" if serving.layout == "compressed-tensors" else f" --format {serving.layout}"
        out = _out(model, scheme)
        command = f"fewbit quantize {model} --scheme {scheme.name} --method {usual_method(scheme)}{layout} --out {out}"
    return f"{command}; serve with {option}" if option else command


def _out(model: str, scheme: Scheme) -> str:
    return f"{model.rstrip('/').rpartition('/')[2] or 'model'}-{scheme.name.lower()}"
