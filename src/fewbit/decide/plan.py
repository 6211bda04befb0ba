"""`fewbit plan`: what becomes of every class of tensors, before a single weight is read.

A plan is arithmetic over an inventory (`models.inventory`) and a scheme: bytes before and after, scales and their axis, effective bits,
what runs it on a named device, the cache per token and per sequence, the largest batch and context that fit. Nothing in it is measured, and
nothing in it is a guess except the workspace and what a system reserves (`decide.memory`), which are rules of thumb and said to be.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace as with_fields
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fewbit.decide.memory import largest_batch, largest_context, memory_need
from fewbit.decide.serving import Serving, cache_option, serving_of
from fewbit.errors import FormatError
from fewbit.formats.sizes import bits_per_weight, scale_shape
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.models.inventory import Inventory, TensorClass
from fewbit.predict.hardware import Hardware
from fewbit.results import SCHEMA_VERSION, QuantizeEstimate

__all__ = ["FormatSize", "PlanCache", "PlanMemory", "PlanResults", "PlanRow", "make_plan"]

_FROZEN = ConfigDict(extra="forbid")
# Side by side for the whole model: name, nominal bits, the scheme that effective bytes are counted with.
_SIDE_BY_SIDE = (
    ("FP32", 32, None),
    ("BF16", 16, None),
    ("FP8", 8, "FP8"),
    ("INT8", 8, "W8A16"),
    ("INT4", 4, "W4A16"),
    ("INT2", 2, "W2A16"),
)
_CACHES = ("BF16", "KV-INT8", "KV-FP8", "KV-INT4")


@dataclass(frozen=True, config=_FROZEN)
class PlanRow:
    """One class of tensors in one target.

    Attributes:
        target: `weights`, `input activations`, `KV cache`, or `high precision` for what stays.
        tensors: dotted name, `*` for numbers. role: what they are for. count, shape: of the class; activations, cache: [tokens, width].
        format: what the values become. scales: what shares one, and their shape for one tensor.
        effective_bits: per value, scales and zero points counted.
        bytes_before, bytes_after: of all of them in 16 bit and in the format; of the cache per token; 0 for activations.
        kernel, fallback: what runs it on the hardware, and what runs where that cannot; empty without hardware.
        risk: what kind of error it makes and where that would show.
    """

    target: Literal["weights", "input activations", "KV cache", "high precision"]
    tensors: str
    role: str
    count: int
    shape: list[int]
    format: str
    scales: str
    effective_bits: float
    bytes_before: float
    bytes_after: float
    kernel: str
    fallback: str
    risk: str


@dataclass(frozen=True, config=_FROZEN)
class FormatSize:
    """The whole model in one format.

    Attributes:
        nominal_bytes: all parameters at the format's own bits.
        effective_bytes: linears with their scales, embedding, head and the rest in 16 bit (FP32: everything in 32).
        effective_bits: of those per parameter.
        note: why there is no effective figure.
    """

    format: str
    bits: int
    nominal_bytes: float
    effective_bytes: float | None
    effective_bits: float | None
    note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class PlanCache:
    """The KV cache in one format, beside the plan's weights.

    Attributes:
        bytes_per_token: that one more token of one sequence takes. bytes_per_sequence: of `context` tokens, windows counted.
        largest_batch: sequences of that length that fit on the hardware; None without hardware.
        largest_context: tokens that each of the plan's sequences can have.
        option: what switches the format on, and in which runtime.
    """

    format: str
    bytes_per_token: float
    bytes_per_sequence: float
    context: int
    largest_batch: int | None
    largest_context: int | None
    option: str


@dataclass(frozen=True, config=_FROZEN)
class PlanMemory:
    """What the hardware holds at the plan's batch and context; before: the same in BF16."""

    weights_bytes: float
    cache_bytes: float
    workspace_bytes: float
    reserved_bytes: float
    total_bytes: float
    capacity_bytes: float
    fits: bool
    total_bytes_before: float
    fits_before: bool


