"""Load a model, quantizing while it streams: at most one linear is resident in high precision at a time.

    1. build the model that transformers knows, with parameters on the meta device (no memory) and buffers computed
    2. put a QuantLinear in the place of each nn.Linear that is not ignored
    3. tensor by tensor: read, check, quantize, pack, drop; now and then the heap's free pages go back to the system
    4. tie what the model ties

A checkpoint may call the model's parameters otherwise (`models.names`); they are found. Where transformers merges several tensors of the
disk into one parameter, it loads the model itself first, and the linears are quantized from there; `load_note` says so, since the peak
memory is then that of the high-precision model.

Tied weights: the embedding is the output head in many small models. Both keep pointing to one tensor; a head that is quantized is
packed from that tensor, and the embedding stays in high precision beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fewbit.checkpoints.sources import RenamedSource, TensorSource
from fewbit.errors import CheckpointError, FewbitError, UnsupportedModelError, UsageError
from fewbit.formats.cost import storage_bytes
from fewbit.formats.grouping import scale_shape
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.kernels.triton.environment import room_for
from fewbit.models.accounting import count_parameters, kv_shape, resident_bytes
from fewbit.models.experts import is_router, unfuse_experts
from fewbit.models.names import disk_names
from fewbit.models.structure import build_empty_model, build_without_weights
from fewbit.results import KernelUse
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.kv_cache import KVCache
from fewbit.runtime.linear import QuantLinear, kernel_uses
from fewbit.walk.heap import trim_heap

__all__ = ["LoadedModel", "check_fits", "load_model"]

_TRIM_BYTES = 1 << 30  # of high-precision weights read: what packing them leaves behind in the heap goes back to the system
_SMALL = 1 << 25  # parameters: below, a call takes longer than it is worth


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: evaluation mode, no gradients.
        config: transformers' configuration.
        quantization: how its linears run.
        source: where its weights came from.
        scheme: the number formats; `new_cache` follows it.
        dtype: of activations and of what stays in high precision.
        kernel_uses: which kernel runs how many linears, and why no faster one does.
        resident_weight_bytes: all parameters, packed weights and buffers that stay resident; what is tied counts once.
        quantized_linear_bytes: of those, the packed weights of the quantized linears.
        quantized_linear_bf16_bytes: what the same linears would take in BF16.
        effective_bits_per_weight: of the format over the quantized linears, scales and zero points counted; None when none is quantized.
        effective_bits_per_parameter: over the whole model.
        parameters: all parameters, tied ones once.
        quantizable_parameters: weights of the linears that the configuration does not ignore.
        load_note: what is out of the ordinary; empty when nothing is.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    quantization: QuantizationConfig
    source: TensorSource
    scheme: Scheme
    dtype: torch.dtype
    kernel_uses: tuple[KernelUse, ...]
    resident_weight_bytes: int
    quantized_linear_bytes: int
    quantized_linear_bf16_bytes: int
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    parameters: int
    quantizable_parameters: int
    load_note: str = ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer, which reads it when it is first asked for.

        Raises:
            ModelNotFoundError: the source has none.
        """
        return self.source.tokenizer()

    def new_cache(self, *, shadow: bool = False) -> KVCache:
        """An empty KV cache in the scheme's format; see `KVCache` for `shadow`."""
        return KVCache(self.config, self.scheme, self.dtype, shadow=shadow)


