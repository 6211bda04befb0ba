"""The result types that cross layers and go to JSON.

Every type is a frozen pydantic dataclass: it validates when it is read back, and its JSON Schema is generated from the very fields
(`src/fewbit/report/results.schema.json` is that schema, kept in the repository and compared in the tests). Units stand in the field names.
Fields are only ever added, with a default, so that older files stay readable. None means "not measured", never zero.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

__all__ = [
    "SCHEMA_VERSION",
    "BenchResults",
    "BlockReport",
    "Bound",
    "CalibrationInfo",
    "CompareResults",
    "ConvertResult",
    "Counters",
    "Environment",
    "EvaluateResults",
    "ExpertsReport",
    "FormatData",
    "FormatErrors",
    "FormatInfo",
    "FormatsResult",
    "GateResult",
    "HardwareSupport",
    "InspectResult",
    "Interval",
    "KernelInfo",
    "KernelUse",
    "KernelsReport",
    "LatencyResult",
    "LayerReport",
    "MachineResult",
    "MemoryResult",
    "ModelInfo",
    "NoiseFloor",
    "OperatorTimes",
    "PassedOverKernel",
    "ProtocolInfo",
    "QualityResult",
    "QuantizeEstimate",
    "QuantizeResult",
    "RuntimeCell",
    "RuntimeCheck",
    "SchemeKernel",
    "ShapesResult",
    "StoredFormat",
    "VariantInfo",
    "VariantResult",
    "VerifyResult",
]

SCHEMA_VERSION = 1
Bound = Literal["bandwidth", "compute", "overhead"]
_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, config=_FROZEN)
class Environment:
    """What a bug report and a reproduction need."""

    fewbit: str
    python: str
    platform: str
    cpu: str
    cpu_flags: list[str]
    cpu_cores: int
    memory_bytes: int
    device: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True, config=_FROZEN)
class MachineResult:
    """What this machine can do, measured in the same run.

    Attributes:
        read_bandwidth_gb_s: DRAM reads, 1e9 bytes per second, best of the passes.
        bandwidth_method: how it was measured.
        gemm_gflop_s: dense matrix product in `gemm_dtype`, 1e9 operations per second.
        time_per_null_op_us: time of one smallest tensor operation, the framework's overhead per operator.
    """

    read_bandwidth_gb_s: float
    bandwidth_method: str
    gemm_gflop_s: float
    gemm_dtype: str
    time_per_null_op_us: float


@dataclass(frozen=True, config=_FROZEN)
class ModelInfo:
    """Which model was measured.

    Attributes:
        source: the directory, the hub id, or `shapes:NAME`.
        weights_sha256: hash over the weight files; None for random weights.
        parameters: all parameters, tied ones counted once.
        quantizable_parameters: those in the linears that a weight scheme quantizes.
        layers_measured, layers_total: differ when only a slice of the stack was run and scaled.
    """

    source: str
    architecture: str
    parameters: int
    quantizable_parameters: int
    layers_measured: int
    layers_total: int
    weights_sha256: str | None = None
    random_weights: bool = False


@dataclass(frozen=True, config=_FROZEN)
class PassedOverKernel:
    """A faster kernel that did not run, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True, config=_FROZEN)
class KernelUse:
    """The kernel that ran, on how many linears, and why no faster one did."""

    kernel: str
    description: str
    fused: bool
    linears: int
    passed_over: list[PassedOverKernel]


@dataclass(frozen=True, config=_FROZEN)
class MemoryResult:
    """Memory of one variant.

    Attributes:
        resident_weight_bytes: all parameters and packed weights that stay resident.
        quantized_linear_bytes: of those, the quantized linears' packed weights with scales and zero points.
        quantized_linear_bf16_bytes: what the same linears take in BF16.
        disk_bytes: the checkpoint's weight files; None when no layout can hold the variant (`disk_note` says why).
        effective_bits_per_weight: over the quantized linears, scales and zero points counted.
        effective_bits_per_parameter: over the whole model, what stays in high precision counted.
        peak_rss_bytes: VmHWM of a fresh process that loads the variant and runs a prefill and a few decode steps (device: peak allocated).
        baseline_rss_bytes: of that process before the model is loaded.
        kv_bytes_per_token: marginal bytes per cached token and sequence, measured on the cache, scales and zero points included.
        kv_constant_bytes: bytes per sequence that do not grow (the residual window in high precision).
        kv_sequences_that_fit: sequences of `kv_context_tokens` in `memory_budget_bytes` beside the weights.
    """

    resident_weight_bytes: int
    quantized_linear_bytes: int
    quantized_linear_bf16_bytes: int
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    kv_bytes_per_token: float
    kv_constant_bytes: int
    kv_sequences_that_fit: int
    kv_context_tokens: int
    memory_budget_bytes: int
    disk_bytes: int | None = None
    disk_note: str = ""
    peak_rss_bytes: int | None = None
    baseline_rss_bytes: int | None = None
    peak_note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class OperatorTimes:
    """Mean decode time of one step by operator class, in milliseconds; measured in a pass of its own with timing hooks."""

    ffn_projections_ms: float
    attention_projections_ms: float
    attention_ms: float
    lm_head_ms: float
    rest_ms: float


