"""What a quantization costs in quality: perplexity, its change against BF16, KL divergence and flipped predictions, with intervals.

For each scored token with BF16's distribution p and the variant's q over the vocabulary:

    loss        -log q(token)                    perplexity = exp(mean loss)
    difference  -log q(token) + log p(token)     perplexity delta = exp(mean difference) - 1: the very ratio of the two perplexities
    KL          sum_v p(v) (log p(v) - log q(v)) what an output distribution lost, whatever the text says next
    flip        argmax q != argmax p             greedy decoding would have taken another token

Perplexity can stay while a model changes, because tokens that got better hide those that got worse; KL and flips cannot (Dutta et al.,
Accuracy is Not All You Need, arXiv 2407.09141). All are averaged over tokens, with windows as the independent units (`statistics`).

Two ways to read a window. Most variants see it in one pass: no cache, several windows of equal length as a batch, never any padding. A
variant whose KV cache is quantized would then read keys and values that were never stored, and look lossless; it is fed through its
cache in chunks of 64 tokens, so that attention reads what the cache holds. A residual window slides token by token in decode, and
within a chunk it cannot: a chunk longer than the window would show half its queries no token in high precision (INT4, window 32, on the
reference model: KL 0.0051 in chunks of 64, 0.0021 of 16, 0.0018 token by token). So chunks are at most half the window, and the
figure stays a little on the pessimistic side.

The *noise floor* is BF16 against itself read in the second way: other shapes, other summation orders, rounding to BF16 at other places.
A variant's figure of that size says nothing about its format.

Precision. Log-probabilities are FP32 whatever the model computes in, for a few tokens at a time: one window of 2,048 tokens over
128,256 entries would be 1 GB. BF16's side is kept as the logits that the model gave (in its own dtype, so exact and half the size of
FP32 log-probabilities) up to a budget of bytes, and computed again for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fewbit.errors import MeasurementError
from fewbit.evaluate.protocols import Windows
from fewbit.evaluate.statistics import clustered_mean, transform
from fewbit.formats.spec import Scheme
from fewbit.kernels.high_precision import fastest_path
from fewbit.results import Interval, NoiseFloor, QualityResult

__all__ = ["EvaluableModel", "Progress", "Reference", "bits_per_byte", "evaluate_quality", "noise_floor", "perplexity"]

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all) after each batch."""

CHUNK_TOKENS = 64
_BATCH_TOKENS = 2048
_FLOAT32_ENTRIES = 2**23  # 32 MiB for each of the few FP32 temporaries
DEFAULT_BUDGET_BYTES = 2**30


class EvaluableModel(Protocol):
    """What quality needs of a loaded model; `runtime.load.LoadedModel` is one."""

    @property
    def model(self) -> torch.nn.Module:
        """A causal language model: forward(input_ids, past_key_values=, use_cache=) with `.logits` [batch, tokens, vocabulary]."""
        ...

    @property
    def scheme(self) -> Scheme:
        """Its number formats."""
        ...

    def new_cache(self, *, shadow: bool = False) -> Any:
        """An empty KV cache in the scheme's format; with `shadow` one that may spend memory to be read faster."""
        ...


class Reference:
    """BF16's answers on a set of windows, which variants are compared with.

    Args:
        loaded: the BF16 model; it stays referenced, for the windows beyond the budget.
        windows: what is read.
        budget_bytes: most memory for kept logits.
        progress: called after each batch.

    Attributes:
        perplexity: BF16's own, with its interval.

    Raises:
        MeasurementError: a window with logits that are not finite.
    """

    def __init__(
        self, loaded: EvaluableModel, windows: Windows, *, budget_bytes: int = DEFAULT_BUDGET_BYTES, progress: Progress | None = None
    ) -> None:
        self.loaded = loaded
        self.windows = windows
        self._kept: dict[int, torch.Tensor] = {}
        losses = _Sums()
        for batch in _batches(windows, progress):
            logits = _one_pass(loaded, batch.ids)
            losses.add(_losses(logits, batch, loaded))
            if sum(map(_nbytes, self._kept.values())) + _nbytes(logits) <= budget_bytes:
                self._kept[batch.first] = logits.cpu()
        self.perplexity: Interval = losses.perplexity()

    def logits(self, batch: _Batch) -> torch.Tensor:
        """BF16's logits [windows, tokens, vocabulary] for a batch of its own windows."""
        kept = self._kept.get(batch.first)
        return _one_pass(self.loaded, batch.ids) if kept is None else kept


