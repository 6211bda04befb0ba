"""Write the table of README.md from a results file, between its two marks.

    python scripts/readme_table.py results/compare

No figure in the README is written by hand: run `make compare`, then this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fewbit.report.results_file import read_results
from fewbit.results import CompareResults, LatencyResult, VariantResult

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def markdown_table(results: CompareResults) -> str:
    """Quality and memory of the model; decode time of the shapes when they were measured, else of the model."""
    shapes = results.shapes
    timed = {row.variant.name: row.latency for row in (shapes.variants if shapes else results.variants)}
    where = shapes.model.source.removeprefix("shapes:") + " shapes" if shapes else "this model"
    header = ["", "bits per weight", "perplexity", "flips", f"decode on {where}", "kernel"]
    rows = [header, ["---"] + ["---:"] * 4 + ["---"], *(_row(row, timed.get(row.variant.name)) for row in results.variants)]
    environment = results.environment
    protocol = results.protocol
    quality = f"Quality: {protocol.name}, {protocol.scored_tokens:,} tokens of {protocol.corpus}. " if protocol else ""
    scaled = f"Decode: {shapes.model.layers_measured} of {shapes.model.layers_total} layers with random weights, scaled. " if shapes else ""
    note = (
        f"`{results.command}` on {environment.cpu}, {environment.threads} threads, {results.machine.read_bandwidth_gb_s:.0f} GB/s, "
        f"torch {environment.versions.get('torch', 'unknown')}, {results.started_at[:10]}. {quality}{scaled}"
        "Weight formats by rounding to nearest."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}"


def _row(row: VariantResult, latency: LatencyResult | None) -> list[str]:
    quality = row.quality
    bits = row.memory.effective_bits_per_weight
    return [
        row.variant.label,
        f"{bits:.2f}" if bits is not None else "16",
        f"{quality.perplexity.value:.2f} ({round(quality.perplexity_delta_percent.value, 2) + 0.0:+.2f} %)" if quality else "",
        f"{quality.flip_share.value:.1%}" if quality else "",
        f"{latency.decode_ms_p50:.1f} ms ({latency.speedup_over_bf16.value:.2f}x)" if latency else "",
        ", ".join(f"{use.kernel}{'' if use.fused else ' (unfused)'}" for use in row.kernels),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json or its directory")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = markdown_table(read_results(arguments.results))
    arguments.readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