@dataclass(frozen=True, config=_FROZEN)
class Counters:
    """Hardware counters over the decode steps; `note` says why there are none."""

    tool: str
    values: dict[str, float]
    note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class LatencyResult:
    """Latency of one variant, measured in turns with BF16 in the same process.

    Attributes:
        scaled: True when a slice of the layers was measured and the figures were scaled to the whole stack.
        decode_ms_p99: only from 100 steps on, else None.
        generate_32_ms: prefill of `generate_prompt_tokens` and 32 decoded tokens.
        speedup_over_bf16: median of the paired ratios BF16 / variant of decode time, with its interval.
        achieved_weight_gb_s: resident weight bytes read per step over the median step, 1e9 bytes per second.
        traffic_gb_s: the same with the copies that an unfused kernel writes and reads.
        read_bandwidth_gb_s: DRAM reads measured beside this row's decode steps; None in older files, whose shares refer to the machine's.
        bandwidth_share: traffic_gb_s over that bandwidth.
        compute_share: operations of the step over the machine's measured GEMM rate.
        overhead_share: time of a decode step with all linears and the cache emptied, over the median step.
        prefill_compute_share, prefill_overhead_share: the same for the prefill.
        bound, prefill_bound: named from these shares.
        runtime: who ran the passes, `engine` or `transformers`.
        runtime_reason: why not the engine; empty when it did.
    """

    prefill_tokens: int
    prefill_ms: float
    prefill_n: int
    decode_n: int
    decode_context_tokens: int
    decode_ms_p50: float
    decode_ms_p95: float
    decode_ms_p99: float | None
    generate_32_ms: float
    generate_prompt_tokens: int
    speedup_over_bf16: Interval
    prefill_speedup_over_bf16: float
    weight_bytes_per_step: int
    traffic_bytes_per_step: int
    achieved_weight_gb_s: float
    traffic_gb_s: float
    bandwidth_share: float
    compute_share: float
    overhead_share: float
    bound: Bound
    prefill_compute_share: float
    prefill_overhead_share: float
    prefill_bound: Bound
    operators: OperatorTimes
    scaled: bool = False
    counters: Counters | None = None
    read_bandwidth_gb_s: float | None = None
    runtime: str = "transformers"
    runtime_reason: str = ""


@dataclass(frozen=True, config=_FROZEN)
class ProtocolInfo:
    """How quality was measured; results with different hashes are never compared."""

    name: str
    corpus: str
    context_length: int
    stride: int
    windows: int
    scored_tokens: int
    text_sha256: str
    python: str
    seed: int
    note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class NoiseFloor:
    """BF16 against itself, evaluated in another batch shape: what differs without any quantization."""

    perplexity_delta_percent: float
    kl_divergence_nats: float
    flip_share: float


@dataclass(frozen=True, config=_FROZEN)
class QualityResult:
    """Quality of one variant against BF16 on the same tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token; interval over windows.
        perplexity_delta_percent: against BF16, from paired per-token differences.
        kl_divergence_nats: mean KL(BF16 || variant) per token.
        flip_share: share of positions whose most likely token differs from BF16's.
        passed: perplexity_delta_percent.value within `threshold_percent`.
    """

    perplexity: Interval
    perplexity_delta_percent: Interval
    kl_divergence_nats: Interval
    flip_share: Interval
    threshold_percent: float
    passed: bool


