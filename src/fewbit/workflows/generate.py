"""`fewbit generate`: continue a text with a model in any scheme, and say how long each token took on which kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fewbit.bench.percentiles import percentile
from fewbit.checkpoints.sources import open_source
from fewbit.errors import UsageError
from fewbit.formats.spec import get_scheme
from fewbit.results import KernelUse
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format
from fewbit.runtime.generate import generate
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import RuntimeChoice

__all__ = ["GenerateResult", "generate_text"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GenerateResult:
    """One continuation.

    Attributes:
        prompt_tokens, new_tokens: lengths in tokens.
        decode_ms_p50: median time of one decode step; None when only one token was made.
        decode_ms_p95: 95th percentile of the steps; None when only one token was made.
        runtime: who ran the passes, `engine` or `transformers`.
        runtime_reason: why not the engine; empty when it did.
        compute: `exact` or `int8-activations`, as it was asked for.
        lm_head: format of the output head.
    """

    model: str
    scheme: str
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_ms_p50: float | None
    kernels: list[KernelUse]
    decode_ms_p95: float | None = None
    runtime: str = "transformers"
    runtime_reason: str = ""
    compute: str = "exact"
    lm_head: str = "BF16"

    def summary(self) -> str:
        """For a person: times, who ran the passes, kernels, and why no faster ones."""
        step = f", {self.decode_ms_p50:.2f} ms per token" if self.decode_ms_p50 is not None else ""
        kernels = ", ".join(f"{use.kernel} x{use.linears}" for use in self.kernels)
        passed = sorted({f"{p.kernel}: {p.reason}" for use in self.kernels for p in use.passed_over})
        reasons = f"\npassed over: {'; '.join(passed)}" if passed else ""
        path = f"; {self.runtime}" + (f" ({self.runtime_reason})" if self.runtime_reason else "")
        return f"{self.scheme}: prefill of {self.prompt_tokens} tokens {self.prefill_ms:.1f} ms{step}{path}; kernels: {kernels}{reasons}"


def generate_text(
    model: str | Path | None = None,
    *,
    prompt: str,
    scheme: str | None = None,
    kernel: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    strict: bool = False,
    compute: str = "exact",
    lm_head: str | None = None,
    runtime: RuntimeChoice = "auto",
    on_text: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Continue `prompt`.

    Args:
        model: a local Hugging Face directory or a hub id; the bundled reference model when None.
        scheme: a preset of `formats.spec.SCHEMES`; when None, the scheme that the checkpoint is stored in.
        kernel, strict: as in `runtime.config.QuantizationConfig`.
        temperature: 0 takes the most likely token.
        compute: `exact`, or `int8-activations`: kernels may quantize their inputs to INT8 on the fly.
        lm_head: format of the output head, a name of `runtime.config.HEAD_FORMATS`; as the scheme has it when None.
        runtime: who runs the passes, see `runtime.runner.make_runner`.
        on_text: called with each new piece of text as soon as it is whole.

    Raises:
        UsageError: an empty prompt or an unknown scheme.
        ModelError, CheckpointError, KernelError: a model that cannot be loaded or run.
    """
    if not prompt:
        raise UsageError("the prompt is empty", "pass some text with --prompt")
    source = open_source(model)
    chosen = get_scheme(scheme or "BF16") if scheme or source.scheme is None else source.scheme
    if kernel is not None and chosen.weights is None:
        raise UsageError(f"kernel '{kernel}' is for quantized weights, and {chosen.name} has none", "add --scheme, or leave --kernel out")
    head = head_format(lm_head)
    config = QuantizationConfig(chosen, kernel=kernel, strict=strict, compute=compute_mode(compute), lm_head=head)
    loaded = load_model(source, config)
    tokenizer = loaded.tokenizer
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    shown: list[int] = []
    printed = ""

    def on_token(token: int) -> None:
        # A token can hold part of a character: print only what more tokens cannot change any more.
        nonlocal printed
        shown.append(token)
        text = str(tokenizer.decode(shown, skip_special_tokens=True))
        if on_text is not None and not text.endswith("\ufffd"):
            on_text(text[len(printed) :])
            printed = text

    if on_text is not None:
        on_text(prompt)
    result = generate(
        loaded, input_ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, on_token=on_token, runtime=runtime
    )
    return GenerateResult(
        model=loaded.source.describe(),
        scheme=loaded.scheme.name,
        prompt=prompt,
        text=str(tokenizer.decode(result.tokens, skip_special_tokens=True)),
        prompt_tokens=input_ids.shape[1],
        new_tokens=len(result.tokens),
        prefill_ms=result.prefill_ms,
        decode_ms_p50=statistics.median(result.step_ms) if result.step_ms else None,
        kernels=list(loaded.kernel_uses),
        decode_ms_p95=percentile(result.step_ms, 95) if result.step_ms else None,
        runtime=result.runtime,
        runtime_reason=result.runtime_reason,
        compute=compute,
        lm_head="BF16" if head is None else str(head),
    )