@dataclass(frozen=True, config=_FROZEN)
class PlanResults:
    """What `fewbit plan` answers.

    Attributes:
        parameters: exact, tied ones once. extra_parameters: stored beside the model and not loaded for ordinary inference.
        active_parameters: that one token is multiplied with. quantized_parameters: in the linears that the scheme quantizes.
        weights_bytes_before, weights_bytes_after: of the model in 16 bit and in the scheme.
        deployed_bytes_before, deployed_bytes_after: weights and the cache of `batch` sequences of `context` tokens.
        effective_bits_per_weight: over the quantized linears. effective_bits_per_parameter: over the whole model.
        kept: parameters that stay in high precision, by role.
        cost: what producing the checkpoint takes; None when it was not asked for or is not possible.
    """

    model: str
    model_type: str
    source: str
    parameters: int
    extra_parameters: int
    active_parameters: int
    quantized_parameters: int
    scheme: str
    kv_cache: str
    hardware: str
    batch: int
    context: int
    rows: list[PlanRow]
    formats: list[FormatSize]
    caches: list[PlanCache]
    weights_bytes_before: float
    weights_bytes_after: float
    deployed_bytes_before: float
    deployed_bytes_after: float
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    kept: dict[str, int]
    memory: PlanMemory | None = None
    cost: QuantizeEstimate | None = None
    cost_note: str = ""
    notes: list[str] = Field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


@cache
def _risks() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads(files("fewbit.decide").joinpath("risks.toml").read_text(encoding="utf-8"))


def make_plan(
    inventory: Inventory,
    scheme: Scheme,
    cache: Scheme | None = None,
    hardware: Hardware | None = None,
    *,
    batch: int = 1,
    context: int = 4096,
) -> PlanResults:
    """The plan of a model.

    Args:
        inventory: the model.
        scheme: formats of weights and inputs. cache: whose KV formats; the scheme's own when None.
        hardware: what it will run on; None leaves kernels and capacity out.
        batch, context: sequences at once, and tokens of each.

    Raises:
        FormatError: a group size that does not divide a linear.
    """
    cached = cache if cache is not None and cache.kv_keys is not None else scheme
    serving = serving_of(scheme, hardware) if hardware is not None else None
    rows = [*_weight_rows(inventory, scheme, serving), *_input_rows(inventory, scheme, serving), *_cache_rows(inventory, cached, hardware)]
    before, after = inventory.bytes_in(None), inventory.bytes_in(scheme.weights)
    kv = [batch * inventory.kv_bytes(context, one) for one in (None, cached)]
    quantized = inventory.quantizable_parameters if scheme.weights is not None else 0
    kept_bytes = sum(c.bytes_in(None) for c in inventory.tensors if not c.quantizable)
    kept: dict[str, int] = {}
    for one in inventory.tensors:
        if not one.quantizable:
            kept[one.role] = kept.get(one.role, 0) + one.parameters
    return PlanResults(
        model=inventory.name,
        model_type=inventory.model_type,
        source=inventory.source,
        parameters=inventory.parameters,
        extra_parameters=inventory.extra_parameters,
        active_parameters=inventory.active_parameters,
        quantized_parameters=quantized,
        scheme=scheme.name,
        kv_cache=cached.name if cached.kv_keys is not None else "BF16",
        hardware=hardware.label if hardware is not None else "",
        batch=batch,
        context=context,
        rows=rows,
        formats=[_format_size(inventory, *one) for one in _SIDE_BY_SIDE],
        caches=[_plan_cache(inventory, scheme, get_scheme(name), hardware, batch, context) for name in _CACHES] if inventory.kv else [],
        weights_bytes_before=before,
        weights_bytes_after=after,
        deployed_bytes_before=before + kv[0],
        deployed_bytes_after=after + kv[1],
        effective_bits_per_weight=8 * (after - kept_bytes) / quantized if quantized else None,
        effective_bits_per_parameter=8 * after / inventory.parameters,
        kept=kept,
        memory=_memory(inventory, scheme, cached, hardware, batch, context) if hardware is not None else None,
        notes=list(_notes(inventory, scheme, context)),
    )


