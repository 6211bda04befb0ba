"""transformers reads checkpoints: log-probabilities of given tokens, and what each quantized linear answers to the probes.

The quantizer that loads a layout is transformers' own (compressed-tensors, GPTQ and AWQ through gptqmodel, bitsandbytes, TorchAO, GGUF).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PACKAGES", "one", "prepare"]

PACKAGES = ("transformers", "torch", "compressed-tensors", "gptqmodel", "bitsandbytes", "torchao", "gguf", "fewbit")


def prepare() -> None:
    """Import what takes long, once for all checkpoints: transformers itself imports with the first use, four times as long as alone."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # gptqmodel would compile every linear, minutes for a model that is asked for a second
    import torch

    torch.set_num_threads(1)  # threads do not survive the fork; so gptqmodel, which starts some, is left to the child that needs it
    for name in ("transformers.models.llama.modeling_llama", "compressed_tensors.compressors", "bitsandbytes", "torchao.quantization"):
        with suppress(ImportError):
            importlib.import_module(name)


def _load(checkpoint: Mapping[str, Any]) -> Any:
    """The model in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    path, options = Path(checkpoint["path"]), {}
    if path.suffix == ".gguf":
        options["gguf_file"], path = path.name, path.parent
    dtype = getattr(torch, checkpoint["dtype"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **options)
    model.train(False)
    return model


def _answers(model: Any, dtype: Any, shared: Any) -> dict[str, np.ndarray]:
    """What each linear of the blocks answers to its probes; what is no linear by its attributes is left out."""
    import torch

    found = {}
    for name, module in model.named_modules():
        columns, rows = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if not isinstance(columns, int) or not isinstance(rows, int) or name.endswith("lm_head") or list(module.children()):
            continue
        y = module(torch.from_numpy(shared.probes(name, columns)).to(dtype))
        bias = getattr(module, "bias", None)
        found[f"layer:{name}"] = (y.float() - (0 if bias is None else bias.float())).reshape(-1, rows).numpy()
    return found


def one(checkpoint: Mapping[str, Any], ids: list[list[int]], shared: Any) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint."""
    import torch

    model = _load(checkpoint)
    with torch.inference_mode():
        parts = []
        for window in ids:
            logits = model(torch.tensor([window]), use_cache=False).logits[0, :-1]
            parts.append(shared.log_softmax_at(logits.float().numpy(), np.array(window[1:])))
        # compressed-tensors decompresses at the model's first forward pass, so the linears are asked after it
        arrays = _answers(model, getattr(torch, checkpoint["dtype"]), shared) if checkpoint.get("layers") else {}
    return {"logprobs": np.concatenate(parts), **arrays}
