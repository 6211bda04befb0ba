"""What a checkpoint directory has beside its steps' tensors: shards, config.json, tokenizer, chat template, model card, recipe.

Nothing here depends on when or where it was written: two runs of one command give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.assemble import Feed, write_shards
from fewbit.checkpoints.compressed_tensors import CompressedTensorsLayout, read_linear
from fewbit.checkpoints.gguf import write_gguf
from fewbit.checkpoints.layout import Layout
from fewbit.checkpoints.model_card import model_card, source_licence
from fewbit.checkpoints.registry import quantized_reader
from fewbit.checkpoints.safetensors_files import SafetensorsFiles, TensorEntry
from fewbit.checkpoints.shards import copy_into_shards, write_tensors
from fewbit.checkpoints.sources import DirectorySource, open_source
from fewbit.checkpoints.unfinished import Unfinished
from fewbit.errors import OutputError
from fewbit.formats.digest import digest
from fewbit.formats.spec import Scheme
from fewbit.results import QuantizeResult
from fewbit.workflows.gguf_files import gguf_target, identity_of
from fewbit.workflows.quantize_plan import QuantizePlan

__all__ = ["RECIPE_NAME", "TensorTotals", "copy_companions", "write_companions", "write_json", "write_weights"]

RECIPE_NAME = "fewbit_recipe.json"
_BUG = "this is a bug in fewbit: please report it"
_PARTS = (
    "weight",
    "weight_packed",
    "weight_codes",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_codebook",
    "input_scale",
)
# What a complete directory has beside weights and config.json. No Python: fewbit neither runs nor passes on code of a checkpoint.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "*preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


class TensorTotals:
    """Sums over the tensors of a source and of the checkpoint that was made of it.

    Attributes:
        parameters, source_bytes: of the source. checkpoint_bytes: of the checkpoint. kept: tensors that are the source's, unchanged.
        quantized: linears that were quantized, as the disk calls them.
        notes: what the layout does not carry over, one line each.
        digests: of their numbers as the method made them (`formats.digest`), which `fewbit verify` compares with what it reads.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.parameters = self.source_bytes = self.checkpoint_bytes = self.kept = 0
        self.quantized: set[str] = set()
        self.notes: list[str] = []


def write_weights(
    plan: QuantizePlan,
    work: Unfinished,
    steps: list[str],
    max_shard_bytes: int,
    layout: Layout,
    scheme: Scheme,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> TensorTotals:
    """Put the shards together: what the steps made, and the source's other tensors as they are.

    Args:
        extra: small tensors that the source has no like of (scales of the KV cache), for layouts that keep them.

    Raises:
        FormatError: a linear that the layout cannot store.
        OutputError: a tensor of the source would be lost.
        OSError: the system refuses a write.
    """
    source, totals = SafetensorsFiles(plan.directory), TensorTotals()
    made: dict[str, TensorEntry] = {}
    files: dict[str, SafetensorsFiles] = {}
    for step in steps:
        of_step = work.tensors(step)
        made |= {name: of_step.entry(name) for name in of_step.names()}
        files |= {name.removesuffix(".weight_scale"): of_step for name in of_step.names() if name.endswith(".weight_scale")}
    totals.quantized = set(files)
    used: set[str] = set()
    for name in source.names():
        entry = source.entry(name)
        totals.parameters += entry.nbytes // entry.dtype.itemsize
        totals.source_bytes += entry.nbytes
        prefix = name.removesuffix(".weight")
        if name.endswith(".weight") and prefix in totals.quantized:
            used |= {part for part, _ in _parts(prefix, made)}
        elif name in made:
            used.add(name)
        else:
            totals.kept += 1
    forgotten = set(made) - used
    if forgotten:
        raise OutputError(f"'{min(forgotten)}' was made and belongs to no tensor of the source", _BUG)
    totals.digests = {prefix: digest(read_linear(files[prefix], prefix, scheme)) for prefix in sorted(files)}
    if isinstance(layout, CompressedTensorsLayout):  # the steps are in this layout already: their bytes are copied
        additions = _additions(extra or {}, work.scratch)
        totals.checkpoint_bytes = _copy(source, made, totals.quantized, work.checkpoint, max_shard_bytes, additions)
        return totals

    def entry_of(name: str) -> TensorEntry:
        return made.get(name) or source.entry(name)

    feed = Feed(
        names=source.names(),
        quantized=frozenset(totals.quantized),
        shape=lambda name: source.entry(name).shape,
        dense=lambda name: work.tensors(_step_of(name, made)).get(name) if name in made else source.get(name),
        entry=entry_of,
        linear=lambda prefix: read_linear(files[prefix], prefix, scheme),
    )
    if layout.single_file:
        with identity_of(DirectorySource(plan.directory)) as identity:
            file = gguf_target(work.checkpoint, layout.format_name(scheme))
            totals.checkpoint_bytes, totals.notes = write_gguf(feed, scheme, file, identity)
    else:
        totals.checkpoint_bytes = write_shards(feed, layout, scheme, work.checkpoint, work.scratch / "spool", max_shard_bytes)
    return totals


def _step_of(name: str, made: Mapping[str, TensorEntry]) -> str:
    return made[name].file.stem


def _additions(extra: Mapping[str, torch.Tensor], folder: Path) -> list[tuple[str, TensorEntry]]:
    """Tensors of memory as tensors of a file."""
    if not extra:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "extra.safetensors", extra)
    files = SafetensorsFiles(folder / "extra.safetensors")
    return [(name, files.entry(name)) for name in extra]