def perplexity(loaded: EvaluableModel, windows: Windows, *, progress: Progress | None = None) -> Interval:
    """A model's perplexity with its 95 % interval over windows.

    Raises:
        MeasurementError: a window with logits that are not finite.
    """
    losses = _Sums()
    for batch in _batches(windows, progress):
        losses.add(_losses(_read(loaded, batch.ids), batch, loaded))
    return losses.perplexity()


def bits_per_byte(perplexity: Interval, windows: Windows) -> Interval:
    """The same loss per UTF-8 byte of the scored text, in bits: unlike perplexity comparable between models whose tokenizers differ."""
    tokens_per_byte = windows.info.scored_tokens / windows.scored_bytes
    return transform(perplexity, lambda value: math.log2(value) * tokens_per_byte)


def evaluate_quality(
    reference: Reference, loaded: EvaluableModel, *, threshold_percent: float = 5.0, progress: Progress | None = None
) -> QualityResult:
    """Quality of a variant against BF16 on the same tokens.

    Args:
        reference: BF16's answers.
        loaded: the variant, with the same tokenizer and vocabulary.
        threshold_percent: largest increase of perplexity that passes.
        progress: called after each batch.

    The reference's own model gets zeros without being read again: a pass over the same tokens in the same batches is the same pass.

    Raises:
        MeasurementError: a window with logits that are not finite, or another vocabulary.
    """
    if loaded.model is reference.loaded.model and loaded.scheme.kv_keys is None:
        nothing = Interval(0.0, 0.0, 0.0)
        return QualityResult(reference.perplexity, nothing, nothing, nothing, threshold_percent, passed=threshold_percent >= 0)
    comparison = _compare(reference, loaded, _read, progress)
    delta = transform(comparison.differences.mean(), _percent)
    kl = transform(comparison.kl.mean(), lambda value: max(value, 0.0))
    flips = transform(comparison.flips.mean(), lambda value: min(max(value, 0.0), 1.0))
    return QualityResult(
        perplexity=comparison.losses.perplexity(),
        perplexity_delta_percent=delta,
        kl_divergence_nats=kl,
        flip_share=flips,
        threshold_percent=threshold_percent,
        passed=delta.value <= threshold_percent,
    )


def noise_floor(reference: Reference, *, tokens: int = 8192, progress: Progress | None = None) -> NoiseFloor:
    """BF16 against itself, read in chunks through its cache instead of in one pass: sizes of the differences that mean nothing.

    Args:
        tokens: read about so many, in whole batches from the beginning. A size needs fewer than a comparison, whose interval hangs on
            their number; what is left of noise in the mean makes the floor larger, never smaller than it is.
        progress: called after each batch.
    """
    comparison = _compare(reference, reference.loaded, _through_cache, progress, tokens=tokens)
    return NoiseFloor(
        perplexity_delta_percent=abs(_percent(comparison.differences.mean().value)),
        kl_divergence_nats=max(comparison.kl.mean().value, 0.0),
        flip_share=comparison.flips.mean().value,
    )


def _percent(difference: float) -> float:
    return 100.0 * math.expm1(difference)


# --- reading -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Neighbouring windows of equal length: ids [windows, tokens]; `first` is the index of the first of `of` windows."""

    first: int
    of: int
    ids: torch.Tensor


def _batches(windows: Windows, progress: Progress | None) -> Iterator[_Batch]:
    """The windows in order, in batches of equal length; the same ones for each model, so that BF16's kept logits fit."""
    total = len(windows.ids)
    first = 0
    while first < total:
        length = len(windows.ids[first])
        end = first + 1
        while end < total and len(windows.ids[end]) == length and (end + 1 - first) * length <= _BATCH_TOKENS:
            end += 1
        yield _Batch(first, total, torch.stack(windows.ids[first:end]))
        first = end
        if progress is not None:
            progress(end, total)


def _device(loaded: EvaluableModel) -> torch.device:
    return next(loaded.model.parameters()).device


