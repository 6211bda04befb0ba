"""What a variant takes: weights, cache, peak.

Resident bytes are summed over the tensors that are there. KV bytes per token are read off a cache that a prompt went through, not
computed from the configuration. The peak is measured in a process of its own per variant, because a process never gives its high-water
mark back: the second variant measured in it would show the first one's.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO

import torch

from fewbit.bench.overhead import linears
from fewbit.bench.scaling import LayerScale, decoder_blocks
from fewbit.bench.traffic import linear_bytes
from fewbit.errors import MeasurementError
from fewbit.formats.cost import storage_bytes
from fewbit.models.accounting import resident_bytes
from fewbit.results import MemoryResult
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.runner import RuntimeChoice, make_runner

__all__ = ["PeakMeter", "PeakRequest", "measure_peak", "memory_result", "sequences_that_fit"]

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class PeakRequest:
    """Which variant is loaded and run in a fresh process.

    Attributes:
        scheme: name of a preset of `formats.spec.SCHEMES`.
        model: a local directory or hub id; None for the bundled reference model (when `shapes` is None, too).
        shapes: random weights in these shapes instead of a model.
        num_layers: layers of `shapes`; None for all.
        kernel: None for the fastest, `unfused`, or a kernel's name.
        prompt_tokens, decode_steps: what is run after loading; together at most the positions that the model has.
        device: where it runs.
        threads: torch threads.
        compute, lm_head: as in `runtime.config.QuantizationConfig`, the head by its name.
        runtime: as in `runtime.runner.make_runner`.
    """

    scheme: str
    model: str | None = None
    shapes: str | None = None
    num_layers: int | None = None
    kernel: str | None = None
    prompt_tokens: int = 128
    decode_steps: int = 2
    device: str = "cpu"
    threads: int = 1
    compute: str = "exact"
    lm_head: str | None = None
    runtime: RuntimeChoice = "auto"


class PeakMeter:
    """Measures peaks, each in a fresh process; a context manager that keeps one worker ready.

    The worker starts in a few seconds (it imports torch and transformers) and on Linux serves all requests, each in a fork of its own.

    Args:
        timeout_s: a request that takes longer is an error.
    """

    def __init__(self, timeout_s: float = 900.0) -> None:
        self._timeout_s = timeout_s
        self._worker: subprocess.Popen[str] | None = None
        self._stderr: IO[str] | None = None

    def __enter__(self) -> PeakMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def measure(self, request: PeakRequest) -> tuple[int, int]:
        """(peak, baseline) in bytes: the highest resident memory of a process that loads and runs the variant, and what it had before.

        Raises:
            MeasurementError: the worker failed; the message has its last line.
        """
        return self.measure_call("fewbit.bench.peak_worker:load_and_run", [asdict(request)])

    def measure_call(self, call: str, arguments: Sequence[object]) -> tuple[int, int]:
        """The same for any importable function, `package.module:function`, with arguments that JSON can hold."""
        worker = self._started()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps({"call": call, "arguments": list(arguments)}) + "\n")
            worker.stdin.flush()
            ready, _, _ = select.select([worker.stdout], [], [], self._timeout_s)
            line = worker.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line is None:
            self._stop()
            raise MeasurementError(f"the process that measures peak memory did not answer in {self._timeout_s:.0f} s")
        if not line.strip():
            last = self._last_error_line()
            self._stop()
            raise MeasurementError(f"the process that measures peak memory ended without an answer: {last}")
        if sys.platform != "linux":
            self._stop()
        document = json.loads(line)
        if "error" in document:
            raise MeasurementError(f"the process that measures peak memory failed: {document['error']}")
        return int(document["peak_bytes"]), int(document["baseline_bytes"])

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            # The worker must find this very package, installed or not.
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - lives as long as the worker
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "fewbit.bench.peak_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        return self._worker

    def _last_error_line(self) -> str:
        if self._worker is not None:
            self._worker.wait(timeout=10)
        if self._stderr is None:
            return "no message"
        self._stderr.seek(0)
        return next((line.strip() for line in reversed(self._stderr.readlines()) if line.strip()), "no message")

    def _stop(self) -> None:
        if self._worker is not None:
            if self._worker.poll() is None:
                self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None and not pipe.closed:
                    _close_quietly(pipe)
        if self._stderr is not None:
            self._stderr.close()
        self._worker, self._stderr = None, None


def _close_quietly(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # a request that the killed worker never read


def measure_peak(request: PeakRequest) -> tuple[int, int]:
    """(peak, baseline) of one variant; for several, keep a `PeakMeter`, which starts its worker once.

    Raises:
        MeasurementError: the worker failed; the message has its last line.
    """
    with PeakMeter() as meter:
        return meter.measure(request)


def sequences_that_fit(*, budget_bytes: int, weight_bytes: int, context: int, kv_bytes_per_token: float, kv_constant_bytes: int) -> int:
    """floor((budget - weights) / (context * bytes per token + constant)), never negative."""
    per_sequence = context * kv_bytes_per_token + kv_constant_bytes
    return max(int((budget_bytes - weight_bytes) // per_sequence), 0)


def memory_result(
    loaded: LoadedModel,
    *,
    context: int,
    budget_bytes: int,
    disk_bytes: int | None = None,
    disk_note: str = "",
    peak: tuple[int, int] | None = None,
    peak_note: str = "",
    scale: LayerScale | None = None,
    runtime: RuntimeChoice = "auto",
) -> MemoryResult:
    """The memory figures of one variant.

    Args:
        loaded: the variant. context: tokens of the sequences that are fitted. budget_bytes: memory that weights and sequences share.
        disk_bytes, disk_note: the checkpoint's weight files, or why there are none. peak, peak_note: (peak, baseline) of
        `PeakMeter.measure`, or why there is none. scale: to the whole stack, when `loaded` is a slice. The scaled peak is the slice's
        and the resident bytes of the layers that are missing. runtime: whose cache is measured.
    """
    scale = scale or LayerScale(1, 1)
    factor = scale.layers_total / scale.layers_measured
    stack = _Stack.of(loaded)
    missing = round(stack.resident_bytes * (factor - 1))
    resident = loaded.resident_weight_bytes + missing
    quantized, quantized_bf16 = _quantized_linears(loaded, scale)
    runner = make_runner(loaded, runtime)
    cache = runner.new_cache(_PROBE_TOKENS)
    runner.prefill(torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=loaded.model.device), cache)
    per_token, constant = cache.bytes_per_token() * factor, round(cache.constant_bytes() * factor)
    return MemoryResult(
        resident_weight_bytes=resident,
        quantized_linear_bytes=quantized,
        quantized_linear_bf16_bytes=quantized_bf16,
        effective_bits_per_weight=loaded.effective_bits_per_weight,
        effective_bits_per_parameter=_bits_per_parameter(loaded, stack, scale),
        kv_bytes_per_token=per_token,
        kv_constant_bytes=constant,
        kv_sequences_that_fit=sequences_that_fit(
            budget_bytes=budget_bytes, weight_bytes=resident, context=context, kv_bytes_per_token=per_token, kv_constant_bytes=constant
        ),
        kv_context_tokens=context,
        memory_budget_bytes=budget_bytes,
        disk_bytes=disk_bytes,
        disk_note=disk_note,
        peak_rss_bytes=peak[0] + missing if peak else None,
        baseline_rss_bytes=peak[1] if peak else None,
        peak_note=peak_note,
    )


@dataclass(frozen=True)
class _Stack:
    """The layers that were loaded.

    Attributes:
        resident_bytes: their tensors.
        parameters: a quantized linear counts the weights that it stands for.
        quantized_weights: of those, the weights in quantized linears.
        format_bits: what these take in their formats.
    """

    resident_bytes: int
    parameters: int
    quantized_weights: int
    format_bits: float

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Stack:
        blocks = decoder_blocks(loaded.model)[1]
        quant = [module for _, module in linears(blocks) if isinstance(module, QuantLinear)]
        formats = [(m, spec) for m in quant if (spec := m.quant_method.request.weights) is not None]
        return cls(
            resident_bytes=resident_bytes((*blocks.parameters(), *blocks.buffers())),
            parameters=sum(p.numel() for p in blocks.parameters()) + sum(m.in_features * m.out_features for m in quant),
            quantized_weights=sum(m.in_features * m.out_features for m, _ in formats),
            format_bits=8.0
            * sum(storage_bytes(s, m.out_features, m.in_features, has_g_idx=m.quant_method.request.has_g_idx) for m, s in formats),
        )


def _bits_per_parameter(loaded: LoadedModel, stack: _Stack, scale: LayerScale) -> float:
    """Over the whole stack: the quantized linears at their format's bits, everything else in the model's dtype."""
    if not scale.is_scaled:
        return loaded.effective_bits_per_parameter
    kept_bits = loaded.dtype.itemsize * 8 * (stack.parameters - stack.quantized_weights)
    stack_bits = kept_bits + stack.format_bits
    bits = scale.scale(loaded.effective_bits_per_parameter * loaded.parameters, stack_bits)
    return bits / scale.scale(loaded.parameters, stack.parameters)


def _quantized_linears(loaded: LoadedModel, scale: LayerScale) -> tuple[int, int]:
    """(resident bytes, BF16 bytes) of the quantized linears of the whole stack; both 0 when nothing is quantized."""
    prefix = decoder_blocks(loaded.model)[0] + "."
    factor = scale.layers_total / scale.layers_measured
    resident, bf16 = 0.0, 0.0
    for name, module in linears(loaded.model):
        if isinstance(module, QuantLinear) and module.quant_method.request.weights is not None:
            copies = factor if name.startswith(prefix) else 1.0
            resident += linear_bytes(module)[0] * copies
            bf16 += 2 * module.in_features * module.out_features * copies
    return round(resident), round(bf16)
