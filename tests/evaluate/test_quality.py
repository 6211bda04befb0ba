"""Quality figures against independent computations: transformers' own loss, and naive float64 sums over the vocabulary."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import fewbit.evaluate.quality as quality_module
from fewbit.errors import MeasurementError
from fewbit.evaluate.protocols import Windows
from fewbit.evaluate.quality import Reference, bits_per_byte, evaluate_quality, noise_floor, perplexity
from fewbit.formats.spec import Scheme, get_scheme
from fewbit.results import Interval, ProtocolInfo

VOCABULARY = 512


@dataclass
class Loaded:
    """What quality needs of `runtime.load.LoadedModel`."""

    model: torch.nn.Module
    scheme: Scheme
    cache: Callable[[], Any] = DynamicCache

    def new_cache(self, *, shadow: bool = False) -> Any:
        return self.cache()


class RoundedCache(DynamicCache):
    """Stores keys and values rounded to eighths, a stand-in for a quantized cache; counts how it is fed."""

    calls: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 0:
            self.calls.append(key_states.shape[2])
        return super().update((key_states * 8).round() / 8, (value_states * 8).round() / 8, layer_idx, *args, **kwargs)


def _windows(*lengths: int) -> Windows:
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths)
    scored = sum(lengths) - len(lengths)
    info = ProtocolInfo("test", "random", max(lengths), max(lengths), len(lengths), scored, "0" * 64, "3.11", 0)
    return Windows(ids, 3 * scored, info)


@pytest.fixture(scope="module")
def bf16(tiny_llama_dir: Path) -> Loaded:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    return Loaded(model, get_scheme("BF16"))


@pytest.fixture(scope="module")
def worse(bf16: Loaded) -> Loaded:
    """The same model with coarsely rounded MLP weights, under the name of a weight scheme."""
    model = copy.deepcopy(bf16.model)
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            parameter.data = (parameter.data * 10).round() / 10
    return Loaded(model, get_scheme("W4A16"))


WINDOWS = _windows(96, 96, 96, 40, 40, 96, 17)


def _naive(loaded: Loaded, windows: Windows) -> list[torch.Tensor]:
    """Log-probabilities [scored tokens, vocabulary] of each window, one at a time, in float64."""
    with torch.no_grad():
        return [loaded.model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for ids in windows.ids]


def test_perplexity_agrees_with_the_loss_of_transformers(bf16: Loaded) -> None:
    total = 0.0
    with torch.no_grad():
        for ids in WINDOWS.ids:
            total += float(bf16.model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)
    expected = math.exp(total / WINDOWS.info.scored_tokens)
    # batches of other shapes round to BF16 at other places
    assert perplexity(bf16, WINDOWS).value == pytest.approx(expected, rel=2e-3)
    assert Reference(bf16, WINDOWS).perplexity == perplexity(bf16, WINDOWS)


def test_perplexity_is_exact_in_float64(bf16: Loaded) -> None:
    double = Loaded(copy.deepcopy(bf16.model).double(), bf16.scheme)
    losses = [-log_p.gather(1, ids[1:, None]).sum() for log_p, ids in zip(_naive(double, WINDOWS), WINDOWS.ids, strict=True)]
    expected = math.exp(float(sum(losses)) / WINDOWS.info.scored_tokens)
    assert perplexity(double, WINDOWS).value == pytest.approx(expected, rel=1e-6)


def test_kl_flips_and_delta_agree_with_naive_float64_sums(bf16: Loaded, worse: Loaded) -> None:
    baseline, variant = (Loaded(copy.deepcopy(m.model).double(), m.scheme) for m in (bf16, worse))
    p, q = _naive(baseline, WINDOWS), _naive(variant, WINDOWS)
    targets = torch.cat([ids[1:, None] for ids in WINDOWS.ids])
    log_p, log_q = torch.cat(p), torch.cat(q)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    flips = (log_p.argmax(-1) != log_q.argmax(-1)).double()
    difference = (log_p - log_q).gather(1, targets)[:, 0]

    result = evaluate_quality(Reference(baseline, WINDOWS), variant)
    assert result.kl_divergence_nats.value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.flip_share.value == pytest.approx(float(flips.mean()), rel=1e-12)
    assert result.perplexity_delta_percent.value == pytest.approx(100 * math.expm1(float(difference.mean())), rel=1e-4)
    own = perplexity(variant, WINDOWS).value / perplexity(baseline, WINDOWS).value
    assert result.perplexity_delta_percent.value == pytest.approx(100 * (own - 1), rel=1e-4)
    assert result.perplexity == perplexity(variant, WINDOWS)
    assert 0.05 < result.flip_share.value < 0.95, "the comparison is not trivial"

    # the interval: per-window sums, by hand
    parts = torch.stack([part.sum() for part in kl.split([len(ids) - 1 for ids in WINDOWS.ids])])
    counts = torch.tensor([len(ids) - 1.0 for ids in WINDOWS.ids], dtype=torch.float64)
    error = ((parts - kl.mean() * counts).square().sum() * 7 / 6).sqrt() / counts.sum()
    assert result.kl_divergence_nats.high - result.kl_divergence_nats.value == pytest.approx(2.446911851 * float(error), rel=1e-4)


def test_bf16_against_itself_is_exactly_zero(bf16: Loaded) -> None:
    result = evaluate_quality(Reference(bf16, WINDOWS), bf16)
    zero = Interval(0.0, 0.0, 0.0)
    assert (result.perplexity_delta_percent, result.kl_divergence_nats, result.flip_share) == (zero, zero, zero)
    assert result.passed


def test_the_threshold_decides(bf16: Loaded, worse: Loaded) -> None:
    reference = Reference(bf16, WINDOWS)
    delta = evaluate_quality(reference, worse).perplexity_delta_percent.value
    assert evaluate_quality(reference, worse, threshold_percent=delta + 0.1).passed
    assert not evaluate_quality(reference, worse, threshold_percent=delta - 0.1).passed


def test_a_budget_of_nothing_gives_the_same_figures(bf16: Loaded, worse: Loaded) -> None:
    kept = evaluate_quality(Reference(bf16, WINDOWS), worse)
    one_batch = 3 * 96 * VOCABULARY * 2
    for budget in (0, one_batch):
        assert evaluate_quality(Reference(bf16, WINDOWS, budget_bytes=budget), worse) == kept


def test_small_slices_change_nothing(bf16: Loaded, worse: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_quality(Reference(bf16, WINDOWS), worse)
    monkeypatch.setattr(quality_module, "_FLOAT32_ENTRIES", 7 * VOCABULARY)
    sliced = evaluate_quality(Reference(bf16, WINDOWS), worse)
    assert sliced.kl_divergence_nats.value == pytest.approx(whole.kl_divergence_nats.value, rel=1e-6)
    assert sliced.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)
    assert sliced.flip_share == whole.flip_share


def test_a_quantized_cache_is_read_in_chunks_and_seen(bf16: Loaded) -> None:
    caches: list[RoundedCache] = []

    def cache() -> RoundedCache:
        caches.append(RoundedCache())
        return caches[-1]

    windows = _windows(150, 150, 150)
    reference = Reference(bf16, windows)
    cached = evaluate_quality(reference, Loaded(bf16.model, get_scheme("KV-INT8"), cache))
    assert [c.calls for c in caches] == [[64, 64, 22]]
    floor = noise_floor(reference)
    assert cached.kl_divergence_nats.low > 2 * floor.kl_divergence_nats
    # the same cache under a scheme that keeps its KV in BF16 is not asked for
    evaluate_quality(reference, Loaded(bf16.model, get_scheme("BF16"), cache))
    assert len(caches) == 1


def test_chunks_are_half_the_residual_window(bf16: Loaded) -> None:
    """In decode the newest tokens are in high precision for every query; chunks longer than the window would hide that."""
    caches = [RoundedCache()]
    perplexity(Loaded(bf16.model, get_scheme("KV-INT4"), lambda: caches[-1]), _windows(50, 50))
    assert get_scheme("KV-INT4").kv_residual_window == 32
    assert caches[0].calls == [16, 16, 16, 2]


def test_the_noise_floor_is_small(bf16: Loaded, worse: Loaded) -> None:
    reference = Reference(bf16, WINDOWS)
    floor, variant = noise_floor(reference), evaluate_quality(reference, worse)
    assert 0 <= floor.kl_divergence_nats < 0.01 * variant.kl_divergence_nats.value
    assert 0 <= floor.flip_share < 0.2 * variant.flip_share.value
    assert 0 <= floor.perplexity_delta_percent < 0.5


def test_the_noise_floor_is_read_through_the_cache(bf16: Loaded) -> None:
    floor = noise_floor(Reference(Loaded(bf16.model, bf16.scheme, RoundedCache), WINDOWS))
    assert floor.kl_divergence_nats > 0 and floor.flip_share > 0 and floor.perplexity_delta_percent > 0


def test_logits_that_are_not_finite_name_the_first_window(bf16: Loaded) -> None:
    broken = Loaded(copy.deepcopy(bf16.model), get_scheme("W2A16"))
    token = int(WINDOWS.ids[1][5])
    assert token not in WINDOWS.ids[0]
    # the embedding is tied: give the broken row to the input side alone
    broken.model.model.embed_tokens.weight = torch.nn.Parameter(broken.model.model.embed_tokens.weight.detach().clone())
    broken.model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(MeasurementError, match=r"W2A16 gives logits that are not finite in window 2 of 7"):
        perplexity(broken, WINDOWS)
    with pytest.raises(MeasurementError, match=r"window 2 of 7"):
        evaluate_quality(Reference(bf16, WINDOWS), broken)


def test_another_vocabulary_is_refused(bf16: Loaded) -> None:
    other = copy.deepcopy(bf16.model)
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(MeasurementError, match="520 vocabulary entries, its reference 512"):
        evaluate_quality(Reference(bf16, WINDOWS), Loaded(other, get_scheme("W8A16")))


def test_bits_per_byte_is_the_loss_per_byte(bf16: Loaded) -> None:
    measured = perplexity(bf16, WINDOWS)
    bits = bits_per_byte(measured, WINDOWS)
    assert bits.value == pytest.approx(math.log2(measured.value) / 3)
    assert bits.low < bits.value < bits.high


def test_progress_counts_every_window(bf16: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(bf16, WINDOWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (5, 7), (6, 7), (7, 7)]


def test_a_result_is_valid_json(bf16: Loaded, worse: Loaded) -> None:
    text = json.dumps(asdict(evaluate_quality(Reference(bf16, WINDOWS), worse)), allow_nan=False)
    assert json.loads(text)["passed"] in (True, False)