@dataclass(frozen=True, config=_FROZEN)
class VariantInfo:
    """Which quantization; `name` is unique in a results file.

    Attributes:
        compute: `exact`, or `int8-activations` where kernels were allowed to quantize their inputs on the fly (they name themselves).
        lm_head: format of the output head.
    """

    name: str
    label: str
    scheme: str
    weights: str
    input_activations: str
    kv_cache: str
    method: str
    bits_nominal: float
    compute: str = "exact"
    lm_head: str = "BF16"


@dataclass(frozen=True, config=_FROZEN)
class VariantResult:
    """One row: memory, latency and quality of the same weights in the same run. None: not measured in this run."""

    variant: VariantInfo
    kernels: list[KernelUse]
    memory: MemoryResult
    latency: LatencyResult | None = None
    quality: QualityResult | None = None


@dataclass(frozen=True, config=_FROZEN)
class ShapesResult:
    """Latency and memory on a stack of layers with random weights in real shapes, scaled to the whole model."""

    model: ModelInfo
    variants: list[VariantResult]
    note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class CompareResults:
    """The results file of `fewbit compare`.

    Attributes:
        run_id: random; the same for everything measured in this process run.
        conclusions: what the measurements support, in words, most important first.
        warnings: what makes a figure less trustworthy (a busy machine, skipped rows).
    """

    command: str
    run_id: str
    started_at: str
    duration_s: float
    environment: Environment
    machine: MachineResult
    model: ModelInfo
    variants: list[VariantResult]
    protocol: ProtocolInfo | None = None
    noise_floor: NoiseFloor | None = None
    shapes: ShapesResult | None = None
    conclusions: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, config=_FROZEN)
class EvaluateResults:
    """The quality of one model in one scheme.

    Attributes:
        model: the directory or the hub id.
        scheme, method: number formats and how the numbers were chosen.
        bits_per_byte: the loss per UTF-8 byte of the scored text; unlike perplexity comparable between tokenizers.
        quality: against BF16; None when the scheme is BF16 or no comparison was asked for.
        noise_floor: BF16 against itself, with `quality`.
    """

    model: str
    scheme: str
    method: str
    kernels: list[KernelUse]
    protocol: ProtocolInfo
    perplexity: Interval
    bits_per_byte: Interval
    weights_sha256: str | None = None
    quality: QualityResult | None = None
    noise_floor: NoiseFloor | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, config=_FROZEN)
class BenchResults:
    """Latency and memory of one scheme beside BF16, measured in turns.

    Attributes:
        rows: BF16 first, then the scheme; only BF16 when that was the scheme.
    """

    environment: Environment
    machine: MachineResult
    model: ModelInfo
    rows: list[VariantResult]
    note: str = ""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, config=_FROZEN)
class CalibrationInfo:
    """Which tokens a calibrated method saw.

    Attributes:
        source: `stdlib`, the file's name, or the data set's id.
        text_sha256: over the documents that were drawn from.
        ids_sha256: over the token ids, those held back included.
        samples, sequence_length: windows that methods are fitted to, and tokens of each.
        held_back: windows beside them, for the checks.
        chat_template_sha256: of the chat template the text was wrapped in; None for plain text.
        python: the interpreter's version, whose library the text may be.
    """

    source: str
    text_sha256: str
    ids_sha256: str
    samples: int
    held_back: int
    sequence_length: int
    seed: int
    chat_template_sha256: str | None
    python: str
    note: str = ""


@dataclass(frozen=True, config=_FROZEN)
class LayerReport:
    """What became of one linear.

    Attributes:
        name: as the checkpoint calls it. rows, columns: its weight's shape.
        bits: effective bits per weight, scales and zero points counted; 16 or 32 when it stayed in high precision.
        method: what finally chose its numbers; `high precision` when nothing that was tried passed the checks.
        rtn_error, error: relative error of its outputs on held-back calibration tokens (norm of the difference over norm of the output),
            for rounding to nearest with min-max scales and for what was written; None without calibration data.
        dampening: share of the mean diagonal that was added to the Hessian; None for methods without one.
        saturated_share: codes at either end of the grid.
        tokens: calibration tokens that reached it.
        kernel: what fewbit runs it with on this machine's CPU.
        notes: retries and fallbacks with their reasons, and what else is out of the ordinary.
    """

    name: str
    rows: int
    columns: int
    bits: float
    method: str
    rtn_error: float | None
    error: float | None
    dampening: float | None
    saturated_share: float
    tokens: int
    kernel: str
    notes: list[str]


