"""`fewbit compare`: memory, latency and quality of several quantizations of one model, measured together in one process run.

For each variant, in this order: load it (quantizing while loading); measure its latency in turns with BF16, which stays resident; measure
its quality on the same tokens as BF16; measure its peak memory in a fresh process. A model that is too small to be bandwidth-bound says
nothing about the speed of a larger one, so `shapes` adds the latency and memory of a stack of layers in real shapes with random weights.
"""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fewbit.bench.machine import measure_machine
from fewbit.bench.memory import PeakMeter
from fewbit.checkpoints.sources import TensorSource
from fewbit.corpora.text import load_corpus
from fewbit.decide.conclusions import conclude
from fewbit.errors import FewbitError, FormatError, KernelError, UnsupportedModelError, UsageError
from fewbit.evaluate.protocols import Windows, make_windows
from fewbit.evaluate.quality import Reference, noise_floor
from fewbit.report.files import ensure_writable
from fewbit.report.results_file import write_results
from fewbit.results import CompareResults, MachineResult, ModelInfo, NoiseFloor, ShapesResult, VariantResult
from fewbit.runtime.load import check_fits
from fewbit.workflows.environment import environment
from fewbit.workflows.report import build_report
from fewbit.workflows.section import ProgressCallback, Section, SectionSettings, Steps, Subject
from fewbit.workflows.variants import BASELINE, Variant, parse_variants, with_options

__all__ = ["CompareSettings", "compare"]

_BUSY_SHARE = 0.10


@dataclass(frozen=True)
class CompareSettings(SectionSettings):
    """How much is measured; the fields of `SectionSettings` and what only a whole comparison has.

    Attributes:
        max_tokens: tokens of text that quality is measured on; None for all of the corpus.
        seed: for sampling windows and random weights.
    """

    max_tokens: int | None = 32_768
    seed: int = 0


def compare(
    model: str | Path | None = None,
    *,
    variants: str | Sequence[Variant] | None = None,
    compute: str = "exact",
    lm_head: str | None = None,
    texts: Sequence[Path] = (),
    corpus: str | None = None,
    protocol: str | None = None,
    shapes: str | None = None,
    out: Path | None = None,
    settings: CompareSettings | None = None,
    progress: ProgressCallback | None = None,
    command: str | None = None,
) -> CompareResults:
    """Measure memory, latency and quality of each variant of one model together.

    Args:
        model: a local Hugging Face directory or a hub id; the bundled reference model when None.
        variants: comma-separated names, or rows of `workflows.variants`; the default rows when None. BF16 is always measured.
        compute, lm_head: of the rows with quantized weights, see `variants.with_options`.
        texts: files to measure quality on, in place of `corpus`.
        corpus: `stdlib` (default), `wikitext2` or `wikitext2:FILE`.
        protocol: `stdlib`, `standard-2048` or `lab-512`; the corpus's own when None.
        shapes: also measure latency and memory on random weights in these real shapes (`fewbit.models.shapes.SHAPES`).
        out: where results.json, results.csv, three figures and report.html are written; nowhere when None.
        settings: how much is measured.
        progress: called with (steps done, steps in all, what is next).
        command: what the user typed, for the record; the process's own arguments when None.

    A default row that the model cannot have (a group size that does not divide, no kernel for a shape) is left out and named in the
    results' warnings; a row that was asked for by name is an error, found before anything is measured.

    Raises:
        UsageError: an unknown variant, corpus, protocol or shape.
        ModelError, CheckpointError, CorpusError, OutputError: input or output that cannot be used.
        FormatError, KernelError: a row that was asked for does not fit a layer or finds no kernel; the row and the layer are named.
    """
    settings = settings or CompareSettings()
    rows = parse_variants(variants) if variants is None or isinstance(variants, str) else tuple(variants)
    rows = tuple(with_options(row, compute=compute, lm_head=lm_head) for row in rows)
    if not rows or rows[0].name != BASELINE.name:
        raise UsageError("the first variant of a comparison is the BF16 baseline", "put BASELINE first")
    started, started_at, load = time.time(), datetime.now(UTC).isoformat(timespec="seconds"), _OtherLoad()

    # Everything that can be wrong with the input is found before anything slow begins.
    if out is not None:
        ensure_writable(out)
    text, named = load_corpus(corpus, texts), variants is not None
    part = _part(Subject(model=model), rows, settings, named)
    source = part.source
    windows = make_windows(protocol, text, source.tokenizer(), source.config, seed=settings.seed, max_tokens=settings.max_tokens)
    stack = _part(Subject(shapes=shapes, seed=settings.seed), rows, settings, named) if shapes else None

    steps = Steps(progress, total=2 + 3 * len(part.rows) + (1 + 2 * len(stack.rows) if stack else 0))
    measured = _measure(part, stack, windows, settings, steps)
    results = CompareResults(
        command=command or shlex.join(["fewbit", *sys.argv[1:]]),
        run_id=uuid.uuid4().hex,
        started_at=started_at,
        duration_s=round(time.time() - started, 1),
        environment=environment(),
        machine=measured.machine,
        model=measured.model,
        variants=measured.variants,
        protocol=windows.info,
        noise_floor=measured.noise_floor,
        shapes=measured.shapes,
        warnings=[*part.left_out, *(stack.left_out if stack else ()), *load.warnings()],
    )
    results = replace(results, conclusions=conclude(results))
    if out is not None:
        write_results(results, out)
        build_report(out)
    steps.finish()
    return results


