"""The model of one step: what its operators move and compute, and how long a device needs for it.

    T = sum over operators of max(bytes / (memory * bandwidth), operations / (compute * peak))          linears, head, attention
      + operators * operator_us                                                                          launches, framework
      + keys and values / (cache * bandwidth)
      + passes over memory that a kernel path adds / (copy * bandwidth)

Decode and prefill are the same equation with different numbers: a decode step multiplies each weight with `batch` rows, a prefill with
batch x prompt rows, so the first is limited by bytes and the second by operations. The kernel path says what a format changes:

    dense     2 bytes per weight, 16-bit peak
    fused     the packed bytes, read at `read_8` or `read_4` of the 16-bit speed because they are unpacked on the way; the product itself
              still is a 16-bit one, and every block of rows unpacks all weights anew on the ordinary units:
              operations / (compute * peak) + blocks * weights * UNPACK_OPERATIONS / (unpack * vector rate). W4A16 therefore speeds
              decode up and not prefill, and the more bandwidth a device has for its vector rate the smaller the batch where it stops paying
    unfused   the packed bytes are read, a 16-bit copy is written and read again, before a dense product: slower than BF16, always
    native    the packed bytes, the low-precision peak times `native`, and a pass over the activations that quantizes them

A machine whose kernels were measured (`Hardware.rates`) has their times per weight and per cached token in place of bytes over bandwidth
and operations over peaks (`predict.rates`); the sum over operators is the same.

(Roofline: Williams, Waterman, Patterson, CACM 52(4), 2009. The constant term: what remains of a step when its bytes are gone.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbit.errors import UsageError
from fewbit.formats.sizes import bits_per_weight, storage_bytes
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.predict.efficiency import Factors
from fewbit.predict.hardware import Hardware
from fewbit.predict.outline import LinearGroup, Outline
from fewbit.predict.prediction import KernelPath, StepPoint, Term
from fewbit.results import Bound

__all__ = ["ACTIVATION_BYTES", "StepTime", "Work", "cache_scheme", "choose_path", "compute_format", "format_name", "step_time", "step_work"]

UNPACK_OPERATIONS = 4  # FP32 operations in whose time one weight is shifted, masked, converted and scaled
UNPACK_ROWS = 64  # rows of activations that share one unpacked weight before the next block unpacks it again
GEMV_ROWS = 4  # up to so many rows a matrix-vector kernel runs, which unpacks while it waits for memory
ACTIVATION_BYTES = 2
_ROUTED_FORMATS = {"fp4_e2m1": "fp4", "fp8_e4m3": "fp8", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Attended:
    """What one kind of attention layer looks at.

    Attributes:
        phase, cache: as in `StepPoint`. head_dim: of keys. group: query heads that share a key head.
        units: cached tokens (prefill: pairs of a new token and one that it sees) times key heads times layers.
    """

    phase: str
    cache: str
    head_dim: int
    group: float
    units: float


@dataclass(frozen=True)
class Work:
    """What one kind of operator of a step moves and computes.

    Attributes:
        name: as in `Term`.
        weight_bytes: packed weights. activation_bytes: inputs and outputs. copy_bytes: passes that the path adds.
        cache_bytes: keys and values.
        operations: multiplications and additions. bits: of a stored weight, which says how fast it is read.
        number_format: in which it is multiplied. unpacked: weights that are dequantized inside the product, each as often as it is.
        operators: launches.
        weights: that are read. columns: of their matrices. kernel: the scheme whose kernel multiplies them; empty without weights.
        attended: of attention.
    """

    name: str
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    copy_bytes: float = 0.0
    cache_bytes: float = 0.0
    operations: float = 0.0
    bits: float = 16.0
    number_format: str = "bf16"
    unpacked: float = 0.0
    operators: int = 0
    weights: float = 0.0
    columns: int = 1
    kernel: str = ""
    attended: tuple[Attended, ...] = ()


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step and of its terms."""

    milliseconds: float
    terms: tuple[Term, ...]
    bound: Bound
    floor_milliseconds: float