def _weight_rows(inventory: Inventory, scheme: Scheme, serving: Serving | None) -> Iterator[PlanRow]:
    spec, risks = scheme.weights, _risks()
    for one in inventory.tensors:
        quantized = spec is not None and one.quantizable
        after = one.bytes_in(spec)
        risk = (
            risks["weights"].get(one.role, risks["weights"]["other"]) if quantized else risks["kept"].get(one.role, risks["kept"]["other"])
        )
        if quantized and spec is not None:
            risk = f"{risks['weights_bits'].get(str(spec.num_bits), '')}; {risk}".removeprefix("; ")
        yield PlanRow(
            target="weights" if quantized else "high precision",
            tensors=one.name,
            role=one.role,
            count=one.count,
            shape=list(one.shape),
            format=str(spec) if quantized else "BF16",
            scales=_scales(one, spec) if quantized and spec is not None else "",
            effective_bits=8 * after / one.parameters,
            bytes_before=one.bytes_in(None),
            bytes_after=after,
            kernel=f"{serving.runtime}: {serving.kernel} ({serving.path})" if serving is not None and quantized else "",
            fallback=serving.fallback if serving is not None and quantized else "",
            risk=risk,
        )


def _scales(one: TensorClass, spec: QuantSpec) -> str:
    """What shares a scale, along which axis, and how many there are."""
    along = {
        "tensor": "one for the tensor",
        "channel": "one per row (axis 0)",
        "group": f"one per {spec.group_size} of a row (axis 1)",
        "block": f"one per block {spec.block_shape}",
    }.get(spec.strategy, spec.strategy)
    shape = "" if len(one.shape) == 1 else f", shape {list(scale_shape(spec, one.shape[0], one.shape[1]))}"
    zero = "" if spec.symmetric else ", zero points of the same shape"
    return f"{spec.scale_dtype}, {along}{shape}{zero}{', and one FP32 per tensor' if spec.global_scale else ''}"


def _input_rows(inventory: Inventory, scheme: Scheme, serving: Serving | None) -> Iterator[PlanRow]:
    """Activations are quantized on the fly and not kept: they change time and error, not memory."""
    spec = scheme.input_activations
    if spec is None:
        return
    seen: set[tuple[str, int]] = set()
    for one in inventory.tensors:
        if not one.quantizable or len(one.shape) != 2 or (one.role, one.shape[1]) in seen:
            continue
        seen.add((one.role, one.shape[1]))
        kind = spec.grid_name.split("_")[0]
        yield PlanRow(
            target="input activations",
            tensors=f"inputs of {one.role} linears of width {one.shape[1]}",
            role=one.role,
            count=1,
            shape=[-1, one.shape[1]],
            format=f"{spec}, {'dynamic' if spec.dynamic else 'static'}",
            scales=f"{spec.scale_dtype}, {'one per token (axis 0)' if spec.strategy == 'token' else f'one per {spec.strategy}'}",
            effective_bits=float(spec.num_bits),
            bytes_before=0.0,
            bytes_after=0.0,
            kernel=f"{serving.runtime}: {serving.kernel} ({serving.path})" if serving is not None else "",
            fallback=serving.fallback if serving is not None else "",
            risk=_risks()["inputs"].get(kind, ""),
        )