def load_model(
    source: TensorSource, config: QuantizationConfig, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LoadedModel:
    """Load the model of `source` with its linears in the formats of `config`.

    Args:
        source: a checkpoint or random weights (`checkpoints.sources.open_source`). A checkpoint that is quantized already is loaded as
            it is under its own scheme (`source.scheme`), and dequantized under a scheme without weight format.
        config: formats, kernel and what stays in high precision.
        device: where the model runs.
        dtype: of activations and of what stays in high precision: torch.bfloat16, float16 or float32.

    Raises:
        UnsupportedModelError: an architecture that transformers does not know, or whose linears are not nn.Linear.
        CheckpointError: missing, damaged, NaN or infinite tensors, or shapes that contradict the configuration.
        FormatError: a format that does not fit a layer, for example a group size that does not divide; the layer is named.
        KernelError: no kernel runs the format here, or a fallback under `strict`; or the GPU has too little memory.
        UsageError: the checkpoint is quantized in another format than the one asked for.
    """
    with room_for("the model's weights", device, "choose a scheme with fewer bits or a device with more memory (`fewbit plan`)"):
        return _load_model(source, config, device, dtype)


def _load_model(source: TensorSource, config: QuantizationConfig, device: str, dtype: torch.dtype) -> LoadedModel:
    _check_scheme(source, config)
    given, model = source, build_without_weights(source.config, dtype=dtype)
    source = RenamedSource(given, disk_names(model, given.names()))
    tied = _tied_names(model, source)
    missing, unexpected = _compare_names(model, source, tied)
    notes = []
    if missing or unexpected:
        model = _load_by_transformers(source, dtype, missing)
        tied = dict(model.all_tied_weights_keys)
        parameters = count_parameters(model, tied)
        linears = _swap_linears(model, config, source, device, dtype)
        notes.append("loaded in high precision by transformers first: the checkpoint's names are not the model's")
    else:
        parameters = count_parameters(model, tied)
        dtypes = _parameter_dtypes(model, dtype)
        linears = _swap_linears(model, config, source, device, dtype)
        _stream(model, linears, source, tied, dtypes, device)
    _tie(model, linears, tied)
    nn.Module.to(model, device)
    model.train(False).requires_grad_(False)
    generation_config = source.generation_config()
    if generation_config is not None:
        model.generation_config = generation_config
    notes.extend(_unquantized_notes(model, config))
    if parameters >= _SMALL:
        trim_heap()
    return _describe(model, linears, given, config, dtype, parameters, "; ".join(notes))


def check_fits(source: TensorSource, config: QuantizationConfig, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise what `load_model` would raise about formats and kernels, in a moment and without reading a weight.

    Raises:
        UnsupportedModelError, FormatError, KernelError, UsageError: as `load_model`; the layer is named.
    """
    _check_scheme(source, config)
    _swap_linears(build_empty_model(source.config, dtype=dtype), config, source, device, dtype)
    cache = KVCache(source.config, config.scheme, dtype)
    _, heads, head_dim = kv_shape(source.config)
    token = torch.zeros(1, heads, 1, head_dim, dtype=dtype)
    cache.update(token, token, 0)


def _check_scheme(source: TensorSource, config: QuantizationConfig) -> None:
    if source.scheme is not None and config.scheme.weights is not None and config.scheme.weights != source.scheme.weights:
        raise UsageError(
            f"'{source.describe()}' is quantized already ({source.scheme.weights}); as {config.scheme.name} it would be rounded twice",
            "load it under its own scheme, or quantize the high-precision model",
        )


# ------------------------------------------------------------------------------------------------------- the empty model


def _tied_names(model: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """Target to origin. What the configuration ties but differs in the checkpoint is not tied, as in transformers."""
    given = set(source.names())
    pairs = model.all_tied_weights_keys.items()
    return {t: o for t, o in pairs if not (t in given and o in given) or torch.equal(source.get(t), source.get(o))}


def _parameter_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each floating-point tensor: `dtype`, except for modules that their authors keep in FP32."""
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(keep))) if keep else None
    return {
        name: torch.float32 if pattern and pattern.search(name) else dtype
        for name, t in model.state_dict().items()
        if t.is_floating_point()
    }


def _swap_linears(
    model: nn.Module, config: QuantizationConfig, source: TensorSource, device: str, dtype: torch.dtype
) -> dict[str, QuantLinear]:
    """Put a QuantLinear in the place of each nn.Linear that is not ignored; a weight that is there already moves into it."""
    as_stored = source.scheme is not None and config.scheme.weights is not None
    swapped: dict[str, QuantLinear] = {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            continue
        if config.is_ignored(name) or (is_router(name) and name not in source.quantized_linears):
            continue
        if as_stored and name not in source.quantized_linears and not config.is_head(name):
            continue  # the checkpoint keeps it in high precision
        method = config.get_quant_method(linear, name)
        assert method is not None
        with _naming_the_layer(name):
            layer = QuantLinear(linear.in_features, linear.out_features, method, dtype=dtype, device=device)
            if method.request.weights is not None:
                scale_shape(method.request.weights, linear.out_features, linear.in_features)  # raises when a group size does not divide
            if linear.bias is not None:
                layer.bias = linear.bias
            if linear.weight.device.type != "meta":
                method.load_weight(layer, _checked(linear.weight.detach(), f"{name}.weight"))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        swapped[name] = layer
    if config.lm_head is not None and not any(config.is_head(name) for name in swapped):
        raise UnsupportedModelError(f"{type(model).__name__} has no linear called lm_head", "leave the format of the output head out")
    if not swapped and config.scheme.weights is not None:
        kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, Conv1D)})
        what = f"; its linears are {', '.join(kinds)}" if kinds else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.Linear that {config.scheme.name} could quantize{what}", "choose another model"
        )
    return swapped