def compute_format(scheme: Scheme) -> str:
    """The format in which a scheme's products can be computed: its own when activations have one, too; 4-bit floats always."""
    weights = scheme.weights
    if weights is None:
        return "bf16"
    if scheme.input_activations is not None or weights.grid_name == "fp4_e2m1":
        return _ROUTED_FORMATS.get(weights.grid_name, "bf16")
    return "bf16"


def format_name(scheme: str) -> str:
    """What people call the weights of a scheme: `INT4` for W4A16, `BF16` where they are not quantized.

    Raises:
        UsageError: no such preset.
    """
    weights = get_scheme(scheme).weights
    if weights is None:
        return "BF16"
    return scheme.upper() if scheme.upper() in ("MXFP4", "NVFP4") else weights.grid_name.upper().removesuffix("_E4M3")


def choose_path(scheme: Scheme, hardware: Hardware, asked: KernelPath | None = None) -> KernelPath:
    """The path that runs a scheme: what was asked for, else the best that the hardware has.

    Raises:
        UsageError: `native` was asked for and the matrix units do not multiply the format.
    """
    if scheme.weights is None:
        return "dense"
    wanted = compute_format(scheme)
    native = wanted != "bf16" and hardware.multiplies(wanted)
    if asked == "native" and not native:
        raise UsageError(f"{hardware.label} does not multiply {scheme.name} natively", "leave the path out, or choose fused or unfused")
    if asked is not None and asked != "dense":
        return asked
    if native:
        return "native"
    return "fused" if scheme.input_activations is None or scheme.weights.type == "float" else "unfused"


