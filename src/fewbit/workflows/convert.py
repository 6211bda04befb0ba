"""`fewbit convert`: a checkpoint of any layout in, the same numbers in another layout out.

    read      a directory, one linear at a time                                        checkpoints.sources
    express   the same integers in the target's notation, or a refusal                 checkpoints.express
    write     shards and config.json; streaming, atomic                                checkpoints.assemble
    check     what was written is read again and compared, linear by linear; the list of tensors is that of the source

Nothing is rounded a second time: where the target has no format with the source's grid, the command refuses and says which layouts have.
What may change without a refusal is listed in `losses`: a scale that the target's dtype cannot hold, a format of activations or of the KV
cache that it has no word for.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.assemble import Feed, write_shards
from fewbit.checkpoints.dense import DenseLayout
from fewbit.checkpoints.directory import output_directory, output_file
from fewbit.checkpoints.express import express
from fewbit.checkpoints.gguf import write_gguf
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.layout import Layout, named
from fewbit.checkpoints.registry import LAYOUTS, get_layout
from fewbit.checkpoints.safetensors_files import TensorEntry
from fewbit.checkpoints.shards import MAX_SHARD_BYTES
from fewbit.checkpoints.sources import DirectorySource, TensorSource, open_source
from fewbit.errors import CheckpointError, FewbitError, OutputError, UsageError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.results import ConvertResult
from fewbit.workflows.gguf_files import gguf_target, identity_of, plain_config
from fewbit.workflows.llama_quantize import PREFIX, write_by_llama_cpp
from fewbit.workflows.quantize_files import copy_companions, write_json

__all__ = ["convert_checkpoint"]

ProgressCallback = Callable[[int, int, str], None]
_BUG = "this is a bug in fewbit: please report it"


def convert_checkpoint(
    model: str | Path,
    *,
    layout: str,
    out: str | Path,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> ConvertResult:
    """Write a quantized checkpoint in another layout.

    Args:
        model: a directory, a GGUF file or a hub id.
        layout: one of `checkpoints.registry.LAYOUTS`; of a model in high precision `gguf-dense` or one of llama.cpp's own types, e.g.
            `gguf-q4_k_m` (`workflows.llama_quantize`).
        out: the directory to make (GGUF: the file, or a directory for it); it appears when it is whole.
        overwrite: replace an existing checkpoint.
        progress: called with (tensors done, tensors, what is being done).

    Raises:
        UsageError: a checkpoint in high precision, or numbers that the layout cannot hold without rounding them again.
        ModelError, CheckpointError: the source cannot be read.
        OutputError: the directory exists or cannot be written.
    """
    if layout.lower().startswith(PREFIX):
        return write_by_llama_cpp(model, layout=layout, out=out, overwrite=overwrite)
    started = time.monotonic()
    target, source = get_layout(layout), open_source(model)
    decoded = source.decoded if isinstance(source, GgufSource) else frozenset()
    scheme, losses = _target_scheme(source, target, decoded)
    work = _Conversion(source, target, scheme, decoded)
    tell = None if progress is None else lambda done, total: progress(done, total, "converting")
    if target.single_file:
        out = gguf_target(Path(out), target.format_name(scheme))
        with output_file(out, overwrite=overwrite) as file:
            written = work.write_file(file, tell)
            work.check(file)
    else:
        with output_directory(out, overwrite=overwrite) as directory:
            written = work.write(directory, max_shard_bytes, tell)
            work.check(directory)
    return ConvertResult(
        model=source.describe(),
        out=str(out),
        source_layout=source.layout,
        source_scheme=source.scheme.name if source.scheme is not None else "BF16",
        layout=target.name,
        layout_format=target.format_name(scheme),
        scheme=scheme.name,
        quantized_linears=len(source.quantized_linears),
        kept_tensors=len(source.names()) - len(source.quantized_linears),
        scales=work.tally.scales,
        rounded_scales=work.tally.rounded,
        worst_scale_change=work.tally.worst,
        losses=[*losses, *work.losses, *work.tally.sentences()],
        source_bytes=source.weight_bytes_on_disk or 0,
        checkpoint_bytes=written,
        duration_s=time.monotonic() - started,
        notes=list(source.notes),
    )


def _target_scheme(source: TensorSource, target: Layout, decoded: frozenset[str]) -> tuple[Scheme, list[str]]:
    """The scheme that the target holds, and what of the source's it has no word for."""
    scheme = source.scheme
    if decoded and target.name.startswith("dense"):
        return scheme or get_scheme("BF16"), []
    if scheme is None or scheme.weights is None:
        if decoded:
            raise UsageError(
                f"'{source.describe()}' is in types that no other layout has: {source.notes[0]}", "choose dense or dense-float32"
            )
        raise UsageError(f"'{source.describe()}' is not quantized", "quantize it: fewbit quantize --format")
    spec = target.nearest(scheme.weights)
    if spec is None:
        holders = [name for name in LAYOUTS if get_layout(name).nearest(scheme.weights) is not None]
        raise UsageError(
            f"{target.name} has no format for {scheme.weights} without rounding the weights again",
            f"layouts that hold it: {', '.join(holders) or 'none'}; or quantize the model in high precision",
        )
    wanted, losses = named(replace(scheme, weights=spec)), []
    if target.supports(wanted) is not None and wanted.kv_keys is not None:
        losses.append(f"{target.name} has no place for the format of the KV cache ({wanted.kv_keys}): choose it when serving")
        wanted = named(replace(wanted, kv_keys=None, kv_values=None))
    if target.supports(wanted) is not None and wanted.input_activations is not None:
        losses.append(f"{target.name} has no place for the format of the linears' inputs ({wanted.input_activations}): they run in 16 bits")
        wanted = named(replace(wanted, input_activations=None))
    reason = None if target.name.startswith("dense") else target.supports(wanted)
    if reason is not None:
        raise UsageError(f"{target.name} cannot hold {wanted.name}: {reason}", "choose another format")
    return wanted, losses