def _copy(
    source: SafetensorsFiles,
    made: Mapping[str, TensorEntry],
    quantized: set[str],
    out: Path,
    max_shard_bytes: int,
    additions: list[tuple[str, TensorEntry]],
) -> int:
    """Shards out of tensors that are in their final form already."""
    pieces: list[tuple[str, TensorEntry]] = []
    for name in source.names():
        prefix = name.removesuffix(".weight")
        if name.endswith(".weight") and prefix in quantized:
            pieces += _parts(prefix, made)
        else:
            pieces.append((name, made[name] if name in made else source.entry(name)))
    pieces += additions
    total = copy_into_shards(out, pieces, max_shard_bytes)
    written = SafetensorsFiles(out)
    lost = next((name for name, _ in pieces if name not in written), None)
    if lost is not None:
        raise OutputError(f"tensor '{lost}' is missing in what was written", _BUG)
    return total


def _parts(prefix: str, made: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors of one quantized linear; its bias, if it has one, is a tensor of its own."""
    for part in _PARTS:
        if f"{prefix}.{part}" in made:
            yield f"{prefix}.{part}", made[f"{prefix}.{part}"]


def write_companions(plan: QuantizePlan, scheme: Scheme, result: QuantizeResult, totals: TensorTotals, out: Path, layout: Layout) -> None:
    """config.json, tokenizer, chat template, generation configuration, model card and recipe.

    Args:
        totals: what `write_weights` returned.
        out: where to.

    Raises:
        OutputError: what was written does not read back.
        OSError: the system refuses a write.
    """
    if layout.single_file:
        read = open_source(out)  # configuration and tokenizer are in the file
        linears = read.quantized_linears or frozenset(totals.quantized)  # Q4_1 reads as high precision
        totals.digests = {name: found for name, found in totals.digests.items() if name in read.quantized_linears}
    else:
        copy_companions(plan.directory, out)
        config = json.loads((plan.directory / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = fields = layout.config_fields(scheme, result.ignored_linears)
        write_json(out / "config.json", config)
        for name, content in layout.companions(scheme, result.ignored_linears).items():
            write_json(out / name, content)
        linears = frozenset(quantized_reader(out, fields).linears)
    if set(linears) != totals.quantized:
        raise OutputError(f"'{out}' does not read back as it was written", _BUG)
    versions = {name: result.settings[name] for name in ("fewbit", "torch", "compressed-tensors")}
    (out / "README.md").write_text(model_card(result, versions=versions, licence=source_licence(plan.directory)), encoding="utf-8")
    recipe = {"schema_version": 1, "versions": versions, "scheme": asdict(scheme), "result": _timeless(result)}
    write_json(out / RECIPE_NAME, {**recipe, "values_sha256": totals.digests})


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, chat template, generation configuration and licence of a model directory, as they are.

    Raises:
        OSError: the system refuses a write.
    """
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, out / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates")


def _timeless(result: QuantizeResult) -> dict[str, Any]:
    """The result without what differs between two runs of one command."""
    blocks = [replace(block, duration_s=0.0, resumed=False) for block in result.blocks]
    fields = asdict(replace(result, blocks=blocks))
    for name in ("out", "duration_s", "peak_rss_bytes", "estimate", "verify"):
        del fields[name]
    for block in fields["blocks"]:
        del block["duration_s"], block["resumed"]
    return fields


def write_json(path: Path, fields: object) -> None:
    """A JSON file for people and programs.

    Raises:
        OSError: the system refuses the write.
    """
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
