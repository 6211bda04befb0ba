"""What a checkpoint calls the tensors that the model has under other names.

For nearly all dense models the names on disk are the module's parameters. Not always: GPT-NeoX stores its head as `embed_out`, a base model
lacks the prefix `model.`, and a mixture's experts, one tensor each on disk, are merged into 3-D parameters when transformers loads them.
In fewbit's models they are not merged (`models.experts`), and the place of a tensor in the merge tells which linear it is. transformers has
a table of such renames and merges for its own loading; it is asked here, once and by name, so that a walk through the model can read each
parameter from disk when its turn comes, and write its result under the name that the source used.

    renamed     one tensor on disk, one parameter         gpt_neox: embed_out.weight -> lm_head.weight
    experts     the same, through the merge               mixtral: block_sparse_moe.experts.5.w3 -> mlp.experts.5.up_proj
    merged      several tensors on disk, one parameter    where experts stay stacked, and where transformers joins other matrices
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform, rename_source_key

from fewbit.models.experts import EXPERT_PROJECTIONS

__all__ = ["DiskNames", "disk_names"]


@dataclass(frozen=True)
class DiskNames:
    """How parameters and buffers of a model are found on disk.

    Attributes:
        single: parameter to the one tensor on disk that is it.
        merged: parameter to the tensors on disk that transformers makes it from, in the order of the disk.
        unknown: tensors on disk that the model does not have.
    """

    single: Mapping[str, str]
    merged: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]

    def prefix(self, module: str) -> str:
        """What the disk calls the module whose `weight` is one tensor; the name itself when the disk does not have it."""
        return self.single.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")


def disk_names(model: PreTrainedModel, names: Sequence[str]) -> DiskNames:
    """Match the tensors of a checkpoint with the model's parameters and buffers.

    Args:
        model: with or without weights.
        names: the checkpoint's tensors.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found: dict[str, list[str]] = {}
    converted: set[str] = set()
    unknown: list[str] = []
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)  # type: ignore[arg-type]
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            target, pattern = _of_one_expert(name, target, pattern, converters), None
        if target not in state:
            unknown.append(name)
            continue
        found.setdefault(target, []).append(name)
        if pattern is not None:
            converted.add(target)
    return DiskNames(
        single={target: given[0] for target, given in found.items() if target not in converted},
        merged={target: tuple(given) for target, given in found.items() if target in converted},
        unknown=tuple(unknown),
    )


def _of_one_expert(name: str, target: str, pattern: str | None, converters: Sequence[WeightTransform]) -> str:
    """The linear of one expert that a tensor is, when transformers would merge it into the parameter `target`; empty when it is none.

    Args:
        name: of the tensor on disk; the expert's number stands in it behind `experts.`.
        pattern: of the converter that matched; its place among the converter's patterns says whether it is gate, up or down.
    """
    number = re.search(r"\.experts\.(\d+)\.", name)
    module, _, last = target.rpartition(".")
    converter = next((c for c in converters if pattern in c.source_patterns), None)
    if number is None or converter is None or pattern is None:
        return ""
    parts = {"gate_up_proj": EXPERT_PROJECTIONS[:2], "down_proj": EXPERT_PROJECTIONS[2:]}.get(last, ())
    if len(parts) != len(converter.source_patterns):
        return ""
    return f"{module}.{number[1]}.{parts[list(converter.source_patterns).index(pattern)]}.weight"
