"""Which modules a model has, found by building it without weights.

transformers knows every architecture; its modules on torch's `meta` device take no memory and no time, and tell which tensors are linear
layers that a scheme may quantize, under the very names that the runtime and the checkpoint use. No table of names has to be kept for that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fewbit.errors import UnsupportedModelError
from fewbit.models.experts import unfuse_experts
from fewbit.models.families import get_family

__all__ = ["block_list_name", "build_empty_model", "build_without_weights", "is_ignored", "linear_names"]


def build_empty_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a configuration with every parameter and buffer on the `meta` device: shapes and dtypes, no memory.

    Experts that transformers stacks are lists of linears here (`models.experts`), as everywhere in fewbit.

    Args:
        config: of a causal language model that transformers itself knows; code from the checkpoint is never run.
        dtype: dtype of the parameters.

    Raises:
        UnsupportedModelError: transformers knows no causal language model of this type, or the configuration contradicts itself.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"transformers cannot build a causal language model of type '{config.model_type}': {reason}",
            "check config.json, or upgrade transformers if the architecture is newer than it",
        ) from error
    unfuse_experts(model)
    model.train(False)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are constructed inside get parameters without memory; their buffers (rotary frequencies) are computed as usual."""
    original = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_without_weights(config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a configuration with parameters on the `meta` device and buffers computed: ready to be given its weights.

    Args:
        config: as in `build_empty_model`; a `quantization_config` in it is not looked at.
        dtype: dtype of the parameters.

    Raises:
        UnsupportedModelError: as `build_empty_model`.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the linears are ours
    try:
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        build_empty_model(config)  # fails the same way, and says so in words
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"a model of type '{config.model_type}' with this configuration cannot be built: {reason}", "check the sizes in config.json"
        ) from error
    unfuse_experts(model)
    model.train(False)
    return model


def block_list_name(model: nn.Module, model_type: str) -> str:
    """The dotted name of the list of blocks: from the family's row, else the longest list of modules of one class.

    Args:
        model: with or without weights.
        model_type: transformers' name of the architecture.

    Raises:
        UnsupportedModelError: the model has no list of at least one block.
    """
    family = get_family(model_type)
    if family is not None:
        try:
            if isinstance(model.get_submodule(family.blocks), nn.ModuleList):
                return family.blocks
        except AttributeError:
            pass  # the same type with another head or wrapper: look for the list
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    # Lists inside of blocks (a mixture's experts) are not what is looked for, however long they are.
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    alike = {name: len(module) for name, module in outer.items() if len({type(child) for child in module}) == 1}
    if not alike:
        raise UnsupportedModelError(
            f"a model of type '{model_type}' has no list of equal blocks to walk through",
            "use a method that needs no calibration, and no gate",
        )
    longest: str = max(alike, key=alike.__getitem__)
    return longest


def linear_names(config: PretrainedConfig) -> list[str]:
    """The dotted names of all `nn.Linear` modules, in the model's order; the output head (`lm_head`) is one of them.

    Raises:
        UnsupportedModelError: as `build_empty_model`.
    """
    return [name for name, module in build_empty_model(config).named_modules() if isinstance(module, nn.Linear)]


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether one of the patterns (as in the shell: `*`, `?`, `[...]`) matches the dotted module name or its last part."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern) for pattern in ignore)