@dataclass(frozen=True, config=_FROZEN)
class ExpertsReport:
    """How the calibration text covered the experts of one mixture (`models.experts`).

    Attributes:
        name: of the module in its block.
        tokens: calibration tokens that the router sent to each expert.
        starved: experts with fewer than `required_tokens`. lent_tokens: other tokens that each of them was calibrated on besides its own.
    """

    name: str
    tokens: list[int]
    starved: list[int]
    required_tokens: int
    lent_tokens: int


@dataclass(frozen=True, config=_FROZEN)
class BlockReport:
    """One block of the walk; `resumed` when its result was found on disk, finished by an earlier run."""

    name: str
    linears: int
    duration_s: float
    resumed: bool
    notes: list[str]
    experts: list[ExpertsReport] = Field(default_factory=list)


@dataclass(frozen=True, config=_FROZEN)
class GateResult:
    """Whether the quantized model still predicts what the model in high precision predicts, on held-out text.

    Attributes:
        outcome: `passed`, `forced` (failed, and written all the same because the user said so), `failed` or `skipped`.
        kl_nats: KL divergence to the model in high precision, mean per token; None when skipped.
        threshold_nats: what the mean may be at most.
        flip_share: tokens whose most likely next token is another one.
        perplexity, reference_perplexity: of the quantized model and of the one in high precision on the same windows.
        text: name of the text. text_sha256, ids_sha256: of the text and of the token ids.
    """

    outcome: Literal["passed", "forced", "failed", "skipped"]
    kl_nats: Interval | None = None
    threshold_nats: float | None = None
    flip_share: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    text: str = ""
    text_sha256: str = ""
    ids_sha256: str = ""
    windows: int = 0
    tokens: int = 0


@dataclass(frozen=True, config=_FROZEN)
class QuantizeEstimate:
    """What a quantization will take, known before it begins; each with the range that runs have fallen into.

    Attributes:
        peak_memory_bytes: resident memory of the process. disk_bytes: on the output's disk, when most of it is taken.
        duration_s: None when the machine was not measured.
        memory_parts, disk_parts, duration_parts: what they are made of, in the same units.
    """

    peak_memory_bytes: Interval
    disk_bytes: Interval
    duration_s: Interval | None
    memory_parts: dict[str, float]
    disk_parts: dict[str, float]
    duration_parts: dict[str, float]


@dataclass(frozen=True, config=_FROZEN)
class RuntimeCheck:
    """Whether another runtime computes the same from a checkpoint as ours does (`fewbit verify`).

    Attributes:
        runtime: transformers, vllm, llama.cpp or openvino.
        status: passed, failed, skipped where it was not asked, or refused where it was expected not to load and did not.
        reason: why it failed, was not asked or did not load; None when it passed.
        dtype: of its activations.
        versions: of the packages that took part.
        difference_rms_nats, difference_max_nats: of the tokens' log-probabilities from ours.
        floor_rms_nats: what its arithmetic alone makes of the same model without quantization.
        control_rms_nats: the difference of a damaged copy; None when it does not load at all.
        control_layers: linears of the damaged copy that computed something else.
        tokens: whose log-probabilities were compared.
        layers_compared: linears whose answers were compared. layers_differing: those that differ, the worst first.
        duration_s: loading and reading.
    """

    runtime: str
    status: str
    reason: str | None = None
    dtype: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    difference_rms_nats: float | None = None
    difference_max_nats: float | None = None
    floor_rms_nats: float | None = None
    control_rms_nats: float | None = None
    control_layers: int = 0
    tokens: int = 0
    layers_compared: int = 0
    layers_differing: list[str] = Field(default_factory=list)
    duration_s: float = 0.0


@dataclass(frozen=True, config=_FROZEN)
class VerifyResult:
    """What `fewbit verify` found.

    Attributes:
        checkpoint: as it was named.
        kind: its row in the matrix of runtimes.
        scheme: the number formats, empty when nothing is quantized.
        linears: quantized linears that were read.
        tensors: all tensors.
        compared_with: what the values were compared with: the recipe, a source, both, or empty.
        problems: what is wrong with the files, one sentence each.
        runtimes: one entry for each runtime.
        passed: no problem, and no runtime failed.
    """

    schema_version: int
    checkpoint: str
    kind: str
    scheme: str
    linears: int
    tensors: int
    compared_with: list[str]
    problems: list[str]
    runtimes: list[RuntimeCheck]
    passed: bool
    duration_s: float


