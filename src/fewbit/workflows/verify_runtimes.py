"""The other runtimes' half of `fewbit verify`: does a program that nobody here wrote compute the same from these files?

For a runtime r and a checkpoint C, with D the plain model of C's dequantized weights:

    truth         log-probabilities of given tokens by our runtime on C, float32, dequantizing, inputs rounded as C says
    difference    root mean square of r(C) - truth over the tokens
    floor         the same of r(D) - truth of D: what r's arithmetic alone makes of a model in which nothing is quantized; where C rounds
                  its inputs, also what BF16 makes of our own runtime (an input rounded the other way changes a token's answer);
                  where it has scales of an FP8 cache, also what FP8 makes of our own cache
    passes        difference <= 2 floors, the floor is below 0.2, and each linear answers its probes as our dequantized weight does
    control       a copy of C with one linear's scales damaged must not pass

Log-probabilities alone do not catch small errors in a layout: BF16 alone moves them by 0.03. So each linear is asked as well, with inputs
of +1 and -1 (`workers/_worker.py`); the answers may differ by sixteen roundings of the runtime's dtype, 16 eps |w| for a row w.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fewbit.checkpoints.damage import damaged_copy
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.runtimes import Kind, Runtime
from fewbit.checkpoints.sources import TensorSource
from fewbit.formats.quantize import dequantize, fake_quantize
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.formats.static import fake_quantize_static
from fewbit.results import RuntimeCheck
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model
from fewbit.workflows.foreign.processes import ForeignAnswer, ForeignJob, ask
from fewbit.workflows.foreign.workers import _worker
from fewbit.workflows.verify_plain import write_plain_for

__all__ = ["TIMEOUT_S", "Subject", "check_refusals", "check_runtime", "runtime_dtype"]

TIMEOUT_S = 1800.0
FLOORS = 2.0
_MOST_FLOOR_NATS = 0.2  # a runtime that makes more of a plain model computes another model: an error that our reader and our writer share
_LEAST_FLOOR_NATS = 1e-4  # float32 over some dozen layers; less than this is luck
_ROUNDINGS = 16.0  # a good W4A16 checkpoint in vLLM has 8.2 at most, one with a damaged linear 429
_EPS = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-8}  # float32: products of two rounded numbers, summed in any order
_DTYPES = {"transformers": "float32", "vllm": "bfloat16", "llama.cpp": "float32", "openvino": "float32"}
_PLUGINS = {"transformers": ("fewbit",), "vllm": ("fewbit.runtime.vllm_plugin:register",)}
_KV_FP8 = get_scheme("KV-FP8")
_HALF_KINDS = ("gptq", "awq", "bnb", "torchao-fp8wo", "torchao-intx4", "ct-nvfp4", "ct-mxfp4")  # kernels that compute in 16 bits only


def _imports(subject: Subject, runtime: Runtime) -> tuple[str, ...]:
    """fewbit's own layout is loaded by what fewbit tells the runtime."""
    return _PLUGINS.get(runtime.name, ()) if subject.kind.name == "fewbit" else ()


