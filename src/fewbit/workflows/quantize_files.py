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

from fewbit.checkpoints.compressed_tensors import CompressedTensorsReader, quantization_config
from fewbit.checkpoints.model_card import model_card, source_licence
from fewbit.checkpoints.safetensors_files import SafetensorsFiles, TensorEntry
from fewbit.checkpoints.shards import copy_into_shards
from fewbit.checkpoints.unfinished import Unfinished
from fewbit.errors import OutputError
from fewbit.formats.spec import Scheme
from fewbit.results import QuantizeResult
from fewbit.workflows.quantize_plan import QuantizePlan

__all__ = ["RECIPE_NAME", "TensorTotals", "write_companions", "write_weights"]

RECIPE_NAME = "fewbit_recipe.json"
_BUG = "this is a bug in fewbit: please report it"
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
    """

    def __init__(self) -> None:
        self.parameters = self.source_bytes = self.checkpoint_bytes = self.kept = 0
        self.quantized: set[str] = set()


def write_weights(plan: QuantizePlan, work: Unfinished, steps: list[str], max_shard_bytes: int) -> TensorTotals:
    """Put the shards together: what the steps made, and the source's other tensors as they are.

    Raises:
        OutputError: a tensor of the source would be lost.
        OSError: the system refuses a write.
    """
    source, totals = SafetensorsFiles(plan.directory), TensorTotals()
    made: dict[str, TensorEntry] = {}
    for step in steps:
        files = work.tensors(step)
        made |= {name: files.entry(name) for name in files.names()}
    totals.quantized = {name.removesuffix(".weight_scale") for name in made if name.endswith(".weight_scale")}
    pieces: list[tuple[str, TensorEntry]] = []
    for name in source.names():
        entry = source.entry(name)
        totals.parameters += entry.nbytes // entry.dtype.itemsize
        totals.source_bytes += entry.nbytes
        prefix = name.removesuffix(".weight")
        if name.endswith(".weight") and prefix in totals.quantized:
            pieces += _parts(prefix, made)
        elif name in made:
            pieces.append((name, made[name]))
        else:
            pieces.append((name, entry))
            totals.kept += 1
    forgotten = set(made) - {name for name, _ in pieces}
    if forgotten:
        raise OutputError(f"'{min(forgotten)}' was made and belongs to no tensor of the source", _BUG)
    totals.checkpoint_bytes = copy_into_shards(work.checkpoint, pieces, max_shard_bytes)
    written = SafetensorsFiles(work.checkpoint)
    lost = [name for name, _ in pieces if name not in written]
    if lost:
        raise OutputError(f"tensor '{lost[0]}' is missing in what was written", _BUG)
    return totals


def _parts(prefix: str, made: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors of one quantized linear; its bias, if it has one, is a tensor of its own."""
    for part in ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "input_scale"):
        if f"{prefix}.{part}" in made:
            yield f"{prefix}.{part}", made[f"{prefix}.{part}"]


def write_companions(plan: QuantizePlan, scheme: Scheme, result: QuantizeResult, quantized: set[str], out: Path) -> None:
    """config.json, tokenizer, chat template, generation configuration, model card and recipe.

    Args:
        quantized: linears that are quantized, as the disk calls them.
        out: where to.

    Raises:
        OutputError: what was written does not read back.
        OSError: the system refuses a write.
    """
    for pattern in _COMPANIONS:
        for path in plan.directory.glob(pattern):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, out / path.name)
    if (plan.directory / "additional_chat_templates").is_dir():
        shutil.copytree(plan.directory / "additional_chat_templates", out / "additional_chat_templates")
    config = json.loads((plan.directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(scheme, result.ignored_linears)
    _write_json(out / "config.json", config)
    if set(CompressedTensorsReader(out).linears) != quantized:
        raise OutputError(f"'{out}' does not read back as it was written", _BUG)
    versions = {name: result.settings[name] for name in ("fewbit", "torch", "compressed-tensors")}
    (out / "README.md").write_text(model_card(result, versions=versions, licence=source_licence(plan.directory)), encoding="utf-8")
    _write_json(out / RECIPE_NAME, {"schema_version": 1, "versions": versions, "scheme": asdict(scheme), "result": _timeless(result)})


def _timeless(result: QuantizeResult) -> dict[str, Any]:
    """The result without what differs between two runs of one command."""
    blocks = [replace(block, duration_s=0.0, resumed=False) for block in result.blocks]
    fields = asdict(replace(result, blocks=blocks))
    for name in ("out", "duration_s", "peak_rss_bytes", "estimate"):
        del fields[name]
    for block in fields["blocks"]:
        del block["duration_s"], block["resumed"]
    return fields


def _write_json(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
