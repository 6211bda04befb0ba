"""The report of `gpu.py`: ratios over its rows, tables for a person, and the bars."""

from __future__ import annotations

from typing import Any

from _bars import Bar, NotMeasuredError
from _gpu_end_to_end import COMPILED
from _gpu_kernels import BAR_SHAPES

__all__ = ["MODELS", "Report", "add_ratios", "bars", "tables"]

MODELS = ("qwen2.5-3b", "llama-3-8b")
Report = dict[str, Any]
_COLUMNS = {
    "correctness": ("kernel", "scheme", "shape", "tokens", "error"),
    "kernels": ("shape", "contender", "tokens", "ms", "share_of_bandwidth", "share_of_bf16_rate", "over_bf16"),
    "batches": ("shapes", "scheme", "phase", "batch", "ms", "over_bf16"),
    "cache": ("kind", "batch", "context", "ms", "share_of_bandwidth", "over_bf16", "sequences_that_fit"),
    "predict": ("scheme", "phase", "batch", "measured_ms", "predicted_ms", "low_ms", "high_ms", "error"),
    "single": ("shapes", "name", "tokens", "ms", "ms_without_graphs", "over_fewbit_bf16", "weight_bytes", "peak_bytes"),
}


def add_ratios(report: Report) -> None:
    """How much faster than BF16, for every row that has its like in BF16."""

    def ratio(table: str, key: tuple[str, ...], base: tuple[str, str], column: str) -> None:
        rows = report.get(table, [])
        bf16 = {tuple(map(str, (row[k] for k in key))): row["ms"] for row in rows if row[base[0]] == base[1]}
        for row in rows:
            like = bf16.get(tuple(map(str, (row[k] for k in key))))
            row[column] = like / row["ms"] if like else None

    ratio("kernels", ("shape", "tokens"), ("contender", "BF16"), "over_bf16")
    ratio("batches", ("shapes", "phase", "batch"), ("scheme", "BF16"), "over_bf16")
    ratio("cache", ("batch", "context"), ("kind", "none"), "over_bf16")
    ratio("single", ("shapes", "tokens"), ("name", "fewbit BF16"), "over_fewbit_bf16")


def tables(report: Report) -> str:
    """The report for a person: one table per section."""
    facts, machine = report.get("facts", {}), report.get("machine", {})
    parts = [", ".join([str(facts.get("device", "no device")), *(f"{k} {v}" for k, v in facts.items() if k != "device")])]
    parts.append("  ".join(f"{name} {value:.4g}" for name, value in machine.items() if value is not None))
    for section, names in _COLUMNS.items():
        rows = report.get(section) or []
        if rows:
            if section == "correctness":
                rows = sorted(rows, key=lambda row: -row["error"])[:12]
            parts.append(f"\n{section}\n" + _table(rows, names))
    if report.get("tuned"):
        parts.append("\nfor tuning.toml\n" + report["tuned"])
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
    made = _correctness(report) if "correctness" in sections else []
    if report["facts"].get("interpreted"):
        return made
    if "kernels" in sections:
        made += _kernels(report)
    if "end-to-end" in sections:
        made += _end_to_end(report)
    if "cache" in sections:
        for kind in ("int8", "fp8"):
            made.append(Bar(f"kv-{kind}-32k", lambda k=kind: _cache(report, k), ">=", 1.6, "attention alone, over BF16"))
    return made


def _correctness(report: Report) -> list[Bar]:
    rows = report.get("correctness", [])
    failed = [name for name in report["failures"] if "peer" not in name and not name.startswith(("marlin", *_PEERS, "transformers"))]
    return [
        Bar("correctness-worst-error", lambda: max((row["error"] for row in rows), default=float("nan")), "<=", 1.0, "over rounding"),
        Bar("nothing-failed", lambda: len(failed), "==", 0, "contenders and sections of fewbit's own"),
    ]


_PEERS = ("torch-int4", "gemlite-int4", "bitsandbytes-nf4", "torchao-int4")


def _kernel(report: Report, shape: str, contender: str, tokens: int, figure: str) -> float:
    found = [r for r in report.get("kernels", []) if (r["shape"], r["contender"], r["tokens"]) == (shape, contender, tokens)]
    if not found or found[0].get(figure) is None:
        reasons = [why for name, why in report["failures"].items() if name.startswith((f"{contender} {shape}", f"{contender} is"))]
        raise NotMeasuredError(f"{contender} at {shape}, M = {tokens}, has no {figure}" + (f": {reasons[0]}" if reasons else ""))
    return float(found[0][figure])


def _kernels(report: Report) -> list[Bar]:
    made = []
    for shape, share, gain in (("8192x28672", 0.75, 3.2), ("4096x11008", 0.6, 2.5)):
        made.append(Bar(f"int4-share-{shape}", lambda s=shape: _kernel(report, s, "W4A16", 1, "share_of_bandwidth"), ">=", share))
        made.append(Bar(f"int4-over-bf16-{shape}", lambda s=shape: _kernel(report, s, "W4A16", 1, "over_bf16"), ">=", gain))
        made.append(Bar(f"int4-m128-{shape}", lambda s=shape: _kernel(report, s, "W4A16", 128, "over_bf16"), ">=", 1.0))

    def ahead(peer: str, tokens: int) -> float:
        return min(_kernel(report, s, peer, tokens, "ms") / _kernel(report, s, "W4A16", tokens, "ms") for s in BAR_SHAPES)

    for peer in ("torch-int4", "gemlite-int4"):
        made += [Bar(f"int4-ahead-of-{peer}-m{m}", lambda p=peer, m=m: ahead(p, m), ">", 1.0) for m in (1, 4, 8, 16)]
    for shape in ("8b gate,up", "8b down", "8b q,k,v", "8b output"):
        name = f"fp8-m2048-{shape.replace(' ', '-').replace(',', '-')}"
        made.append(Bar(name, lambda s=shape: _kernel(report, s, "FP8", 2048, "over_bf16"), ">=", 1.5, "input quantization included"))
    return made


def _single(report: Report, shapes: str, name: str) -> float:
    found = [r for r in report.get("single", []) if (r["shapes"], r["name"]) == (shapes, name)]
    if not found or found[0].get("over_fewbit_bf16") is None:
        raise NotMeasuredError(f"'{name}' on {shapes} was not measured: {report['failures'].get(f'{name} {shapes}', 'no time')}")
    return float(found[0]["over_fewbit_bf16"])


def _end_to_end(report: Report) -> list[Bar]:
    made = []
    for shapes, gain in zip(MODELS, (1.7, 2.1), strict=True):
        made.append(Bar(f"int4-step-{shapes}", lambda s=shapes: _single(report, s, "fewbit INT4 fused"), ">=", gain))
        for name in ("fewbit NF4 unfused", "fewbit LLM.int8()"):
            words = name.split()[1].lower().rstrip("()").replace(".", "-")
            made.append(Bar(f"slower-{words}-{shapes}", lambda s=shapes, n=name: _single(report, s, n), "<", 1.0, "unfused loses to BF16"))
        made.append(Bar(f"bf16-against-transformers-{shapes}", lambda s=shapes: _single(report, s, COMPILED), "<=", 1.0))
    return made


def _cache(report: Report, kind: str) -> float:
    rows = report.get("cache", [])
    found = [r.get("over_bf16") for r in rows if r["kind"] == kind and r["context"] == 32768 and r["batch"] >= 8]
    if not found or None in found:
        raise NotMeasuredError(f"{kind} at 32K was not measured")
    return float(min(found))
