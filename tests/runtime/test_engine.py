"""The engine against transformers: the same logits in float32, the same greedy tokens, in every KV format."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoints.sources import open_source
from fewbit.formats.spec import get_scheme
from fewbit.kernels.cpu.extension import missing_native
from fewbit.runtime.config import QuantizationConfig
from fewbit.runtime.engine import Engine, engine_refusal
from fewbit.runtime.load import load_model
from fewbit.runtime.runner import decode_step, prefill

pytestmark = pytest.mark.skipif(missing_native() is not None, reason=str(missing_native()))


# Logits here reach about 10. INT8 and FP8 codes near a boundary fall either way when the sums before them differ in the last bit.
@pytest.mark.parametrize(("scheme", "tolerance"), [("BF16", 1e-4), ("KV-INT8", 0.1), ("KV-FP8", 0.2), ("KV-INT4", 0.2)])
def test_it_computes_what_transformers_computes(scheme: str, tolerance: float) -> None:
    loaded = load_model(open_source(None), QuantizationConfig(get_scheme(scheme)), dtype=torch.float32)
    engine, theirs = Engine(loaded), loaded.new_cache()
    ours = engine.new_cache(128)
    prompt = torch.randint(0, loaded.config.vocab_size, (1, 70), generator=torch.Generator().manual_seed(0))
    expected = prefill(loaded, prompt, theirs)[0]
    torch.testing.assert_close(engine.prefill(prompt[0], ours), expected, rtol=0, atol=tolerance)
    for _ in range(24):
        token = expected.argmax()
        assert int(ours.best[0]) == int(token)
        expected = decode_step(loaded, token.view(1, 1), theirs)[0]
        torch.testing.assert_close(engine.decode(token.view(1), ours)[0], expected, rtol=0, atol=tolerance)


def test_it_says_why_it_cannot_run_a_model() -> None:
    kivi = load_model(open_source(None), QuantizationConfig(get_scheme("KV-INT4-KIVI")))
    assert "one format for keys and values" in (engine_refusal(kivi) or "")
