"""The bars of `fewbit compare`: memory, quality and speed of one results file.

    python benchmarks/compare_bars.py                                  # runs `fewbit compare --shapes qwen2.5-1.5b` first
    python benchmarks/compare_bars.py results/compare/results.json     # reads what `make compare` wrote

Every figure is read from the results file, so both sides of every ratio come from the same process run. Only INT2, which is no default row
of the comparison, is evaluated here when the file does not have it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _bars import Bar, NotMeasuredError, add_arguments, run_bars

if TYPE_CHECKING:
    from fewbit.results import CompareResults, LatencyResult, QualityResult, VariantResult

DEFAULT_OUT = Path("results/compare_bars")
SHAPES = "qwen2.5-1.5b"


def run_compare(out: Path) -> Path:
    """Run the comparison in a process of its own and return its results file.

    Raises:
        NotMeasuredError: the run failed; its last line is the reason.
    """
    command = [sys.executable, "-c", "from fewbit.cli import main; main()", "compare", "--shapes", SHAPES, "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotMeasuredError(f"fewbit compare ended with exit code {process.returncode}: {last}")
    return out / "results.json"


class Results:
    """A results file, made first when there is none.

    Attributes:
        path: the file; the comparison is run at the first question when it is None, once.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._results: CompareResults | None = None
        self._failure = ""

    def read(self) -> CompareResults:
        """The whole file.

        Raises:
            NotMeasuredError: the comparison failed or the file cannot be read; the same reason each time.
        """
        from fewbit.errors import FewbitError
        from fewbit.report.results_file import read_results

        if self._failure:
            raise NotMeasuredError(self._failure)
        if self._results is None:
            try:
                self.path = self.path or run_compare(DEFAULT_OUT)
                self._results = read_results(self.path)
            except (NotMeasuredError, FewbitError) as error:
                self._failure = str(error)
                raise NotMeasuredError(self._failure) from error
        return self._results

    def row(self, name: str, *, shapes: bool = False) -> VariantResult:
        """One variant of the model's section, or of the section in real shapes."""
        results = self.read()
        if shapes and results.shapes is None:
            raise NotMeasuredError("the results file has no --shapes section")
        variants = results.shapes.variants if shapes and results.shapes else results.variants
        for variant in variants:
            if variant.variant.name == name:
                return variant
        raise NotMeasuredError(f"the results file has no row {name}")

    def quality(self, name: str) -> QualityResult:
        quality = self.row(name).quality
        if quality is None:
            raise NotMeasuredError(f"row {name} has no quality figures")
        return quality

    def latency(self, name: str) -> LatencyResult:
        """Of the section in real shapes."""
        latency = self.row(name, shapes=True).latency
        if latency is None:
            raise NotMeasuredError(f"row {name} of the shapes section has no latency figures")
        return latency


def perplexity_percent(results: Results, name: str) -> float:
    """Size of the perplexity difference to BF16, in percent."""
    return abs(results.quality(name).perplexity_delta_percent.value)


def perplexity_ratio(results: Results, name: str, other: str) -> float:
    return results.quality(name).perplexity.value / results.quality(other).perplexity.value


def effective_bits(results: Results, name: str) -> float:
    bits = results.row(name).memory.effective_bits_per_weight
    if bits is None:
        raise NotMeasuredError(f"row {name} quantizes no linear")
    return bits


def linear_memory_ratio(results: Results, name: str) -> float:
    memory = results.row(name).memory
    return memory.quantized_linear_bytes / memory.quantized_linear_bf16_bytes


def kv_ratio(results: Results, name: str) -> float:
    return results.row(name).memory.kv_bytes_per_token / results.row("bf16").memory.kv_bytes_per_token


def int2_perplexity_ratio(results: Results) -> float:
    """INT2 RTN over BF16: from the file when it has the row, else evaluated now."""
    if any(variant.variant.name == "w2a16" for variant in results.read().variants):
        return perplexity_ratio(results, "w2a16", "bf16")
    from fewbit.errors import FewbitError
    from fewbit.workflows.evaluate import evaluate

    try:
        quality = evaluate(scheme="W2A16", max_tokens=8192).quality
    except FewbitError as error:
        raise NotMeasuredError(str(error)) from error
    if quality is None:
        raise NotMeasuredError("the evaluation of W2A16 has no comparison with BF16")
    return 1 + quality.perplexity_delta_percent.value / 100


