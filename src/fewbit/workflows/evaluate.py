"""`fewbit evaluate`: the perplexity of one model in one scheme, and what the scheme costs against BF16.

    from fewbit.workflows.evaluate import evaluate

    results = evaluate(scheme="W4A16")
    print(results.perplexity.value, results.quality.kl_divergence_nats)

BF16 is read first and its answers are kept, so that both models see the very same windows. A checkpoint that is quantized already holds
no BF16 weights to compare with: name the model it was made from in `against`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fewbit.checkpoints.sources import TensorSource, open_source
from fewbit.corpora.text import load_corpus
from fewbit.evaluate.protocols import make_windows
from fewbit.evaluate.quality import Progress, Reference, bits_per_byte, evaluate_quality, noise_floor, perplexity
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.results import EvaluateResults, NoiseFloor, QualityResult
from fewbit.runtime.config import QuantizationConfig, compute_mode, head_format
from fewbit.runtime.load import check_fits, load_model

__all__ = ["evaluate"]

ProgressCallback = Callable[[int, int, str], None]


def evaluate(
    model: str | Path | None = None,
    *,
    scheme: str | None = None,
    compute: str = "exact",
    lm_head: str | None = None,
    against: str | Path | None = None,
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
        scheme: a preset of `formats.spec.SCHEMES`, whose weights are rounded to nearest (RTN) while loading; when None, the scheme that the
            checkpoint is stored in.
        compute: `exact`, or `int8-activations`: kernels may quantize their inputs to INT8 on the fly.
        lm_head: format of the output head, a name of `runtime.config.HEAD_FORMATS`; with `scheme="BF16"` the figures are the head's alone.
        against: the high-precision model to compare with, a directory or a hub id; when None, `model` itself in BF16 where `scheme`
            quantizes it, and nothing where it is BF16 or quantized already.
        corpus: `stdlib` (default), `wikitext2` or `wikitext2:FILE`.
        texts: the user's own files in place of `corpus`.
        protocol: `stdlib`, `standard-2048` or `lab-512`; the corpus's own when None.
        max_tokens: most tokens of text; None for all of it, as the papers do.
        threshold: largest increase of perplexity over BF16 that passes, in percent.
        seed: of the draw of windows.
        progress: called with (windows done, windows in all, what is being read).

    Raises:
        UsageError: an unknown scheme, corpus or protocol.
        ModelError, CheckpointError, CorpusError, FormatError, KernelError, MeasurementError: input that cannot be used.
    """
    named = get_scheme(scheme) if scheme is not None else None
    text = load_corpus(corpus, texts)
    source = open_source(model)
    chosen = named or source.scheme or get_scheme("BF16")
    config = QuantizationConfig(chosen, compute=compute_mode(compute), lm_head=head_format(lm_head))
    check_fits(source, config)
    windows = make_windows(protocol, text, source.tokenizer(), source.config, seed=seed, max_tokens=max_tokens)

    def telling(what: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(done, total, what)

    original = open_source(against) if against is not None else source if source.scheme is None and _quantizes(config) else None
    quality: QualityResult | None = None
    floor: NoiseFloor | None = None
    if original is not None:
        reference = Reference(load_model(original, QuantizationConfig(get_scheme("BF16"))), windows, progress=telling("BF16"))
        floor = noise_floor(reference, progress=telling("noise floor"))
        loaded = load_model(source, config)
        quality = evaluate_quality(reference, loaded, threshold_percent=threshold, progress=telling(chosen.name))
        own = quality.perplexity
    else:
        loaded = load_model(source, config)
        own = perplexity(loaded, windows, progress=telling(chosen.name))
    return EvaluateResults(
        model=source.describe(),
        scheme=chosen.name,
        method=_method(source, chosen),
        kernels=list(loaded.kernel_uses),
        protocol=windows.info,
        perplexity=own,
        bits_per_byte=bits_per_byte(own, windows),
        weights_sha256=source.sha256(),
        quality=quality,
        noise_floor=floor,
    )


def _quantizes(config: QuantizationConfig) -> bool:
    return config.quantizes or config.scheme.kv_keys is not None


def _method(source: TensorSource, scheme: Scheme) -> str:
    """How the weights were chosen: rounded here, taken as they are stored, or not quantized."""
    return "stored" if source.scheme is not None else "none" if scheme.weights is None else "rtn"
