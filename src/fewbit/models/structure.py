"""Which modules a model has, found by building it without weights.

transformers knows every architecture; its modules on torch's `meta` device take no memory and no time, and tell which tensors are linear
layers that a scheme may quantize, under the very names that the runtime and the checkpoint use. No table of names has to be kept for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fewbit.errors import UnsupportedModelError

__all__ = ["build_empty_model", "is_ignored", "linear_names"]


def build_empty_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a configuration with every parameter and buffer on the `meta` device: shapes and dtypes, no memory.

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
    model.train(False)
    return model


def linear_names(config: PretrainedConfig) -> list[str]:
    """The dotted names of all `nn.Linear` modules, in the model's order; the output head (`lm_head`) is one of them.

    Raises:
        UnsupportedModelError: as `build_empty_model`.
    """
    return [name for name, module in build_empty_model(config).named_modules() if isinstance(module, nn.Linear)]


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether one of the patterns (as in the shell: `*`, `?`, `[...]`) matches the dotted module name or its last part."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern) for pattern in ignore)
