"""The model that a checkpoint means, in a form whose rounding is the runtime's alone: what `verify_runtimes` takes the floor from.

A Hugging Face directory: every weight dequantized, float32. For programs that read GGUF only that would be the wrong floor: their kernels
for quantized weights round the inputs to INT8 in blocks of 32, and those for F32 do not. So such a runtime gets the dequantized weights in
Q8_0, which rounds them ten times less than a 4-bit format does, and whose kernels round the inputs in the same way.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit.checkpoints.assemble import Feed
from fewbit.checkpoints.gguf import GgufLayout, write_gguf
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.layout import named
from fewbit.checkpoints.plain import write_plain
from fewbit.checkpoints.runtimes import Runtime
from fewbit.checkpoints.sources import TensorSource
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.methods.rtn import rtn
from fewbit.workflows.gguf_files import identity_of

__all__ = ["write_plain_for"]

_GGUF_ONLY = ("llama.cpp", "openvino")


def write_plain_for(runtime: Runtime, source: TensorSource, to: Path) -> Path:
    """Write the plain model of a checkpoint for one runtime.

    Args:
        to: a directory that does not exist yet.

    Returns:
        What to load: `to`, or the GGUF file in it.

    Raises:
        FewbitError: the checkpoint cannot be read or GGUF cannot hold the model.
        OSError: it cannot be written.
    """
    if runtime.name not in _GGUF_ONLY:
        return write_plain(source, to)
    to.mkdir(parents=True)
    spec = QuantSpec(8, strategy="group", group_size=32, scale_dtype="float16")
    scheme = GgufLayout().stored(named(Scheme("", weights=spec)))

    def linear(prefix: str) -> QuantizedTensor:
        assert scheme.weights is not None
        return rtn(source.get(f"{prefix}.weight").float(), scheme.weights)

    def dense(name: str) -> torch.Tensor:
        value = source.get(name)
        return value.float() if value.is_floating_point() else value

    feed = Feed(
        names=source.names(),
        quantized=frozenset(source.linears if isinstance(source, GgufSource) else source.quantized_linears),
        shape=source.shape,
        dense=dense,
        entry=lambda name: None,
        linear=linear,
    )
    file = to / "plain.gguf"
    with identity_of(source, "plain") as identity:
        write_gguf(feed, scheme, file, identity)
    return file
