"""The KV cache: what attention reads, what stays resident, and that both follow from the scheme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig

from fewbit.checkpoints.sources import DirectorySource
from fewbit.errors import FormatError, MeasurementError, UnsupportedModelError
from fewbit.formats.quantize import dequantize_dynamic, quantize_dynamic
from fewbit.formats.spec import QuantSpec, Scheme, get_scheme
from fewbit.models.accounting import kv_scheme_bytes_per_token
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.kv_cache import KVCache
from fewbit.runtime.load import load_model

CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=2)
QUANTIZED = ["KV-INT8", "KV-FP8", "KV-INT4", "KV-INT4-KIVI"]
SCHEMES = ["BF16", *QUANTIZED]


def states(tokens: int, batch: int = 2, seed: int = 0, head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 2, tokens, head_dim, generator=generator).to(torch.bfloat16) for _ in range(2))
    return keys, values


def fill(cache: KVCache, keys: torch.Tensor, values: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    for k, v in zip(keys.split(chunk, dim=2), values.split(chunk, dim=2), strict=True):
        for layer in range(2):
            read = cache.update(k, v, layer)
    return read


def expected_read(x: torch.Tensor, spec: QuantSpec | None, window: int) -> torch.Tensor:
    """The oldest tokens through the format in whole units, the newest as they are."""
    if spec is None:
        return x
    unit = spec.group_size if spec.strategy == "channel" and spec.group_size else 1
    old = max(x.shape[2] - window, 0) // unit * unit
    if not old:
        return x
    return torch.cat([dequantize_dynamic(*quantize_dynamic(x[:, :, :old], spec), spec, x.dtype), x[:, :, old:]], dim=2)


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_attention_reads_history_and_window(name: str, chunk: int, shadow: bool) -> None:
    """However the tokens arrive, the result is the same: rounded history, exact window. 200 tokens make the buffers grow."""
    scheme = get_scheme(name)
    keys, values = states(200)
    cache = KVCache(CONFIG, scheme, shadow=shadow)
    read_keys, read_values = fill(cache, keys, values, chunk)
    assert torch.equal(read_keys, expected_read(keys, scheme.kv_keys, scheme.kv_residual_window))
    assert torch.equal(read_values, expected_read(values, scheme.kv_values, scheme.kv_residual_window))
    assert cache.get_seq_length() == 200
    assert cache.get_mask_sizes(3, 0) == (203, 0)


@pytest.mark.parametrize(
    ("name", "largest"), [("BF16", 1.0), ("KV-INT8", 0.55), ("KV-FP8", 0.55), ("KV-INT4", 0.35), ("KV-INT4-KIVI", 0.35)]
)
def test_bytes_per_token(name: str, largest: float) -> None:
    scheme = get_scheme(name)
    cache = KVCache(CONFIG, scheme)
    fill(cache, *states(1), chunk=1)
    bf16 = 2 * 2 * 2 * 64 * 2
    assert cache.bytes_per_token() <= largest * bf16
    assert cache.bytes_per_token() == kv_scheme_bytes_per_token(CONFIG, scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_really_falls(name: str) -> None:
    """nbytes, summed over the storages, is what bytes_per_token and constant_bytes promise, with at most half of it unused capacity."""
    batch = 3
    cache = KVCache(CONFIG, get_scheme(name))
    fill(cache, *states(1000, batch), chunk=10)
    quantized_tokens = 1000 - get_scheme(name).kv_residual_window
    needed = batch * (quantized_tokens * cache.bytes_per_token() + cache.constant_bytes())
    assert needed <= cache.nbytes() * 1.04
    assert cache.nbytes() <= 1.55 * needed


def test_constant_bytes_are_the_window() -> None:
    sizes = {name: KVCache(CONFIG, get_scheme(name)) for name in SCHEMES}
    for cache in sizes.values():
        fill(cache, *states(100), chunk=50)
    per_token = 2 * 2 * 64 * 2  # layers, heads, head_dim, bytes: keys or values
    assert sizes["BF16"].constant_bytes() == 0
    assert sizes["KV-INT8"].constant_bytes() == 0
    assert sizes["KV-INT4"].constant_bytes() == 2 * 32 * per_token
    assert sizes["KV-INT4-KIVI"].constant_bytes() == (32 + 63) * per_token


@pytest.mark.parametrize("name", ["BF16", "KV-INT8"])
def test_a_step_copies_only_itself(name: str) -> None:
    """Over 1,000 steps the storages are replaced a logarithmic number of times."""
    cache = KVCache(CONFIG, get_scheme(name))
    keys, values = states(1, batch=1)
    addresses = set()
    for _ in range(1000):
        cache.update(keys, values, 0)
        addresses.add(cache.nbytes())
    assert len(addresses) <= 9


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_crop_and_continue(name: str, shadow: bool) -> None:
    """After a crop the kept tokens read as they did, and the cache goes on."""
    scheme = get_scheme(name)
    keys, values = states(150)
    cache = KVCache(CONFIG, scheme, shadow=shadow)
    before = [x.clone() for x in fill(cache, keys, values, chunk=50)]
    cache.crop(-77)
    assert cache.get_seq_length() == 73
    more = states(1, seed=1)
    read = cache.update(*more, 1)
    unit = 32 if name == "KV-INT4-KIVI" else 1
    kept = 73 - scheme.kv_residual_window if unit == 1 else 64
    for old, new, last in zip(before, read, more, strict=True):
        assert new.shape[2] == 74
        assert torch.equal(new[:, :, :kept], old[:, :, :kept])
        # A token that is dequantized into the window and rounded again moves by no more than one rounding.
        torch.testing.assert_close(new[:, :, :73], old[:, :, :73], rtol=0.02, atol=0.02)
        assert torch.equal(new[:, :, 73:], last) or scheme.kv_residual_window == 0


def test_a_positive_crop_is_refused() -> None:
    """It meant the length to keep in older transformers; taken as a number to remove, the wrong tokens would go."""
    cache = KVCache(CONFIG, get_scheme("KV-INT8"))
    fill(cache, *states(20), chunk=20)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    assert cache.get_seq_length() == 20


def test_crop_everything_and_reset() -> None:
    cache = KVCache(CONFIG, get_scheme("KV-INT4"))
    fill(cache, *states(100), chunk=50)
    cache.crop(-500)
    assert cache.get_seq_length() == 0
    fill(cache, *states(5), chunk=5)
    assert cache.get_seq_length() == 5
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


@pytest.mark.parametrize("shadow", [False, True])
def test_batch_operations(shadow: bool) -> None:
    keys, values = states(80, batch=3)
    cache = KVCache(CONFIG, get_scheme("KV-INT4"), shadow=shadow)
    before, _ = fill(cache, keys, values, chunk=80)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    k, v = states(1, batch=6)
    after, _ = cache.update(k, v, 1)
    assert torch.equal(after[:, :, :48], before[[2, 2, 0, 0, 0, 0], :, :48])


def test_a_group_that_does_not_divide_the_head() -> None:
    cache = KVCache(LlamaConfig(hidden_size=160, num_attention_heads=4, num_hidden_layers=1), get_scheme("KV-INT4"))
    with pytest.raises(FormatError, match="32 does not divide the model's head_dim 40"):
        cache.update(*states(4, head_dim=40), 0)


def test_an_empty_cache_cannot_be_measured() -> None:
    with pytest.raises(MeasurementError, match="empty"):
        KVCache(CONFIG, get_scheme("KV-INT8")).bytes_per_token()


def test_layers_without_keys_and_values_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        KVCache(Qwen3NextConfig(num_hidden_layers=4), get_scheme("KV-INT8"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox", "opt", "phi3"])
def test_models_read_the_same_as_from_transformers_cache(name: str, zoo_dir: Callable[[str], Path]) -> None:
    """In high precision, in chunks, with two sequences; gemma2's sliding window of 8 is shorter than the text."""
    loaded = load_model(DirectorySource(zoo_dir(name)), QuantizationConfig(get_scheme("BF16")))
    ids = torch.arange(3, 67).view(2, 32)
    caches = (loaded.new_cache(), DynamicCache(config=loaded.config))
    with torch.no_grad():
        ours, theirs = (torch.cat([loaded.model(part, past_key_values=cache).logits for part in ids.split(5, 1)], 1) for cache in caches)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_caches_change_logits_a_little(name: str, tiny_llama_dir: Path) -> None:
    loaded = load_model(DirectorySource(tiny_llama_dir), QuantizationConfig(get_scheme(name)))
    ids = torch.arange(200)[None]
    with torch.no_grad():
        exact = loaded.model(ids, use_cache=False).logits.float()
        cache = loaded.new_cache()
        read = torch.cat([loaded.model(part, past_key_values=cache).logits for part in ids.split(8, 1)], 1).float()
    error = (read - exact).norm() / exact.norm()
    assert 0 < error < {"KV-INT8": 0.05, "KV-FP8": 0.15, "KV-INT4": 0.3, "KV-INT4-KIVI": 0.3}[name]


def test_keys_per_channel_survive_an_outlier_channel() -> None:
    """KIVI's reason: with one large channel, scales per channel keep the other channels, scales per group of channels lose them."""
    keys, values = states(256, batch=1)
    keys[..., 5] *= 100
    errors = {}
    for name in ("KV-INT4", "KV-INT4-KIVI"):
        read, _ = fill(KVCache(CONFIG, get_scheme(name)), keys, values, chunk=256)
        others = [c for c in range(64) if c != 5]
        errors[name] = float((read - keys)[..., others].float().norm())
    assert errors["KV-INT4-KIVI"] < 0.4 * errors["KV-INT4"]


def test_window_without_quantization_is_no_window() -> None:
    cache = KVCache(CONFIG, Scheme("odd", kv_residual_window=32))
    fill(cache, *states(100), chunk=10)
    assert cache.constant_bytes() == 0
