"""GGUF files from a model in high precision: as it is (`gguf-dense`), or in llama.cpp's own types, by llama.cpp's own quantizer.

    gguf-dense      matrices in the model's dtype
    gguf-q4_k_m     and the other K- and IQ-types: the dense file, handed to `llama-quantize`

The K-types have groups of 32 or 16 under scales that are quantized themselves, chosen by a search that is llama.cpp's; writing them anew
would be writing them otherwise. The quantizer is looked for as `llama-quantize`, on the path or among the runtimes' environments
(`make runtimes`), and in llama-cpp-python there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fewbit.checkpoints.assemble import Feed
from fewbit.checkpoints.directory import output_file
from fewbit.checkpoints.gguf import write_gguf
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.runtimes import get_runtime
from fewbit.checkpoints.safetensors_files import TensorEntry
from fewbit.checkpoints.sources import DirectorySource, TensorSource, open_source
from fewbit.errors import MeasurementError, OutputError, UsageError
from fewbit.results import ConvertResult
from fewbit.workflows.foreign.environments import environments_directory, interpreter
from fewbit.workflows.gguf_files import gguf_target, identity_of

__all__ = ["LLAMA_TYPES", "PREFIX", "write_by_llama_cpp"]

PREFIX = "gguf-"
LLAMA_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")
_BINDING = """
import ctypes, json, sys
import llama_cpp
source, target, name = json.loads(sys.argv[1])
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
params.nthread = 1
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


def write_by_llama_cpp(model: str | Path, *, layout: str, out: str | Path, overwrite: bool = False) -> ConvertResult:
    """Write a model in high precision as one GGUF file.

    Args:
        model: a directory or a hub id, not quantized.
        layout: `gguf-dense`, or `gguf-` and one of `LLAMA_TYPES`.
        out: the file, or a directory for it.
        overwrite: replace an existing file.

    Raises:
        UsageError: another type, or a model that is quantized already.
        UnsupportedModelError: an architecture or a tokenizer that fewbit does not write.
        MeasurementError: llama.cpp's quantizer is not installed, or fails.
        OutputError: the file exists or cannot be written.
    """
    started = time.monotonic()
    kind = layout.removeprefix(PREFIX).lower()
    if kind not in ("dense", *LLAMA_TYPES):
        raise UsageError(f"unknown format '{layout}'", f"choose gguf-dense or {', '.join(PREFIX + name for name in LLAMA_TYPES)}")
    source = open_source(model)
    if source.scheme is not None or (isinstance(source, GgufSource) and source.notes):
        raise UsageError(
            f"'{source.describe()}' is quantized already: it would be rounded a second time", "name the model it was made from"
        )
    command = _quantizer() if kind != "dense" else []
    target = gguf_target(Path(out), "dense" if kind == "dense" else kind.upper())
    with output_file(target, overwrite=overwrite) as file:
        dense = file if kind == "dense" else file.with_name(f"{file.name}.dense")
        try:
            losses = _write_dense(source, dense)
            if kind != "dense":
                _run(command, dense, file, kind.upper())
        finally:
            if dense != file:
                dense.unlink(missing_ok=True)
        written = GgufSource(file)
        if set(written.names()) != set(source.names()):
            raise OutputError(f"'{target}' does not hold the tensors of the model", "this is a bug in fewbit: please report it")
        types = Counter(tensor.type.name for tensor in written.file.tensors.values() if len(tensor.shape) > 1)
        size = sum(tensor.nbytes for tensor in written.file.tensors.values())
    stored = ", ".join(f"{name} x{count}" for name, count in types.most_common())
    return ConvertResult(
        model=source.describe(),
        out=str(target),
        source_layout=source.layout,
        source_scheme="BF16",
        layout="gguf",
        layout_format=kind.upper(),
        scheme=kind.upper() if kind != "dense" else "BF16",
        quantized_linears=0 if kind == "dense" else sum(written.types.values()) and len(written.linears),
        kept_tensors=len(source.names()) if kind == "dense" else len(source.names()) - len(written.linears),
        scales=0,
        rounded_scales=0,
        worst_scale_change=0.0,
        losses=losses,
        source_bytes=source.weight_bytes_on_disk or 0,
        checkpoint_bytes=size,
        duration_s=time.monotonic() - started,
        notes=[f"matrices are stored as {stored}"],
    )


def _write_dense(source: TensorSource, to: Path) -> list[str]:
    files = source.files if isinstance(source, DirectorySource) else None

    def entry(name: str) -> TensorEntry | None:
        return files.entry(name) if files is not None and name in files else None

    def no_linear(prefix: str) -> None:
        raise AssertionError(prefix)

    feed = Feed(source.names(), frozenset(), source.shape, source.get, entry, no_linear)  # type: ignore[arg-type]
    with identity_of(source) as identity:
        return write_gguf(feed, None, to, identity)[1]


def _quantizer() -> list[str]:
    """The command in front of source, target and type.

    Raises:
        MeasurementError: there is none.
    """
    folder = environments_directory() / get_runtime("llama.cpp").environment
    places = (folder / "bin" / "llama-quantize", folder / "build" / "bin" / "llama-quantize")
    found = next((str(place) for place in places if place.is_file()), None) or shutil.which("llama-quantize")
    if found is not None:
        return [found]
    python = interpreter(get_runtime("llama.cpp"))
    if python is not None:
        return [str(python), "-c", _BINDING]
    raise MeasurementError(
        "llama.cpp's quantizer is not installed", "install llama.cpp so that `llama-quantize` is on the path, or run `make runtimes`"
    )


def _run(command: Sequence[str], source: Path, target: Path, name: str) -> None:
    arguments = [str(source), str(target), name]
    whole = [*command, json.dumps(arguments)] if len(command) > 1 else [*command, *arguments]
    process = subprocess.run(whole, capture_output=True, text=True, check=False)
    if process.returncode or not target.is_file():
        last = (process.stderr or process.stdout).strip().splitlines()[-1:] or ["no message"]
        raise MeasurementError(f"llama.cpp's quantizer failed: {last[0][:200]}", "see whether it knows the architecture and the type")