def runtime_dtype(runtime: Runtime, kind: Kind) -> str:
    """In which dtype a runtime is asked: the most exact that its kernels for the kind have."""
    half = runtime.name == "transformers" and kind.name.startswith(_HALF_KINDS)
    return "bfloat16" if half else _DTYPES[runtime.name]


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is checked.

    Attributes:
        path: a Hugging Face directory or a GGUF file.
        kind: its row of the matrix.
        source: its tensors as fewbit reads them.
    """

    path: Path
    kind: Kind
    source: TensorSource

    @property
    def scheme(self) -> Scheme:
        """What it is stored in; BF16 when nothing is quantized."""
        return self.source.scheme or get_scheme("BF16")


@torch.inference_mode()
def own_logprobs(
    source: TensorSource, scheme: Scheme, ids: Sequence[Sequence[int]], dtype: torch.dtype, *, cached: bool = False
) -> NDArray[np.float32]:
    """Log-probabilities of the windows' tokens by our own runtime, float32 [sum(len(ids) - 1)]; `cached`: through the scheme's KV cache."""
    loaded = load_model(source, QuantizationConfig(scheme, kernel="unfused" if scheme.weights is not None else None), dtype=dtype)
    parts = []
    for window in ids:
        cache = loaded.new_cache() if cached else None
        logits = loaded.model(torch.tensor([list(window)]), past_key_values=cache, use_cache=cached).logits[0, :-1]
        parts.append(_worker.log_softmax_at(logits.float().numpy(), np.array(window[1:])))
    return np.concatenate(parts)


def _expected(source: TensorSource, name: str, scheme: Scheme) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """What the linear `name` answers to its probes, and the norm of each row; None when it is not a quantized one."""
    q = source.get_quantized(name)
    if q is None:
        return None
    weight = dequantize(q).double()
    x = torch.from_numpy(_worker.probes(name, weight.shape[1]))
    inputs = scheme.input_activations
    if inputs is not None:
        x = fake_quantize(x, inputs) if q.input_scale is None else fake_quantize_static(x, q.input_scale, inputs)
    return (x.double() @ weight.T).numpy(), weight.norm(dim=1).numpy()


def differing_layers(answer: ForeignAnswer, source: TensorSource, scheme: Scheme, dtype: str) -> tuple[int, list[str]]:
    """How many linears were compared, and those whose answers differ by more than rounding, the worst first."""
    worst: dict[str, float] = {}
    compared = 0
    for name, found in answer.layers.items():
        expected = _expected(source, name, scheme)
        if expected is None:
            continue
        compared += 1
        values, norms = expected
        if found.shape != values.shape:
            worst[name] = float("inf")
            continue
        tolerance = _ROUNDINGS * _EPS[dtype] * norms + 1e-30
        excess = float(np.nan_to_num(np.abs(found - values) / tolerance, nan=np.inf).max())
        if excess > 1:
            worst[name] = excess
    return compared, sorted(worst, key=lambda name: -worst[name])


def check_runtime(
    runtime: Runtime,
    subjects: Sequence[Subject],
    ids: Sequence[Sequence[int]],
    *,
    threads: int = 1,
    timeout_s: float = TIMEOUT_S,
) -> list[RuntimeCheck]:
    """Let one runtime read checkpoints, their plain models and damaged copies, and compare.

    Args:
        runtime: an installed one.
        subjects: checkpoints; all of them are read by one process of the runtime, each in a child of its own.
        ids: token windows.
        threads: of the runtime.
        timeout_s: for all of them together.

    Raises:
        FewbitError: fewbit itself cannot read a checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="fewbit-verify-") as folder:
        jobs: list[ForeignJob] = []
        for index, subject in enumerate(subjects):
            dtype = runtime_dtype(runtime, subject.kind)
            place = Path(folder) / str(index)
            jobs += [
                ForeignJob(write_plain_for(runtime, subject.source, place / "plain"), dtype, layers=False),
                ForeignJob(subject.path, dtype, imports=_imports(subject, runtime)),
                ForeignJob(_damaged(subject, place / "damaged"), dtype, imports=_imports(subject, runtime)),
            ]
        answers = ask(runtime, jobs, ids, threads=threads, timeout_s=timeout_s)
    return [_compare(runtime, subject, ids, *answers[3 * index : 3 * index + 3]) for index, subject in enumerate(subjects)]


def _damaged(subject: Subject, to: Path) -> Path:
    """A copy with the last block's widest linear damaged."""
    source = subject.source
    linears = source.linears if isinstance(source, GgufSource) else source.quantized_linears
    names = sorted(linears, key=lambda name: (name.endswith("down_proj"), name))
    name = names[-1] if names else "model.embed_tokens"
    if isinstance(source, GgufSource):
        return damaged_copy(source.file.path, source.disk_name(f"{name}.weight").removesuffix(".weight"), to)
    return damaged_copy(subject.path, name, to)


def _rms(difference: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(difference.astype(np.float64)))))