@dataclass(frozen=True)
class _Part:
    """A subject with the rows that it can have, and a sentence for each that it cannot."""

    subject: Subject
    source: TensorSource
    rows: tuple[Variant, ...]
    left_out: list[str]


@dataclass(frozen=True)
class _Measured:
    machine: MachineResult
    model: ModelInfo
    variants: list[VariantResult]
    noise_floor: NoiseFloor
    shapes: ShapesResult | None


def _part(subject: Subject, rows: Sequence[Variant], settings: SectionSettings, named: bool) -> _Part:
    """Open the subject and find the rows that it can have.

    Args:
        named: the rows were asked for by name, so that one which does not fit is an error.

    Raises:
        FewbitError: a row does not fit though it is the baseline, was named, or, under `strict`, has no fused kernel here.
    """
    source = subject.open()
    fitting: list[Variant] = []
    left_out = []
    for row in rows:
        try:
            check_fits(source, row.quantization(strict=settings.strict))
        except (FormatError, KernelError, UnsupportedModelError) as error:
            if row.name == BASELINE.name:
                raise
            if named or (settings.strict and isinstance(error, KernelError)):
                raise _of_row(error, row) from error
            left_out.append(f"{row.label} ({row.name}) was left out on {source.describe()}: {error}.")
        else:
            fitting.append(row)
    return _Part(subject, source, tuple(fitting), left_out)


def _measure(part: _Part, stack: _Part | None, windows: Windows, settings: SectionSettings, steps: Steps) -> _Measured:
    """Latency, quality and memory of the model's rows, then latency and memory of the stack of random weights."""
    steps.next("machine: bandwidth and GEMM rate")
    machine = measure_machine()
    with PeakMeter() as meter:
        section = Section(part.subject, part.source, machine, settings, steps, meter)
        steps.next(f"{BASELINE.label}: noise floor on {windows.info.corpus}")
        reference = Reference(section.baseline, windows)
        floor = noise_floor(reference)
        variants = [section.measure(row, reference) for row in part.rows]
        shapes = None
        if stack is not None:
            steps.next(f"{stack.subject.shapes}: random weights")
            random = Section(stack.subject, stack.source, machine, settings, steps, meter)
            shapes = ShapesResult(random.model_info, [random.measure(row) for row in stack.rows], random.note)
    return _Measured(machine, section.model_info, variants, floor, shapes)


def _of_row(error: FewbitError, row: Variant) -> FewbitError:
    """The same error, with the row's name in front."""
    return type(error)(f"variant '{row.name}': {error.problem}", error.remedy)


class _OtherLoad:
    """What other processes took of the machine while this one measured."""

    def __init__(self) -> None:
        self._before = self._busy_s()

    def warnings(self) -> list[str]:
        """One sentence when others took enough time to disturb the latencies, else nothing."""
        all_before, own_before = self._before
        all_now, own_now = self._busy_s()
        busy = all_now - all_before
        others = max(0.0, busy - (own_now - own_before))
        if busy <= 0 or others / busy < _BUSY_SHARE:
            return []
        share = f"{others / busy:.0%}"
        return [f"The machine was not idle: other processes took {share} of its busy time. Latencies are less certain than they look."]

    @staticmethod
    def _busy_s() -> tuple[float, float]:
        """(CPU seconds of the whole machine, of this process and its children), without idle time."""
        times = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        whole = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        return whole, own.user + own.system + own.children_user + own.children_system