def _cache_rows(inventory: Inventory, cached: Scheme, hardware: Hardware | None) -> Iterator[PlanRow]:
    for layers in inventory.kv:
        for what, spec in (("keys", cached.kv_keys), ("values", cached.kv_values))[: layers.tensors]:
            single = with_fields(layers, tensors=1)
            before, after = single.bytes_per_token(None, None), single.bytes_per_token(spec, None)
            runtime, option = cache_option(cached, hardware) if hardware is not None else ("", "")
            risk = "none: 16 bit" if spec is None else _risks()["cache"].get("fp8" if spec.type == "float" else f"int{spec.num_bits}", "")
            name = what if layers.tensors == 2 else "latent vectors (keys and values in one)"
            shares = "" if spec is None else f"{spec.scale_dtype}, {spec}"
            unknown = "no runtime known for this device: BF16" if hardware is not None and spec is not None else ""
            yield PlanRow(
                target="KV cache",
                tensors=f"{name} of {layers.layers} layers{f', last {layers.window} tokens' if layers.window else ''}",
                role="cache",
                count=layers.layers,
                shape=[-1, layers.heads * layers.head_dim],
                format="BF16" if spec is None else str(spec),
                scales=shares,
                effective_bits=8 * after / single.values_per_token,
                bytes_before=before,
                bytes_after=after,
                kernel=f"{runtime}: {option}" if option else unknown,
                fallback="BF16 cache" if option else "",
                risk=risk,
            )


def _format_size(inventory: Inventory, name: str, bits: int, scheme: str | None) -> FormatSize:
    nominal = inventory.parameters * bits / 8
    if scheme is None:
        return FormatSize(name, bits, nominal, nominal, float(bits))
    spec = get_scheme(scheme).weights
    assert spec is not None
    try:
        effective = inventory.bytes_in(spec)
    except FormatError as error:
        return FormatSize(name, bits, nominal, None, None, str(error))
    note = f"all parameters at {bits_per_weight(spec):g} bits" if inventory.bare else ""
    return FormatSize(name, bits, nominal, effective, 8 * effective / inventory.parameters, note)


def _plan_cache(inventory: Inventory, scheme: Scheme, cached: Scheme, hardware: Hardware | None, batch: int, context: int) -> PlanCache:
    runtime, option = cache_option(cached, hardware) if hardware is not None else ("", "")
    return PlanCache(
        format=cached.name,
        bytes_per_token=inventory.kv_bytes_per_token(cached),
        bytes_per_sequence=inventory.kv_bytes(context, cached),
        context=context,
        largest_batch=largest_batch(inventory, scheme, cached, hardware, context) if hardware is not None else None,
        largest_context=largest_context(inventory, scheme, cached, hardware, batch) if hardware is not None else None,
        option=f"{runtime}: {option}" if option else "",
    )


def _memory(inventory: Inventory, scheme: Scheme, cached: Scheme, hardware: Hardware, batch: int, context: int) -> PlanMemory:
    need = memory_need(inventory, scheme, cached, hardware, batch=batch, context=context)
    before = memory_need(inventory, get_scheme("BF16"), None, hardware, batch=batch, context=context)
    return PlanMemory(
        weights_bytes=need.weights,
        cache_bytes=need.cache,
        workspace_bytes=need.workspace,
        reserved_bytes=need.reserved,
        total_bytes=need.total,
        capacity_bytes=need.capacity,
        fits=need.fits,
        total_bytes_before=before.total,
        fits_before=before.fits,
    )


def _notes(inventory: Inventory, scheme: Scheme, context: int) -> Iterator[str]:
    yield from inventory.notes
    if inventory.quantized_as:
        yield (
            f"the published weights are stored in {inventory.quantized_as}: `before` is what they take in BF16, and quantizing them again "
            "starts from rounded weights"
        )
    if inventory.extra:
        yield (
            f"{inventory.extra_parameters:,} further parameters are stored for guessing several tokens at once, with their own copies of "
            "embedding and head; ordinary inference does not load them"
        )
    if inventory.tied:
        yield "the output head is the embedding: counted once, read in full for every token, and kept in high precision"
    if inventory.max_context is not None and context > inventory.max_context:
        yield f"a context of {context:,} tokens is beyond the {inventory.max_context:,} that the model's positions reach"
    if scheme.weights is not None and scheme.weights.num_bits == 2:
        yield "2 bits are a last resort: a larger model at 3 or 4 bits is usually better in the same memory"