def schema_errors(results: Results) -> float:
    """Violations of the schema that is kept in the repository."""
    try:
        import jsonschema
    except ImportError as error:
        raise NotMeasuredError("jsonschema is not installed") from error
    from fewbit.report.results_file import SCHEMA_FILE

    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    results.read()
    assert results.path is not None
    document: Any = json.loads(results.path.read_text(encoding="utf-8"))
    return sum(1 for _ in jsonschema.Draft202012Validator(schema).iter_errors(document))


def measured_schemes(results: Results, schemes: Sequence[str]) -> float:
    """How many of these schemes have a row with quality in the model's section and one with latency in the shapes section."""
    shapes = results.read().shapes
    with_quality = {row.variant.scheme for row in results.read().variants if row.quality is not None}
    with_latency = {row.variant.scheme for row in (shapes.variants if shapes else []) if row.latency is not None}
    return len(with_quality & with_latency & set(schemes))


def kernel_conclusions(results: Results) -> float:
    """Conclusions that name the shapes and say that the fused kernel is faster than the unfused one."""
    shapes = f"{SHAPES} shapes"
    return sum(shapes in sentence and "Fused is" in sentence and "unfused" in sentence for sentence in results.read().conclusions)


def bars(results: Results) -> list[Bar]:
    """All bars over one results file."""

    def of(function: Callable[..., float], *arguments: Any) -> Callable[[], float]:
        return lambda: function(results, *arguments)

    def step_ratio(slow: str, fast: str) -> Callable[[], float]:
        return lambda: results.latency(slow).decode_ms_p50 / results.latency(fast).decode_ms_p50

    return [
        Bar("results-schema-errors", of(schema_errors), "==", 0, "violations of results.schema.json"),
        Bar("int8-perplexity-percent", of(perplexity_percent, "int8-w8a16"), "<=", 0.5, "INT8 W8A16 against BF16, either way"),
        Bar("int4-over-int8-perplexity", of(perplexity_ratio, "int4-w4a16", "int8-w8a16"), ">", 1.0, "INT4 g128 RTN is worse than INT8"),
        Bar("int2-over-bf16-perplexity", of(int2_perplexity_ratio), ">=", 2.0, "INT2 RTN is broken"),
        Bar("nf4-fp8-rows", of(measured_schemes, ["NF4", "FP8A16"]), "==", 2, "NF4 and FP8 E4M3 have quality and latency"),
        Bar("int4-effective-bits", of(effective_bits, "int4-w4a16"), "<=", 4.5, "over the quantized linears"),
        Bar("int4-linear-memory-ratio", of(linear_memory_ratio, "int4-w4a16"), "<=", 0.30, "resident bytes over BF16"),
        Bar("kv-int8-ratio", of(kv_ratio, "kv-int8"), "<=", 0.55, "marginal bytes per token over BF16"),
        Bar("kv-int4-ratio", of(kv_ratio, "kv-int4"), "<=", 0.35, "marginal bytes per token over BF16"),
        Bar("shapes-bf16-over-fused-int4", step_ratio("bf16", "int4-w4a16"), ">", 1.0, "median decode step, real shapes"),
        Bar("shapes-unfused-over-fused-int4", step_ratio("int4-w4a16-unfused", "int4-w4a16"), ">", 1.0, "median decode step, real shapes"),
        Bar("shapes-kernel-conclusions", of(kernel_conclusions), ">=", 1, "conclusions that say so"),
        Bar("compare-seconds", lambda: results.read().duration_s, "<", 360, "of the whole comparison"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="results.json or its directory; the comparison is run when left out")
    add_arguments(parser)
    arguments = parser.parse_args()
    path = arguments.results
    results = Results(path / "results.json" if path is not None and path.is_dir() else path)
    return run_bars(bars(results), list_only=arguments.list, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