@torch.inference_mode()
def _one_pass(loaded: EvaluableModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [windows, tokens, vocabulary] of ids [windows, tokens], without a cache."""
    with fastest_path(ids.numel(), _device(loaded)):
        logits: torch.Tensor = loaded.model(input_ids=ids.to(_device(loaded)), use_cache=False).logits
    return logits


@torch.inference_mode()
def _through_cache(loaded: EvaluableModel, ids: torch.Tensor) -> torch.Tensor:
    """The same, in chunks through the model's own kind of KV cache."""
    cache = loaded.new_cache(shadow=True)  # each chunk reads all before it
    ids = ids.to(_device(loaded))
    window = loaded.scheme.kv_residual_window
    length = min(CHUNK_TOKENS, max(window // 2, 1)) if window else CHUNK_TOKENS
    parts = []
    for start in range(0, ids.shape[1], length):
        chunk = ids[:, start : start + length]
        with fastest_path(chunk.numel(), chunk.device):
            parts.append(loaded.model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def _read(loaded: EvaluableModel, ids: torch.Tensor) -> torch.Tensor:
    """The way of reading that lets the scheme's formats take effect."""
    return (_through_cache if loaded.scheme.kv_keys is not None else _one_pass)(loaded, ids)


# --- scoring -----------------------------------------------------------------------------------------------------------------------


class _Sums:
    """Per window, the sum of a per-token figure and the number of tokens."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, per_token: torch.Tensor) -> None:
        """per_token: [windows, scored tokens]."""
        self._sums += per_token.double().sum(dim=1).tolist()
        self._counts += [per_token.shape[1]] * per_token.shape[0]

    def mean(self) -> Interval:
        return clustered_mean(self._sums, self._counts)

    def perplexity(self) -> Interval:
        return transform(self.mean(), math.exp)


class _Comparison:
    """What is gathered over all windows."""

    def __init__(self) -> None:
        self.losses, self.differences, self.kl, self.flips = _Sums(), _Sums(), _Sums(), _Sums()


def _compare(
    reference: Reference,
    loaded: EvaluableModel,
    read: Callable[[EvaluableModel, torch.Tensor], torch.Tensor],
    progress: Progress | None,
    tokens: int | None = None,
) -> _Comparison:
    gathered, read_tokens = _Comparison(), 0
    for batch in _batches(reference.windows, progress):
        if tokens is not None and read_tokens >= tokens:
            break
        read_tokens += batch.ids.numel()
        logits = read(loaded, batch.ids)
        expected = reference.logits(batch).to(logits.device)
        if logits.shape != expected.shape:
            raise MeasurementError(
                f"{loaded.scheme.name} has {logits.shape[-1]} vocabulary entries, its reference {expected.shape[-1]}",
                "compare quantizations of one model",
            )
        losses = _losses(logits, batch, loaded)
        gathered.losses.add(losses)
        gathered.differences.add(losses - _losses(expected, batch, reference.loaded))
        kl, flips = zip(*map(_kl_and_flips, _slices(expected), _slices(logits)), strict=True)
        gathered.kl.add(_finite(torch.cat(kl), batch, loaded))
        gathered.flips.add(_finite(torch.cat(flips), batch, loaded))
    return gathered


def _slices(logits: torch.Tensor) -> Sequence[torch.Tensor]:
    """The logits that predict a token of their window (all but the last), as slices [tokens, vocabulary] small enough for FP32."""
    scored = logits[:, :-1].flatten(0, 1)
    tokens = max(1, _FLOAT32_ENTRIES // scored.shape[-1])
    return [scored[start : start + tokens] for start in range(0, len(scored), tokens)]


def _losses(logits: torch.Tensor, batch: _Batch, loaded: EvaluableModel) -> torch.Tensor:
    """-log q(token) of each scored token, float32 [windows, scored tokens].

    Raises:
        MeasurementError: a loss that is not finite.
    """
    targets = batch.ids[:, 1:].flatten().to(logits.device)
    parts = []
    for part in _slices(logits):
        parts.append(torch.nn.functional.cross_entropy(part.float(), targets[: len(part)], reduction="none"))
        targets = targets[len(part) :]
    return _finite(torch.cat(parts), batch, loaded)


def _finite(per_token: torch.Tensor, batch: _Batch, loaded: EvaluableModel) -> torch.Tensor:
    """The figures of a batch's scored tokens as [windows, scored tokens]; an error when one is NaN or infinite, which no mean survives."""
    per_window = per_token.view(len(batch.ids), -1)
    bad = (~per_window.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(
            f"{loaded.scheme.name} gives logits that are not finite in window {batch.first + bad[0] + 1} of {batch.of}",
            "look for overflow or damaged weights, or choose a format with more range",
        )
    return per_window


def _kl_and_flips(expected: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) and whether the most likely token differs, float32 [tokens] each, of logits [tokens, vocabulary] of p and q."""
    log_p, log_q = expected.float().log_softmax(dim=-1), logits.float().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl, (expected.argmax(dim=-1) != logits.argmax(dim=-1)).float()


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
