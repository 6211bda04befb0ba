"""Give a small model the activation outliers of a large one, without changing what it computes.

Large language models have a few channels whose activations are a hundred times larger than all others (arXiv 2208.07339); small
ones do not, so activation quantization looks harmless on them. Outliers can be put in by hand: SmoothQuant's identity (arXiv
2211.10438) moves difficulty from activations to weights, and backwards it makes outliers. For every norm with gain g and every
linear W that reads its output x,

    W x = (W diag(s)^-1) (diag(s) x),      s_c = factor for the chosen channels c, 1 elsewhere

so multiplying the gain of channel c and dividing column c of the linears that follow leaves every output as it was. The same holds
between up_proj and down_proj, whose product with the gate is channel by channel (`models.links`). A power of two as factor changes
exponents only, and the logits stay equal to the last bit unless a number underflows.

A scale per token must then span the outlier, and the other channels keep a few integer steps: W8A8 with dynamic per-token scales
collapses, weight-only formats do not.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fewbit.checkpoints.directory import output_directory
from fewbit.checkpoints.safetensors_files import INDEX_NAME
from fewbit.errors import UnsupportedModelError, UsageError
from fewbit.models.families import get_family
from fewbit.models.links import block_links
from fewbit.walk.fold import channel_count, fold_scale

__all__ = ["inject_outliers", "write_outlier_model"]


@torch.no_grad()
def inject_outliers(model: PreTrainedModel, channels: Sequence[int], factor: float) -> None:
    """Scale channels of the activations up and the weights that read them down, in place.

    Args:
        model: a transformers model of a family in `models.families`, in high precision.
        channels: of the hidden size (and the same ones of the MLP's inner size).
        factor: how much larger their activations become; a power of two is exact.

    Raises:
        UnsupportedModelError: a family that the table does not know, or whose linears are not nn.Linear.
        UsageError: a channel that does not exist, or a factor that is not positive.
    """
    family = get_family(model.config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"outliers cannot be put into a model of type '{model.config.model_type}'", "use a model of the Llama family"
        )
    hidden = model.config.hidden_size
    wrong = [channel for channel in channels if not 0 <= channel < hidden]
    if wrong or not channels or factor <= 0:
        raise UsageError(
            f"channels {list(channels)} and factor {factor} do not fit a model of hidden size {hidden}",
            "choose other channels or a positive factor",
        )
    for block in model.get_submodule(family.blocks).children():
        for link in block_links(family, model.config, block):
            if link.kind in ("norm", "linear"):
                scale = torch.ones(channel_count(block, link), device=model.device)
                scale[[channel for channel in channels if channel < len(scale)]] = 1 / factor
                fold_scale(block, link, scale)


def write_outlier_model(source: Path, out: Path, channels: Sequence[int], factor: float) -> None:
    """Write a copy of the model in `source` with outliers to `out`; tokenizer and other small files are copied.

    Raises:
        UnsupportedModelError, UsageError: as `inject_outliers`.
        OutputError: `out` cannot be written.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.bfloat16
    )
    inject_outliers(model, channels, factor)
    with output_directory(out) as partial:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != INDEX_NAME:
                shutil.copyfile(file, partial / file.name)
        model.save_pretrained(partial)
