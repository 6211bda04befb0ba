"""fewbit on an NVIDIA GPU: machine, correctness, kernels, decode steps, KV caches, predictions. One command, one table, one JSON file.

    python benchmarks/gpu.py                                   # on the GPU that is there, under nine minutes on an H200
    python benchmarks/gpu.py --only kernels                    # one section (machine and what it needs run anyway)
    python benchmarks/gpu.py --tune                            # rows for src/fewbit/kernels/triton/tuning.toml, for this device
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny         # no GPU: everything once, in Triton's interpreter; figures mean nothing

Times are taken under CUDA graphs over rotated copies of weights and caches that exceed four times the second-level cache. A section that
runs out of its time says what it skipped; a contender that fails is listed with its reason and ends nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bars import Bar, NotMeasuredError, run_bars

_SECTIONS = ("machine", "correctness", "kernels", "end-to-end", "cache", "predict")
_SECONDS = {"correctness": 70, "kernels": 150, "end-to-end": 200, "cache": 50}
_SHAPES = "qwen2.5-3b"
Report = dict[str, Any]


def measure(settings: Any, sections: tuple[str, ...], say: Callable[[str], None]) -> Report:
    """All sections asked for; see the modules `_gpu_*`."""
    from _gpu_cache import measure_cache
    from _gpu_common import Clock
    from _gpu_correctness import check_attention, check_products
    from _gpu_end_to_end import measure_batches, measure_single
    from _gpu_kernels import measure_kernels
    from _gpu_machine import describe, measure_machine
    from _gpu_predict import predict_rows

    clocks = {name: Clock(seconds if settings.cuda else 3600.0) for name, seconds in _SECONDS.items()}

    def clock(name: str) -> Clock:
        clocks[name] = Clock(_SECONDS[name] if settings.cuda else 3600.0)
        say(f"section: {name}")
        return clocks[name]

    say("section: machine")
    report: Report = {"schema_version": 1, "command": sys.argv, "facts": describe(settings), "machine": measure_machine(settings)}
    if "correctness" in sections:
        limit = clock("correctness")
        report["correctness"] = [*check_attention(settings, limit), *check_products(settings, limit)]
    if "kernels" in sections:
        report["kernels"] = measure_kernels(settings, clock("kernels"), report["machine"])
    if "end-to-end" in sections or "predict" in sections:
        limit = clock("end-to-end")
        report["single"] = measure_single(settings, limit, _SHAPES)
        report["batches"] = measure_batches(settings, limit, _SHAPES)
        if not settings.tiny:
            report["single"] += measure_single(settings, limit, "llama-3-8b")
    if "cache" in sections:
        report["cache"] = measure_cache(settings, clock("cache"), report["machine"]["read_gb_s"])
    if "predict" in sections:
        say("section: predict")
        report["predict"] = predict_rows(report["facts"], report["machine"], report["batches"], _SHAPES)
    report["skipped"] = {name: one.skipped for name, one in clocks.items() if one.skipped}
    report["failures"] = settings.failures
    return report


def tables(report: Report) -> str:
    """The report for a person: one table per section."""
    machine, parts = (
        report["machine"],
        [f"{report['facts']['device']}, " + ", ".join(f"{k} {v}" for k, v in report["facts"].items() if k != "device")],
    )
    parts.append("  ".join(f"{name} {value:.4g}" for name, value in machine.items() if value is not None))
    columns = {
        "correctness": ("kernel", "scheme", "shape", "tokens", "error"),
        "kernels": ("shape", "contender", "tokens", "ms", "share_of_bandwidth", "share_of_bf16_rate", "over_bf16"),
        "batches": ("scheme", "phase", "batch", "ms", "over_bf16"),
        "cache": ("kind", "batch", "context", "ms", "share_of_bandwidth", "over_bf16", "sequences_that_fit"),
        "predict": ("scheme", "phase", "batch", "measured_ms", "predicted_ms", "low_ms", "high_ms", "error"),
        "single": ("shapes", "name", "tokens", "ms", "ms_without_graphs", "over_fewbit_bf16", "weight_bytes", "peak_bytes"),
    }
    for section, names in columns.items():
        rows = report.get(section) or []
        if rows:
            if section == "correctness":
                rows = sorted(rows, key=lambda row: -row["error"])[:12]
            parts.append(f"\n{section}\n" + _table(rows, names))
    parts += [f"skipped in {name}: {len(skipped)}, the first is {skipped[0]}" for name, skipped in report["skipped"].items()]
    parts += [f"failed: {name}: {reason}" for name, reason in report["failures"].items()]
    return "\n".join(parts)


def _table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(names), *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def bars(report: Report, sections: tuple[str, ...]) -> list[Bar]:
    """The bars of the sections that ran; in the interpreter only correctness is one."""
    made = []
    if "correctness" in sections:
        worst = max((row["error"] for row in report["correctness"]), default=float("nan"))
        made.append(Bar("correctness-worst-error", lambda: worst, "<=", 1.0, "largest error over what rounding explains"))
        made.append(Bar("nothing-failed", lambda: sum("peer" not in n and not n.startswith(_PEERS) for n in report["failures"]), "<=", 0))
    if report["facts"]["interpreted"]:
        return made

    def kernel(shape: str, contender: str, tokens: int, figure: str) -> float:
        found = [r for r in report["kernels"] if (r["shape"], r["contender"], r["tokens"]) == (shape, contender, tokens)]
        if not found or found[0].get(figure) is None:
            raise NotMeasuredError(f"{contender} at {shape}, M = {tokens}, has no {figure}")
        return float(found[0][figure])

    def single(shapes: str, name: str, figure: str = "over_fewbit_bf16") -> float:
        found = [r for r in report["single"] if (r["shapes"], r["name"]) == (shapes, name)]
        if not found or found[0].get(figure) is None:
            raise NotMeasuredError(f"'{name}' on {shapes} was not measured: {report['failures'].get(f'{name} {shapes}', 'no time')}")
        return float(found[0][figure])

    def cache(kind: str) -> float:
        found = [r["over_bf16"] for r in report["cache"] if r["kind"] == kind and r["context"] == 32768 and r["batch"] >= 8]
        if not found or None in found:
            raise NotMeasuredError(f"{kind} at 32K was not measured")
        return float(min(found))

    def ahead(tokens: int) -> float:
        ratios = []
        for shape in ("8192x28672", "4096x11008"):
            own = kernel(shape, "W4A16", tokens, "ms")
            ratios += [kernel(shape, peer, tokens, "ms") / own for peer in ("torch-int4", "gemlite-int4")]
        return min(ratios)

    if "kernels" in sections:
        for shape, share, gain in (("8192x28672", 0.75, 3.2), ("4096x11008", 0.6, 2.5)):
            made.append(Bar(f"int4-share-{shape}", lambda s=shape: kernel(s, "W4A16", 1, "share_of_bandwidth"), ">=", share))
            made.append(Bar(f"int4-over-bf16-{shape}", lambda s=shape: kernel(s, "W4A16", 1, "over_bf16"), ">=", gain))
            made.append(Bar(f"int4-m128-{shape}", lambda s=shape: kernel(s, "W4A16", 128, "over_bf16"), ">=", 1.0))
        made += [Bar(f"int4-ahead-of-peers-m{m}", lambda m=m: ahead(m), ">", 1.0) for m in (1, 4, 8, 16)]
        for shape in ("8b gate,up", "8b down", "8b q,k,v", "8b output"):
            name = f"fp8-m2048-{shape.replace(' ', '-').replace(',', '-')}"
            made.append(Bar(name, lambda s=shape: kernel(s, "FP8", 2048, "over_bf16"), ">=", 1.5, "input quantization included"))
    if "end-to-end" in sections:
        for shapes, gain in ((_SHAPES, 1.7), ("llama-3-8b", 2.1)):
            made.append(Bar(f"int4-step-{shapes}", lambda s=shapes: single(s, "fewbit INT4 fused"), ">=", gain))
            for name in ("fewbit NF4 unfused", "fewbit LLM.int8()"):
                words = name.split()[1].lower().rstrip("()").replace(".", "-")
                made.append(Bar(f"slower-{words}-{shapes}", lambda s=shapes, n=name: single(s, n), "<", 1.0, "unfused loses to BF16"))
            static = "transformers BF16, static cache, torch.compile"
            made.append(Bar(f"bf16-against-transformers-{shapes}", lambda s=shapes, n=static: single(s, n), "<=", 1.0))
    if "cache" in sections:
        made += [Bar(f"kv-{kind}-32k", lambda k=kind: cache(k), ">=", 1.6, "attention alone, over BF16") for kind in ("int8", "fp8")]
    return made


_PEERS = ("torch-int4", "gemlite", "bitsandbytes", "torchao", "transformers")


def tune(settings: Any, say: Callable[[str], None]) -> str:
    """Rows for tuning.toml: per number of tokens the candidate with the best geometric mean over shapes, INT4 in groups of 128."""
    from _gpu_common import random_rows, time_calls

    from fewbit.formats.spec import get_scheme
    from fewbit.kernels.triton.layout import layout_of, pack
    from fewbit.kernels.triton.tuning import candidates
    from fewbit.kernels.triton.weight_only import multiply
    from fewbit.runtime.gpu_model import random_quantized

    spec = get_scheme("W4A16").weights
    assert spec is not None
    shapes = ((8192, 28672), (4096, 11008), (4096, 4096), (22016, 2048))
    generator = torch.Generator(settings.device).manual_seed(0)
    packed = [[pack(random_quantized(n, k, spec, generator)) for _ in range(4)] for n, k in shapes]
    lines = []
    for tokens in (16, 32, 64, 256, 1048576):
        m, best = min(tokens, 1024), {}
        for tiles in candidates(m):
            product = 1.0
            for (n, k), copies in zip(shapes, packed, strict=True):
                x, layout = random_rows(settings, m, k), layout_of(spec, k)
                own = tiles.for_shape(m, n, layout.chunks)
                calls = [lambda c=c, x=x, la=layout, t=own: multiply(x, c, la, t) for c in copies]
                time_taken = settings.attempt(f"tune {tiles}", lambda c=calls: time_calls(c, settings, replays=5))
                product *= time_taken if time_taken is not None else float("inf")
            best[tiles] = product
        t = min(best, key=best.__getitem__)
        lines.append(
            f"  {{ tokens = {tokens}, swap = {str(t.swap).lower()}, block_m = {t.block_m}, block_n = {t.block_n}, programs = {t.programs}, "
            f"num_warps = {t.num_warps}, num_stages = {t.num_stages} }},"
        )
        say(lines[-1])
    name = torch.cuda.get_device_name(settings.device)
    return "\n".join([f'["{name}"]', "measured = true", "rows = [", *lines, "]"])


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, in Triton's interpreter where there is no GPU")
    parser.add_argument("--only", choices=_SECTIONS, action="append", help="these sections")
    parser.add_argument("--tune", action="store_true", help="search block sizes and print rows for tuning.toml; no section runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (default: benchmarks/results/gpu-DATE.json)")
    parser.add_argument("--list", action="store_true", help="name the bars on a GPU, measure nothing")
    options = parser.parse_args()
    if options.list:
        nothing = {"correctness": [], "failures": {}, "facts": {"interpreted": False}}
        return run_bars(bars(nothing, _SECTIONS), list_only=True)
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not torch.cuda.is_available() and not (options.tiny and interpreted):
        print(
            "gpu.py: this torch sees no CUDA device; TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny runs everything small",
            file=sys.stderr,
        )
        return 2
    os.environ.setdefault("FEWBIT_TRITON_SEARCH", "0")  # the table's rows are what is measured; --tune searches
    from _gpu_common import Settings

    cuda = torch.cuda.is_available() and not interpreted
    settings = Settings("cuda" if cuda else "cpu", options.tiny, torch.bfloat16 if cuda else torch.float32, 0.0)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.tune:
        print(tune(settings, say))
        return 0
    begin, sections = time.monotonic(), tuple(options.only or _SECTIONS)
    report = measure(settings, sections, say)
    report["seconds"] = time.monotonic() - begin
    file = options.json or Path(__file__).parent / "results" / f"gpu-{time.strftime('%Y-%m-%d')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(tables(report))
    return run_bars(bars(report, sections))


if __name__ == "__main__":
    sys.exit(main())
