"""Give a small model the activation outliers of a large one, without changing what it computes.

Large language models have a few channels whose activations are a hundred times larger than all others (arXiv 2208.07339); small
ones do not, so activation quantization looks harmless on them. Outliers can be put in by hand: SmoothQuant's identity (arXiv
2211.10438) moves difficulty from activations to weights, and backwards it makes outliers. For every norm with gain g and every
linear W that reads its output x,

    W x = (W diag(s)^-1) (diag(s) x),      s_c = factor for the chosen channels c, 1 elsewhere

so multiplying the gain of channel c and dividing column c of the linears that follow leaves every output as it was. The same holds
between up_proj and down_proj, whose product with the gate is channel by channel. A power of two as factor changes exponents only,
and the logits stay equal to the last bit unless a number underflows.

A scale per token must then span the outlier, and the other channels keep a few integer steps: W8A8 with dynamic per-token scales
collapses, weight-only formats do not.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fewbit.checkpoints.directory import output_directory
from fewbit.checkpoints.safetensors_files import INDEX_NAME
from fewbit.errors import UnsupportedModelError, UsageError
from fewbit.models.families import Family, get_family

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
    index = torch.tensor(list(channels), device=model.device)
    blocks = list(model.get_submodule(family.blocks).children())
    for block in blocks:  # before anything is changed
        for name in {name for linears in family.norms.values() for name in linears}:
            _linear(block, name)
    for block in blocks:
        for norm, linears in family.norms.items():
            _scale_gain(block.get_submodule(norm), index, factor, family)
            for name in linears:
                _linear(block, name).weight[:, index] /= factor
        for producer, consumer in family.value_pairs:
            _scale_pair(_linear(block, producer), _linear(block, consumer), index, factor)


def _scale_pair(producer: nn.Linear, consumer: nn.Linear, index: torch.Tensor, factor: float) -> None:
    index = index[index < producer.out_features]
    producer.weight[index] *= factor
    if producer.bias is not None:
        producer.bias[index] *= factor
    consumer.weight[:, index] /= factor


def _scale_gain(norm: nn.Module, index: torch.Tensor, factor: float, family: Family) -> None:
    gain = norm.get_parameter("weight")
    gain[index] = (gain[index] + family.norm_gain_offset) * factor - family.norm_gain_offset
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias[index] *= factor


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not an nn.Linear", "use a model of the Llama family in high precision"
        )
    return module


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
