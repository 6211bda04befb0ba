"""`fewbit evaluate`: the perplexity of one model in one scheme, and what the scheme costs against BF16.

    from fewbit.workflows.evaluate import evaluate

    results = evaluate(scheme="W4A16")
    print(results.perplexity.value, results.quality.kl_divergence_nats)

BF16 is read first and its answers are kept, so that both models see the very same windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fewbit.corpora.text import load_corpus
from fewbit.errors import UsageError
from fewbit.evaluate.protocols import make_windows
from fewbit.evaluate.quality import Progress, Reference, bits_per_byte, evaluate_quality, noise_floor, perplexity
from fewbit.formats.spec import get_scheme
from fewbit.results import EvaluateResults, NoiseFloor, QualityResult
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.load import load_model
from fewbit.runtime.sources import open_source

__all__ = ["evaluate"]

ProgressCallback = Callable[[int, int, str], None]


def evaluate(
    model: str | Path | None = None,
    *,
    scheme: str = "BF16",
    against: Literal["BF16"] | None = "BF16",
    corpus: str | None = None,
    texts: Sequence[Path] = (),
    protocol: str | None = None,
    max_tokens: int | None = 32_768,
    threshold: float = 5.0,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> EvaluateResults:
    """Measure the quality of a model in a scheme.

    Args:
        model: a local Hugging Face directory or a hub id; the bundled reference model when None.
        scheme: a preset of `formats.spec.SCHEMES`; weights are rounded to nearest (RTN) while loading.
        against: what a scheme other than BF16 is compared with; None for its perplexity alone, which needs only one model in memory.
        corpus: `stdlib` (default), `wikitext2` or `wikitext2:FILE`.
        texts: the user's own files in place of `corpus`.
        protocol: `stdlib`, `standard-2048` or `lab-512`; the corpus's own when None.
        max_tokens: most tokens of text; None for all of it, as the papers do.
        threshold: largest increase of perplexity over BF16 that passes, in percent.
        seed: of the draw of windows.
        progress: called with (windows done, windows in all, what is being read).

    Raises:
        UsageError: an unknown scheme, corpus, protocol or comparison.
        ModelError, CheckpointError, CorpusError, FormatError, MeasurementError: input that cannot be used.
    """
    if against not in (None, "BF16"):
        raise UsageError(f"cannot compare with '{against}'", "pass BF16, or nothing for the perplexity alone")
    chosen, baseline = get_scheme(scheme), get_scheme("BF16")
    text = load_corpus(corpus, texts)
    source = open_source(model)
    windows = make_windows(protocol, text, source.tokenizer(), source.config, seed=seed, max_tokens=max_tokens)

    def label(what: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(done, total, what)

    quality: QualityResult | None = None
    floor: NoiseFloor | None = None
    if against is not None and chosen.name != baseline.name:
        reference = Reference(load_model(source, QuantizationConfig(baseline)), windows, progress=label("BF16"))
        floor = noise_floor(reference, progress=label("noise floor"))
        loaded = load_model(source, QuantizationConfig(chosen))
        quality = evaluate_quality(reference, loaded, threshold_percent=threshold, progress=label(chosen.name))
        own = quality.perplexity
    else:
        loaded = load_model(source, QuantizationConfig(chosen))
        own = perplexity(loaded, windows, progress=label(chosen.name))
    return EvaluateResults(
        model=source.describe(),
        scheme=chosen.name,
        method="rtn" if chosen.weights is not None else "none",
        kernels=list(loaded.kernel_uses),
        protocol=windows.info,
        perplexity=own,
        bits_per_byte=bits_per_byte(own, windows),
        weights_sha256=source.sha256(),
        quality=quality,
        noise_floor=floor,
    )