@dataclass
class _Tally:
    """What changed on the way."""

    scales: int = 0
    rounded: int = 0
    worst: float = 0.0
    weights: int = 0
    changed_weights: int = 0
    worst_weight: float = 0.0
    dtype: str = ""
    seen: set[str] = field(default_factory=set)

    def sentences(self) -> list[str]:
        told = []
        if self.rounded:
            told.append(
                f"{self.rounded:,} of {self.scales:,} scales were rounded to {self.dtype}, by at most {self.worst:.2e} of their value; "
                "the integers are the same"
            )
        if self.changed_weights:
            told.append(
                f"{self.changed_weights:,} of {self.weights:,} dequantized weights are rounded to what the target stores, the worst by "
                f"{self.worst_weight:.2e}"
            )
        return told


class _Conversion:
    """One checkpoint on its way.

    Args:
        source: quantized. target: the layout. scheme: as the target stores it. decoded: tensors that come in float32
            for want of a format.
    """

    def __init__(self, source: TensorSource, target: Layout, scheme: Scheme, decoded: frozenset[str] = frozenset()) -> None:
        self._source, self._target, self._scheme, self._decoded, self.tally = source, target, scheme, decoded, _Tally()
        self.losses: list[str] = []

    def write(self, directory: Path, max_shard_bytes: int, tell: Callable[[int, int], None] | None) -> int:
        """Everything but the check."""
        total = write_shards(self._feed(), self._target, self._scheme, directory, directory / ".spool", max_shard_bytes, tell)
        self._companions(directory)
        return total

    def write_file(self, file: Path, tell: Callable[[int, int], None] | None) -> int:
        """The same into one GGUF file."""
        with identity_of(self._source) as identity:
            total, losses = write_gguf(self._feed(), self._scheme, file, identity, tell)
        self.losses += losses
        return total

    def _feed(self) -> Feed:
        source = self._source
        files = source.files if isinstance(source, DirectorySource) else None

        def entry(name: str) -> TensorEntry | None:
            return files.entry(name) if files is not None and name in files else None

        scales = self._cache_scales()
        return Feed(
            names=[*source.names(), *scales],
            quantized=source.quantized_linears,
            shape=lambda name: tuple(scales[name].shape) if name in scales else source.shape(name),
            dense=lambda name: scales[name] if name in scales else self._dense(name),
            entry=lambda name: None if name in scales else entry(name),
            linear=self.linear,
        )

    def _dense(self, name: str) -> torch.Tensor:
        """A tensor that is no quantized linear; those that come decoded in the target's dtype, like the linears."""
        value = self._source.get(name)
        return value.to(self._target.dtype) if name in self._decoded and isinstance(self._target, DenseLayout) else value

    def _cache_scales(self) -> dict[str, torch.Tensor]:
        """The static scales of the KV cache where the target keeps its format, under the names that compressed-tensors has: [1] each."""
        source = self._source
        if self._scheme.kv_keys is None or not isinstance(source, DirectorySource) or source.reader is None:
            return {}
        found = {}
        for name in source.reader.cache_scales:
            module, _, last = name.rpartition(".")
            scale = source.files.get(name)
            if scale.numel() != 1 or not bool((scale.float().isfinite() & (scale.float() > 0)).all()):
                raise CheckpointError(f"'{name}' in '{source.describe()}' is no positive number", "write or download it again")
            found[f"{module.removesuffix('.k_proj').removesuffix('.v_proj')}.{last}"] = scale.reshape(1)
        return found

    def linear(self, prefix: str) -> QuantizedTensor:
        """One linear in the target's format; counts what changed, once per linear."""
        q = self._source.get_quantized(prefix)
        assert q is not None and self._scheme.weights is not None
        spec = self._spec_for(q)
        try:
            self._target.check_shape(prefix, *q.shape, spec)
            done = express(q, spec)
        except FewbitError as error:
            raise UsageError(f"'{prefix}' cannot be written as {self._target.name}: {error.problem}", error.remedy) from error
        if prefix not in self.tally.seen:
            self.tally.seen.add(prefix)
            self.tally.scales += done.scales
            self.tally.rounded += done.rounded_scales
            self.tally.worst, self.tally.dtype = max(self.tally.worst, done.worst), spec.scale_dtype
        return done.tensor

    def _spec_for(self, q: QuantizedTensor) -> QuantSpec:
        """Where linears of the source differ, a layout with one format takes only those that fit it."""
        assert self._scheme.weights is not None
        return q.spec if self._target.name.startswith("dense") else self._scheme.weights

    def _companions(self, directory: Path) -> None:
        source = self._source
        if source.directory is not None and (source.directory / "config.json").is_file():
            copy_companions(source.directory, directory)
            config: dict[str, Any] = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
        else:
            config = plain_config(source)
            source.tokenizer().save_pretrained(directory)
            generation = source.generation_config()
            if generation is not None:
                generation.save_pretrained(directory)
        for name in ("quantization_config", "compression_config"):
            config.pop(name, None)
        fields = self._target.config_fields(self._scheme, self._left_out())
        if fields:
            config["quantization_config"] = fields
        write_json(directory / "config.json", config)
        for name, content in self._target.companions(self._scheme, self._left_out()).items():
            write_json(directory / name, content)

    def _left_out(self) -> list[str]:
        """Matrices that are linears by their name and stay in high precision."""
        quantized = self._source.quantized_linears
        kinds = {prefix.rpartition(".")[2] for prefix in quantized}
        names = [name.removesuffix(".weight") for name in self._source.names() if name.endswith(".weight")]
        return [name for name in names if name not in quantized and (name.rpartition(".")[2] in kinds or name == "lm_head")] or ["lm_head"]

    def check(self, path: Path) -> None:
        """Read everything back.

        Raises:
            OutputError: it differs from what was meant to be written.
        """
        written: TensorSource = GgufSource(path) if self._target.single_file else DirectorySource(path)
        if isinstance(written, DirectorySource) and len(self._cache_scales()) != len(written.reader.cache_scales if written.reader else ()):
            raise OutputError("the scales of the KV cache do not read back as they were written", _BUG)
        lost = set(self._source.names()) ^ set(written.names())
        if lost:
            raise OutputError(f"'{min(lost)}' is in only one of the two checkpoints", _BUG)
        for prefix in sorted(self._source.quantized_linears):
            expected, found = self.linear(prefix), written.get_quantized(prefix)
            if found is None:  # written in high precision
                self._compare(dequantize(expected), written.get(f"{prefix}.weight").float())
            elif not _same(expected, found):
                raise OutputError(f"'{prefix}' does not read back as it was written", _BUG)
        for name in self._source.names():
            if name.removesuffix(".weight") not in self._source.quantized_linears:
                if name in self._decoded:
                    self._compare(self._source.get(name), written.get(name).float())
                    continue
                dtype, shape, digest = _fingerprint(written.get(name))  # one after the other: an embedding alone may be 2 GB
                if _fingerprint(self._source.get(name).to(dtype)) != (dtype, shape, digest):
                    raise OutputError(f"'{name}' does not read back as it was written", _BUG)

    def _compare(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        difference = (expected - found).abs()
        self.tally.weights += expected.numel()
        self.tally.changed_weights += int((difference > 0).sum())
        self.tally.worst_weight = max(self.tally.worst_weight, float(difference.max()))


def _same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether two tensors agree in every stored number; a global scale to the last bit of its reciprocal."""
    for name in ("values", "scale", "zero_point", "g_idx", "codebook", "input_scale"):
        a, b = getattr(one, name), getattr(other, name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(_bytes(a), _bytes(b))):
            return False
    a, b = one.global_scale, other.global_scale
    return one.spec == other.spec and (a is None or (b is not None and torch.allclose(a, b, rtol=2**-22, atol=0.0)))


def _fingerprint(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What two tensors have in common only if they are the same, bit for bit."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, hashlib.blake2b(raw.numpy().data, digest_size=32).digest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