@contextmanager
def _naming_the_layer(name: str) -> Iterator[None]:
    """Errors about numbers and kernels do not know where they happen; add the layer's name."""
    try:
        yield
    except FewbitError as error:
        if name in error.problem:
            raise
        raise type(error)(f"{name}: {error.problem}", error.remedy) from error


# ------------------------------------------------------------------------------------------------------------- the tensors


def _compare_names(model: PreTrainedModel, source: TensorSource, tied: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What the model needs and the source lacks; what the source has and the model does not know."""
    expected, given = set(model.state_dict()), set(source.names())
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    unexpected = [name for name in given - expected if not any(re.search(pattern, name) for pattern in patterns)]
    groups: dict[str, set[str]] = {}
    for target, origin in tied.items():
        groups.setdefault(origin, {origin}).add(target)
    satisfied = {name for group in groups.values() if group & given for name in group}
    return sorted(expected - given - satisfied), sorted(unexpected)


def _load_by_transformers(source: TensorSource, dtype: torch.dtype, missing: list[str]) -> PreTrainedModel:
    """The whole model in high precision, by transformers, which knows how older names map to newer ones."""
    problem = f"'{source.describe()}' lacks {len(missing)} tensors of its architecture, the first is {missing[0]}" if missing else ""
    remedy = "the weights belong to another configuration, or a shard is missing"
    if source.directory is None or source.scheme is not None:
        raise CheckpointError(problem or f"'{source.describe()}' has tensors that its architecture does not know", remedy)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load '{source.describe()}': {first[:200]}", remedy) from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = loaded[0]
    info: dict[str, set[str]] = loaded[1]
    lost = sorted(info["missing_keys"])
    unknown = sorted(info["unexpected_keys"])
    if lost:
        raise CheckpointError(f"'{source.describe()}' lacks {len(lost)} tensors of its architecture, the first is {lost[0]}", remedy)
    if unknown:
        raise CheckpointError(
            f"'{source.describe()}' has {len(unknown)} tensors that its architecture does not know, the first is {unknown[0]}", remedy
        )
    for name, parameter in model.named_parameters():
        _checked(parameter.detach(), name)
    unfuse_experts(model)
    return model


def _stream(
    model: PreTrainedModel,
    linears: Mapping[str, QuantLinear],
    source: TensorSource,
    tied: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    device: str,
) -> None:
    """Read tensor by tensor; a linear's weight is packed and dropped before the next one is read."""
    names, given = set(model.state_dict()), set(source.names())
    unpacked = 0
    for name in source.names():
        if unpacked > _TRIM_BYTES:
            trim_heap()
            unpacked = 0
        if tied.get(name) in given:
            continue  # a copy of what it is tied to
        target = tied.get(name, name)  # whichever of the tied names the checkpoint has, its tensor becomes the origin
        prefix, _, leaf = target.rpartition(".")
        if leaf == "weight" and prefix in linears:
            layer = linears[prefix]
            with _naming_the_layer(prefix):
                layer.quant_method.load_weight(layer, _linear_weight(source, prefix, layer))
            unpacked += layer.out_features * layer.in_features * dtypes.get(target, torch.float32).itemsize
        elif target in names:
            tensor = _checked(source.get(name), name)
            _set(model, target, tensor.to(device=device, dtype=dtypes.get(target, tensor.dtype)))


def _linear_weight(source: TensorSource, prefix: str, layer: QuantLinear) -> torch.Tensor | QuantizedTensor:
    quantized = source.get_quantized(prefix)
    if quantized is not None and layer.quant_method.request.weights is not None:
        return quantized
    weight = _checked(source.get(f"{prefix}.weight"), f"{prefix}.weight")
    if not weight.is_floating_point():
        raise CheckpointError(
            f"tensor {prefix}.weight holds {weight.dtype} numbers and config.json says nothing of a quantized layout",
            "name the high-precision model, or a compressed-tensors checkpoint with its quantization_config",
        )
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise _wrong_shape(f"{prefix}.weight", weight.shape, torch.Size((layer.out_features, layer.in_features)))
    return weight


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of that name."""
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    present = getattr(module, leaf)
    if present.shape != tensor.shape:
        raise _wrong_shape(name, tensor.shape, present.shape)
    if isinstance(present, nn.Parameter):
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(leaf, tensor)


def _wrong_shape(name: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} has shape {list(found)}, the configuration says {list(expected)}", "the weights belong to another configuration"
    )


def _checked(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Refuse NaN and infinity. The extremes of a tensor with a NaN are NaN, and they need no mask of the tensor's size."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = (~torch.isfinite(tensor.flatten().float())).nonzero().flatten()
            raise CheckpointError(
                f"tensor {name} has {len(bad)} NaN or infinite values of {tensor.numel()}, the first at flat index {int(bad[0])}",
                "the checkpoint is damaged: repair or download it again",
            )
    return tensor


def _tie(model: PreTrainedModel, linears: Mapping[str, QuantLinear], tied: Mapping[str, str]) -> None:
    """Let tied names (target to origin) share one tensor; a quantized linear is packed from it."""
    for target, origin in tied.items():
        prefix, _, leaf = target.rpartition(".")
        if prefix in linears:
            layer = linears[prefix]
            with _naming_the_layer(prefix):
                layer.quant_method.load_weight(layer, model.get_parameter(origin).detach())
        else:
            setattr(model.get_submodule(prefix), leaf, model.get_parameter(origin))


# ---------------------------------------------------------------------------------------------------------- the description


def _unquantized_notes(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """What a weight scheme does not reach though it is a large matrix."""
    if config.scheme.weights is None:
        return []
    stacked = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 3}
    others = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    notes = []
    if stacked:
        notes.append(
            f"not quantized: {sum(stacked.values()):,} parameters of experts in {len(stacked)} 3-D tensors ({next(iter(stacked))}, ...)"
        )
    if others:
        notes.append(f"not quantized: {len(others)} Conv1D layers ({others[0]}, ...)")
    return notes


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _format_bytes(spec: QuantSpec, layer: QuantLinear) -> int:
    return storage_bytes(spec, layer.out_features, layer.in_features, has_g_idx=layer.quant_method.request.has_g_idx)


def _describe(
    model: PreTrainedModel,
    linears: Mapping[str, QuantLinear],
    source: TensorSource,
    config: QuantizationConfig,
    dtype: torch.dtype,
    parameters: int,
    note: str,
) -> LoadedModel:
    quantized = [(layer, spec) for layer in linears.values() if (spec := layer.quant_method.request.weights) is not None]
    weights = sum(layer.in_features * layer.out_features for layer, _ in quantized)
    format_bytes = sum(_format_bytes(spec, layer) for layer, spec in quantized)
    high_precision = list(model.parameters())
    dense = [
        t for layer in linears.values() if layer.quant_method.request.weights is None for t in layer.quant_method.packed(layer).values()
    ]
    shared = {p.untyped_storage().data_ptr() for p in high_precision}
    kept = [*high_precision, *(t for t in dense if t.untyped_storage().data_ptr() not in shared)]
    high_precision_bytes = sum(t.numel() * t.itemsize for t in kept)
    return LoadedModel(
        model=model,
        config=source.config,
        quantization=config,
        source=source,
        scheme=config.scheme,
        dtype=dtype,
        kernel_uses=tuple(kernel_uses(model)),
        resident_weight_bytes=resident_bytes(_tensors(model)),
        quantized_linear_bytes=resident_bytes(t for layer, _ in quantized for t in layer.quant_method.packed(layer).values()),
        quantized_linear_bf16_bytes=2 * weights,
        effective_bits_per_weight=8 * format_bytes / weights if weights else None,
        effective_bits_per_parameter=8 * (format_bytes + high_precision_bytes) / parameters,
        parameters=parameters,
        quantizable_parameters=sum(layer.in_features * layer.out_features for layer in linears.values()),
        load_note=note,
    )