def _stored_bytes(group: LinearGroup, spec: QuantSpec | None, *, bare: bool) -> float:
    """Bytes of one weight; a last group that is not full counts as a full one; shapes of a bare count are guessed, and not asked."""
    if spec is None:
        return 2.0 * group.weights
    if bare:
        return group.weights * bits_per_weight(spec) / 8
    columns = group.columns
    if spec.group_size is not None:
        columns = -(-columns // spec.group_size) * spec.group_size
    return float(storage_bytes(spec, group.rows, columns)) * group.columns / columns


def step_work(outline: Outline, point: StepPoint, path: KernelPath, *, weight_bytes: float | None = None) -> list[Work]:
    """What a step moves and computes, linears first.

    Args:
        path: of the quantized linears; the head is dense.
        weight_bytes: bytes of all weights that the step reads, where they are known (a file's size); scales the linears' own.

    Raises:
        UsageError: an unknown scheme, or a batch or context that is not positive.
    """
    if point.batch < 1 or point.context < 0 or (point.phase == "prefill" and point.context < 1):
        raise UsageError(
            f"batch {point.batch} and context {point.context} cannot be meant", "give a batch of 1 or more, a prompt of 1 or more"
        )
    scheme = get_scheme(point.scheme)
    tokens = point.batch * (point.context if point.phase == "prefill" else 1)
    bare = outline.inventory.bare
    linears = [_linear_work(g, scheme, path, point.batch if g.name == "lm_head" else tokens, bare=bare) for g in outline.groups]
    if weight_bytes is not None:
        scale = weight_bytes / sum(work.weight_bytes for work in linears)
        linears = [_scaled(work, scale) for work in linears]
    counted = [*linears, *_attention_work(outline, point)]
    return [*counted, Work("overhead", operators=max(outline.operators - sum(work.operators for work in counted), 0))]


def _scaled(work: Work, scale: float) -> Work:
    values = {**work.__dict__, "weight_bytes": work.weight_bytes * scale, "bits": work.bits * scale, "weights": work.weights * scale}
    return Work(**values)


def _linear_work(group: LinearGroup, scheme: Scheme, path: KernelPath, tokens: int, *, bare: bool) -> Work:
    spec = scheme.weights if group.quantizable else None
    path = path if spec is not None else "dense"
    read = group.expected_copies_read(tokens)
    packed = _stored_bytes(group, spec, bare=bare) * read
    rows = tokens * group.count
    copies = 0.0
    if path == "unfused":
        copies = 4.0 * group.weights * read  # the 16-bit copy, written and read
        if scheme.input_activations is not None:
            copies += 4.0 * rows * group.columns
    elif path == "native":
        copies = rows * group.columns * 3.0  # 16 bits read, 8 written; 4-bit formats write less
    return Work(
        name=group.name,
        weight_bytes=packed,
        activation_bytes=ACTIVATION_BYTES * rows * (group.rows + group.columns),
        copy_bytes=copies,
        operations=2.0 * group.weights * rows,
        bits=8.0 * packed / (group.weights * read),
        number_format=compute_format(scheme) if path == "native" else "bf16",
        unpacked=group.weights * read * -(-tokens // UNPACK_ROWS) if path == "fused" and tokens > GEMV_ROWS else 0.0,
        operators=group.launches * (2 if path == "unfused" else 1),
        weights=group.weights * read,
        columns=group.columns,
        kernel=scheme.name if path in ("fused", "native") else "BF16",
    )


def cache_scheme(kv: str) -> Scheme | None:
    """The preset that names a format of the cache; None for BF16.

    Raises:
        UsageError: an unknown preset, or one without a format for the cache.
    """
    if kv.upper() == "BF16":
        return None
    scheme = get_scheme(kv)
    if scheme.kv_keys is None or scheme.kv_values is None:
        raise UsageError(f"scheme '{kv}' has no format for the cache", "choose BF16, KV-INT8, KV-FP8 or KV-INT4")
    return scheme


def _attention_work(outline: Outline, point: StepPoint) -> list[Work]:
    """Scores and their sum over the cached tokens, and the reads of the cache."""
    scheme = cache_scheme(point.kv)
    if not outline.inventory.kv:
        return []
    new, before = (point.context, 0) if point.phase == "prefill" else (1, point.context)
    operations = point.batch * outline.attention_operations(new, before)
    cached = point.batch * outline.cached_bytes(before + new, scheme)
    attended = tuple(
        Attended(
            phase=point.phase,
            cache=point.kv.upper(),
            head_dim=kv.head_dim,
            group=outline.heads / kv.heads,
            units=float(point.batch * kv.layers * kv.heads) * outline.seen(new, before, kv.window),
        )
        for kv in outline.inventory.kv
    )
    return [Work("attention", cache_bytes=cached, operations=operations, operators=outline.depth, attended=attended)]


@dataclass(frozen=True)
class _Parts:
    """Milliseconds of one kind of operator: memory and compute overlap as `busy` says, the rest comes on top; `floor` is what no software
    goes below."""

    moving: float
    computing: float
    busy: float
    copying: float
    launching: float
    floor: float
    text: str


def step_time(work: list[Work], hardware: Hardware, factors: Factors) -> StepTime:
    """Time of a step on a device with these factors."""
    terms: list[Term] = []
    shares: dict[Bound, float] = {"bandwidth": 0.0, "compute": 0.0, "overhead": 0.0}
    floor = 0.0
    for one in work:
        parts = _by_rates(one, hardware, factors) or _by_sheet(one, hardware, factors)
        shares["compute" if parts.computing > parts.moving else "bandwidth"] += parts.busy
        shares["bandwidth"] += parts.copying
        shares["overhead"] += parts.launching
        floor += parts.floor
        everything = one.weight_bytes + one.activation_bytes + one.cache_bytes + one.copy_bytes
        milliseconds = parts.busy + parts.copying + parts.launching
        terms.append(Term(one.name, milliseconds, everything, one.operations, one.operators, parts.text))
    total = sum(term.milliseconds for term in terms)
    return StepTime(total, tuple(terms), max(shares, key=shares.__getitem__), floor)


def _by_sheet(one: Work, hardware: Hardware, factors: Factors) -> _Parts:
    """Bytes over the bandwidth, operations over the peak."""
    bandwidth = hardware.bandwidth_gb_s * 1e6  # bytes per millisecond
    peak = hardware.dense_tflop_s.get(one.number_format, hardware.dense_tflop_s["bf16"]) * 1e9  # operations per millisecond
    read = factors.memory * _read_speed(one.bits, factors)
    compute = factors.compute * (factors.native if one.number_format != "bf16" else 1.0)
    moving = (
        one.weight_bytes / (read * bandwidth)
        + one.activation_bytes / (factors.memory * bandwidth)
        + one.cache_bytes / (factors.cache * bandwidth)
    )
    computing = one.operations / (compute * peak) + one.unpacked * UNPACK_OPERATIONS / (factors.unpack * hardware.vector_tflop_s * 1e9)
    copying = one.copy_bytes / (factors.copy * bandwidth)
    text = f"max({moving:.4g} ms memory, {computing:.4g} ms compute) + {copying:.4g} ms passes{_launches(one, factors)}"
    floor = max((one.weight_bytes + one.cache_bytes) / bandwidth, one.operations / peak)
    return _Parts(moving, computing, max(moving, computing), copying, one.operators * factors.operator_us / 1e3, floor, text)


def _by_rates(one: Work, hardware: Hardware, factors: Factors) -> _Parts | None:
    """What was measured of the very kernels; None where nothing was."""
    rates = hardware.rates
    if rates is None:
        return None
    bandwidth = hardware.bandwidth_gb_s * 1e6
    launching = one.operators * factors.operator_us / 1e3
    if one.attended:
        known = [(a, rates.attention_ns(a.phase, a.cache, a.head_dim, a.group)) for a in one.attended]
        busy = sum(a.units * ns for a, ns in known if ns is not None) / 1e6 / factors.cache
        moving, floor = one.cache_bytes / bandwidth, one.cache_bytes / bandwidth
        computing = busy if busy > 2 * moving else 0.0  # which of the two it is bound by: reading at less than half of the bandwidth is not
        text = (
            f"{sum(a.units for a in one.attended):.4g} tokens x key heads in {busy:.4g} ms + {one.operators} x {factors.operator_us:.3g} us"
        )
        return None if any(ns is None for _, ns in known) else _Parts(moving, computing, busy, 0.0, launching, floor, text)
    kernel = rates.kernel(one.kernel) if one.kernel else ()
    if not kernel:
        return None
    memory, rest = rates.split(kernel, one.operations / (2 * one.weights), one.columns)
    memory *= rates.measured.read_bandwidth_gb_s / hardware.bandwidth_gb_s  # 1, unless another bandwidth was asked for
    speed = _read_speed(one.bits, factors)
    compute = factors.compute * (factors.native if one.number_format != "bf16" else 1.0)
    moving, computing = one.weights * memory / 1e9 / speed / factors.memory, one.weights * rest / 1e9 / speed / compute
    between = one.activation_bytes / ACTIVATION_BYTES * rates.ns_per_activation / 1e6
    copying = one.copy_bytes / (factors.copy * bandwidth)
    busy = math.hypot(moving, computing)
    text = f"hypot({moving:.4g} ms memory, {computing:.4g} ms compute) of {kernel[0].kernel} + {between + copying:.4g} ms passes"
    text += _launches(one, factors)
    floor = max(one.weight_bytes / bandwidth, one.operations / (rates.peak_tera(kernel) * 1e9))
    return _Parts(moving, computing, busy, between + copying, launching, floor, text)


def _launches(one: Work, factors: Factors) -> str:
    return f" + {one.operators} x {factors.operator_us:.3g} us"


def _read_speed(bits: float, factors: Factors) -> float:
    """Speed of reading weights of this width relative to 16-bit ones: 1 at 16, read_8 at 8, read_4 at 4 and below, linear in between."""
    if bits >= 16:
        return 1.0
    if bits >= 8:
        share = (16 - bits) / 8
        return 1.0 + share * (factors.read_8 - 1.0)
    share = (8 - max(bits, 4.0)) / 4
    return factors.read_8 + share * (factors.read_4 - factors.read_8)