@dataclass(frozen=True, config=_FROZEN)
class QuantizeResult:
    """What `fewbit quantize` wrote.

    Attributes:
        out: the checkpoint's directory.
        layout, layout_format: for example `compressed-tensors` and `pack-quantized`.
        ignored_linears: linears that stay in high precision.
        kept_tensors: source tensors that were copied as they are.
        source_bytes, checkpoint_bytes: bytes of all tensors before and after.
        effective_bits_per_weight: over the quantized linears, scales and zero points counted.
        effective_bits_per_parameter: over the whole model, what stays in high precision counted.
        settings: what the numbers depend on besides scheme and source: of the methods, versions, threads, processor.
        layers: one entry per linear, in the model's order; blocks: per block of the walk.
        calibration: None when no method needed any.
        gate: None for results older than the gate.
        estimate: what was said before the work; None for results older than it.
        peak_rss_bytes: largest resident memory of the process, mapped pages included; None where the system does not say.
        notes: what was not possible for this model.
        verify: what `--verify` found afterwards; None without it, and in the recipe on disk, which is written before.
    """

    model: str
    out: str
    scheme: str
    weights: str
    input_activations: str
    method: str
    observer: str
    layout: str
    layout_format: str
    quantized_linears: int
    ignored_linears: list[str]
    kept_tensors: int
    parameters: int
    quantized_parameters: int
    source_bytes: int
    checkpoint_bytes: int
    effective_bits_per_weight: float
    effective_bits_per_parameter: float
    duration_s: float
    source_sha256: str | None = None
    settings: dict[str, str] = Field(default_factory=dict)
    layers: list[LayerReport] = Field(default_factory=list)
    blocks: list[BlockReport] = Field(default_factory=list)
    calibration: CalibrationInfo | None = None
    gate: GateResult | None = None
    peak_rss_bytes: int | None = None
    notes: list[str] = Field(default_factory=list)
    estimate: QuantizeEstimate | None = None
    verify: VerifyResult | None = None


@dataclass(frozen=True, config=_FROZEN)
class ConvertResult:
    """What `fewbit convert` wrote.

    Attributes:
        model, out: from where, and the directory or file that was made.
        source_layout, source_scheme: of the checkpoint that was read. layout, layout_format, scheme: of the one that was written.
        quantized_linears: linears that were carried over.
        kept_tensors: tensors in high precision, unchanged.
        scales: stored scales of the source. rounded_scales: of those, the ones that the new layout cannot hold exactly.
        worst_scale_change: largest relative change of a scale.
        losses: what is not as in the source, one sentence each; empty: every integer, scale and zero point is.
        source_bytes, checkpoint_bytes: of the files' tensors.
        notes: what else there is to know.
    """

    model: str
    out: str
    source_layout: str
    source_scheme: str
    layout: str
    layout_format: str
    scheme: str
    quantized_linears: int
    kept_tensors: int
    scales: int
    rounded_scales: int
    worst_scale_change: float
    losses: list[str]
    source_bytes: int
    checkpoint_bytes: int
    duration_s: float
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True, config=_FROZEN)
class HardwareSupport:
    """Hardware that multiplies a number format without converting it first, and the document that says so."""

    hardware: str
    source: str


@dataclass(frozen=True, config=_FROZEN)
class FormatInfo:
    """One number format, before any scale.

    Attributes:
        smallest: smallest positive value.
        epsilon: distance from 1 to the next larger value of a float; None for the other types.
        code_points: all finite values in ascending order; empty for 16 bits and more.
        points_near_zero: the smallest positive values.
        native: empty: no hardware multiplies it, it is a format for storage.
    """

    name: str
    label: str
    bits: int
    minimum: float
    maximum: float
    smallest: float
    epsilon: float | None
    code_points: list[float]
    points_near_zero: list[float]
    native: list[HardwareSupport]