def _compare(
    runtime: Runtime, subject: Subject, ids: Sequence[Sequence[int]], plain: ForeignAnswer, real: ForeignAnswer, damaged: ForeignAnswer
) -> RuntimeCheck:
    dtype = runtime_dtype(runtime, subject.kind)
    blank = RuntimeCheck(runtime.name, "failed", real.error or plain.error, dtype, dict(real.versions or plain.versions))
    if real.error is not None or plain.error is not None:
        return replace(blank, reason=real.error or f"the plain model does not load: {plain.error}")
    assert real.logprobs is not None and plain.logprobs is not None
    scheme = subject.scheme
    truth = own_logprobs(subject.source, scheme, ids, torch.float32)
    dequantized = replace(scheme, name="BF16", weights=None, input_activations=None)
    plain_truth = truth if scheme.input_activations is None else own_logprobs(subject.source, dequantized, ids, torch.float32)
    floor = max(_rms(plain.logprobs - plain_truth), _LEAST_FLOOR_NATS)
    if scheme.input_activations is not None:
        floor = max(floor, _rms(own_logprobs(subject.source, scheme, ids, torch.bfloat16) - truth))
    if scheme.kv_keys is not None:  # a runtime that stores the cache in FP8 rounds the same keys and values otherwise than ours
        rounded = replace(scheme, name="KV", kv_keys=_KV_FP8.kv_keys, kv_values=_KV_FP8.kv_values)
        floor = max(floor, _rms(own_logprobs(subject.source, rounded, ids, torch.float32, cached=True) - truth))
    compared, differing = differing_layers(real, subject.source, scheme, dtype)
    difference = _rms(real.logprobs - truth)
    control, control_layers = None, []
    if damaged.error is None and damaged.logprobs is not None:
        control = _rms(damaged.logprobs - truth)
        control_layers = differing_layers(damaged, subject.source, scheme, dtype)[1]
    reasons = []
    if not difference <= FLOORS * floor:
        reasons.append(f"log-probabilities differ by {difference:.3g} nats, the floor is {floor:.3g}")
    if not floor <= _MOST_FLOOR_NATS:
        reasons.append(f"even the plain model differs by {floor:.3g} nats")
    if differing:
        reasons.append(f"{len(differing)} linears compute something else, the worst is {differing[0]}")
    caught = damaged.error is not None or (control is not None and control > FLOORS * floor) or bool(control_layers)
    if not caught:
        reasons.append("a damaged copy passes as well, so that this check proves nothing")
    return replace(
        blank,
        status="failed" if reasons else "passed",
        reason="; ".join(reasons) or None,
        difference_rms_nats=difference,
        difference_max_nats=float(np.abs(real.logprobs - truth).max()),
        floor_rms_nats=floor,
        control_rms_nats=control,
        control_layers=len(control_layers),
        tokens=len(truth),
        layers_compared=compared,
        layers_differing=differing,
        duration_s=real.seconds,
    )


def check_refusals(
    runtime: Runtime, subjects: Sequence[Subject], ids: Sequence[Sequence[int]], *, threads: int = 1, timeout_s: float = TIMEOUT_S
) -> list[RuntimeCheck]:
    """Let a runtime try what the matrix says that it cannot load: `refused` in its own words, or what `check_runtime` finds.

    Args:
        runtime, subjects, ids, threads, timeout_s: as for `check_runtime`.
    """
    jobs = [
        ForeignJob(subject.path, runtime_dtype(runtime, subject.kind), layers=False, imports=_imports(subject, runtime))
        for subject in subjects
    ]
    answers = ask(runtime, jobs, ids, threads=threads, timeout_s=timeout_s)
    found = []
    for subject, job, answer in zip(subjects, jobs, answers, strict=True):
        if answer.error is not None:
            found.append(RuntimeCheck(runtime.name, "refused", answer.error, job.dtype, dict(answer.versions)))
        else:
            found += check_runtime(runtime, [subject], ids, threads=threads, timeout_s=timeout_s)
    return found
