"""The README.md of a checkpoint: what it is, how it was made, how to load it.

A model card states what is known and nothing else: quality stands in it only when it was measured, and a skipped or failed gate is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fewbit.results import GateResult, QualityResult, QuantizeResult

__all__ = ["model_card", "source_licence"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TRANSFORMERS = (
    "```python",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")',
    "```",
    "",
)
_LOADING: Mapping[str, Sequence[str]] = {
    "": _TRANSFORMERS,
    "compressed-tensors": (
        *_TRANSFORMERS,
        "transformers needs the package `compressed-tensors` and computes in high precision once decompressed: good for checking results.",
        "vLLM and SGLang run the format on their own kernels.",
    ),
    **dict.fromkeys(
        ("gptq", "gptq_v2", "awq"),
        (*_TRANSFORMERS, "transformers needs the packages `gptqmodel` and `optimum`. vLLM and SGLang run the format on their own kernels."),
    ),
    "gguf": ("```sh", "llama-server -m model-*.gguf", "```", "", "transformers decodes it to high precision with `gguf_file=`."),
}


def model_card(
    result: QuantizeResult,
    *,
    versions: Mapping[str, str],
    licence: str | None = None,
    quality: QualityResult | None = None,
) -> str:
    """The card in Markdown with YAML front matter.

    Args:
        result: what was written.
        versions: library to version.
        licence: the source's licence, as its own card names it.
        quality: measured quality; left out of the card when None.
    """
    is_hub_id = _HUB_ID.fullmatch(result.model) is not None and not Path(result.model).exists()
    front = ["library_name: transformers", "tags:", f"- {result.layout}", "- fewbit", f"- {result.scheme.lower()}"]
    front += [f"base_model: {result.model}", "base_model_relation: quantized"] if is_hub_id else []
    front += [f"license: {licence}"] if licence else []
    model = result.model if is_hub_id else Path(result.model).name
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {model}, quantized to {result.scheme}",
        "",
        f"The weights of {result.quantized_linears} linear layers of {model} in {result.weights}; {result.kept_tensors} tensors "
        f"(embeddings, norms and what is listed as ignored) are those of the source, unchanged.",
        "",
        *_table(_facts(result)),
        "",
        *(_quality(quality) if quality else _gate(result.gate)),
        *(["## Notes", "", *(f"- {note}" for note in result.notes), ""] if result.notes else []),
        "## Load it",
        "",
        *_LOADING.get(result.layout, _LOADING[""]),
        "",
        "The recipe, for a machine, is in `fewbit_recipe.json`. Made with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def source_licence(directory: Path) -> str | None:
    """The `license` field of the source's own card, if it has one."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2]
    found = re.search(r"^license: *([\w.-]+) *$", front[0], re.MULTILINE) if front else None
    return found.group(1) if found else None


def _facts(result: QuantizeResult) -> list[tuple[str, str]]:
    calibration = result.calibration
    seen = (
        "none"
        if calibration is None
        else f"{calibration.samples} windows of {calibration.sequence_length} tokens of {calibration.source}, seed {calibration.seed}, "
        f"ids SHA-256 {calibration.ids_sha256[:16]}..."
    )
    return [
        ("method", f"{result.method}, scales by {result.observer}"),
        ("calibration", seen),
        ("weights", result.weights),
        ("input activations", result.input_activations),
        ("layout", f"{result.layout}, {result.layout_format}"),
        ("left in high precision", ", ".join(result.ignored_linears) or "no linear"),
        (
            "effective bits",
            f"{result.effective_bits_per_weight:.3f} per quantized weight, {result.effective_bits_per_parameter:.3f} per parameter",
        ),
        ("bytes", f"{result.checkpoint_bytes:,} (source {result.source_bytes:,})"),
        ("source weights, SHA-256", result.source_sha256 or "unknown"),
    ]


def _gate(gate: GateResult | None) -> list[str]:
    """What the comparison at the end of the quantization found, or that there was none."""
    if gate is None or gate.kl_nats is None or gate.threshold_nats is None:
        return [
            "Quality has not been measured, the gate was skipped: run `fewbit compare` on the source to see what this scheme costs.",
            "",
        ]
    warning = [
        "**This checkpoint failed its quality gate and was written because its maker insisted.** Measure it before you use it.",
        "",
    ]
    kl = gate.kl_nats
    rows = [
        ("gate", gate.outcome),
        ("KL divergence to the source", f"{kl.value:.5f} nats per token ({kl.low:.5f} to {kl.high:.5f}), at most {gate.threshold_nats:g}"),
        ("perplexity", f"{gate.perplexity:.4g} (source {gate.reference_perplexity:.4g})"),
        ("top-1 tokens that flip", f"{gate.flip_share:.2%}"),
        ("text", f"{gate.text}, {gate.tokens:,} tokens in {gate.windows} windows, SHA-256 {gate.text_sha256[:16]}..."),
    ]
    return ["## Quality", "", *(warning if gate.outcome == "forced" else []), *_table(rows), ""]


def _quality(quality: QualityResult) -> list[str]:
    rows = [
        ("perplexity", f"{quality.perplexity.value:.4g}"),
        ("perplexity against BF16", f"{quality.perplexity_delta_percent.value:+.3f} %"),
        ("KL divergence to BF16", f"{quality.kl_divergence_nats.value:.5f} nats per token"),
        ("top-1 tokens that flip", f"{quality.flip_share.value:.2%}"),
    ]
    return ["## Quality", "", *_table(rows), ""]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