@dataclass(frozen=True, config=_FROZEN)
class FormatErrors:
    """What one format and granularity cost on one set of numbers.

    Attributes:
        granularity: `tensor`, `channel` or `group N`.
        effective_bits: per weight, scales counted.
        overhead_bits: effective bits without the bits of the value.
        relative_error: norm of the difference over the norm of the numbers.
        sqnr_db: signal to quantization noise, -20 log10 of it.
    """

    format: str
    granularity: str
    effective_bits: float
    overhead_bits: float
    relative_error: float
    sqnr_db: float


@dataclass(frozen=True, config=_FROZEN)
class FormatData:
    """A set of numbers [rows, columns] and what the formats cost on it; formats whose group does not divide the columns are left out."""

    name: str
    description: str
    rows: int
    columns: int
    errors: list[FormatErrors]


@dataclass(frozen=True, config=_FROZEN)
class FormatsResult:
    """What `fewbit formats` shows; `conclusions` are read off `data`."""

    formats: list[FormatInfo]
    data: list[FormatData]
    conclusions: list[str]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, config=_FROZEN)
class KernelInfo:
    """One kernel as it describes itself."""

    name: str
    description: str
    fused: bool


@dataclass(frozen=True, config=_FROZEN)
class SchemeKernel:
    """The kernel that runs a scheme here.

    Attributes:
        fused_candidates: the fused kernels that are made for the format, whether or not they run here.
        refused: every other kernel with its reason; those made for the format first.
    """

    scheme: str
    weights: str
    input_activations: str
    kernel: str
    fused: bool
    fused_candidates: list[str]
    refused: list[PassedOverKernel]


@dataclass(frozen=True, config=_FROZEN)
class KernelsReport:
    """What this machine runs, for weights of one shape."""

    cpu: str
    cpu_flags: list[str]
    torch: str
    device: str
    dtype: str
    out_features: int
    in_features: int
    kernels: list[KernelInfo]
    schemes: list[SchemeKernel]


@dataclass(frozen=True, config=_FROZEN)
class StoredFormat:
    """One format that tensors of a checkpoint are stored in (`fewbit inspect`).

    Attributes:
        format: for a person: `INT4 group 128, symmetric`, `BF16`, GGUF's `Q6_K`.
        linears, others: linear layers and other tensors in it.
        parameters: their elements. stored_bytes: on disk, scales and zero points included.
        example: the first one's name.
        kernel: which of fewbit's kernels runs its largest linear on this machine; None when none of them is a linear.
        passed_over: faster kernels, and why they do not.
    """

    format: str
    linears: int
    others: int
    parameters: int
    stored_bytes: int
    example: str
    kernel: str | None = None
    passed_over: list[PassedOverKernel] = Field(default_factory=list)


@dataclass(frozen=True, config=_FROZEN)
class RuntimeCell:
    """Whether another program loads the kind of a checkpoint on a machine without a GPU.

    Attributes:
        runtime: as people write it. loads: whether it does. reason: why not.
        proven_with: the versions with which that was tried.
    """

    runtime: str
    loads: bool
    reason: str | None
    proven_with: str


@dataclass(frozen=True, config=_FROZEN)
class InspectResult:
    """What `fewbit inspect` found in a checkpoint, from headers, the configuration and one linear of each kind.

    Attributes:
        checkpoint: as it was named.
        architecture: the model's type.
        layout: `gptq`, `gguf`, ...; `none` in high precision. kind: its row in the matrix of runtimes; None when it has none.
        scheme: the number formats by name; empty when nothing is quantized. weights, input_activations, kv_cache: in words.
        parameters: all elements. quantized_parameters: those of quantized tensors.
        stored_bytes: of all tensors.
        effective_bits_per_weight: of quantized weights, scales counted; None when there are none.
        effective_bits_per_parameter: over the whole model.
        formats: most parameters first.
        runtimes: other programs. hardware: who multiplies the formats without widening them first; empty: nobody, it is a storage format.
        problems: what contradicts itself, one sentence each. notes: what else there is to know.
    """

    schema_version: int
    checkpoint: str
    architecture: str
    layout: str
    kind: str | None
    scheme: str
    weights: str
    input_activations: str
    kv_cache: str
    parameters: int
    quantized_parameters: int
    stored_bytes: int
    effective_bits_per_weight: float | None
    effective_bits_per_parameter: float
    formats: list[StoredFormat]
    runtimes: list[RuntimeCell]
    hardware: list[HardwareSupport]
    problems: list[str]
    notes: list[str]
