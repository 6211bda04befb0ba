"""`fewbit bench`: latency and memory of one scheme against BF16, or what the machine itself can do.

from fewbit.workflows.bench import bench

results = bench(shapes="qwen2.5-1.5b", scheme="W4A16")
print(results.rows[-1].latency.speedup_over_bf16)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewbit.bench.engine_rates import measure_engine_rates
from fewbit.bench.machine import measure_machine
from fewbit.bench.memory import PeakMeter
from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.kernels.base import Compute
from fewbit.results import BenchResults, MachineResult
from fewbit.runtime.load import check_fits
from fewbit.workflows.environment import environment
from fewbit.workflows.section import ProgressCallback, Section, SectionSettings, Steps, Subject
from fewbit.workflows.variants import BASELINE, Variant, with_options

__all__ = ["bench", "bench_machine"]


def bench_machine(progress: ProgressCallback | None = None, *, kernels: Sequence[tuple[str, Compute]] | None = None) -> MachineResult:
    """Read bandwidth, GEMM rate, time per operator of this machine, and the rates of the kernels that run; about a minute.

    Args:
        progress: called with (steps done, steps in all, what is next).
        kernels: (scheme, compute mode) to measure; everything that fewbit has a kernel of its own for when None.
    """
    return replace(measure_machine(), rates=measure_engine_rates(kernels=kernels, progress=progress))


def bench(
    model: str | Path | None = None,
    *,
    shapes: str | None = None,
    scheme: str = "W4A16",
    kernel: str | None = None,
    compute: str = "exact",
    lm_head: str | None = None,
    settings: SectionSettings | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> BenchResults:
    """Measure latency and memory of one scheme, in turns with BF16.

    Args:
        model: a local Hugging Face directory or a hub id; the bundled reference model when None.
        shapes: random weights in these real shapes instead of a model; a slice of the layers runs and is scaled to the whole stack.
        scheme: a preset of `formats.spec.SCHEMES`.
        kernel: a kernel's name, or `unfused`; the fastest when None.
        compute, lm_head: see `variants.with_options`.
        settings: how much is measured.
        seed: of random weights and random tokens.
        progress: called with (steps done, steps in all, what is next).

    Raises:
        UsageError: both a model and shapes, or an unknown scheme, shape or kernel.
        ModelError, CheckpointError, FormatError, KernelError, MeasurementError: input that cannot be used or measured.
    """
    if model is not None and shapes is not None:
        raise UsageError(f"both a model ('{model}') and --shapes {shapes} were given", "give one of them")
    variant = with_options(Variant(scheme.lower(), scheme.upper(), get_scheme(scheme), kernel), compute=compute, lm_head=lm_head)
    variants = [BASELINE] if variant.scheme == BASELINE.scheme else [BASELINE, variant]
    steps = Steps(progress, total=1 + 2 * len(variants))
    subject = Subject(model=model, shapes=shapes, seed=seed)
    source = subject.open()
    settings = settings or SectionSettings()
    check_fits(source, variant.quantization(strict=settings.strict))
    steps.next("machine: bandwidth and GEMM rate")
    machine = measure_machine()
    with PeakMeter() as meter:
        section = Section(subject, source, machine, settings, steps, meter)
        rows = [section.measure(row) for row in variants]
    steps.finish()
    return BenchResults(environment=environment(), machine=machine, model=section.model_info, rows=rows, note=section.note)
