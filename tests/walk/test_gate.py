"""The gate's figures against a direct calculation, its windows, and its table of thresholds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fewbit.checkpoints.sources import open_source
from fewbit.errors import CorpusError
from fewbit.formats.spec import SCHEMES, get_scheme
from fewbit.walk.gate import compare_logits, default_threshold, load_gate_text


def test_sums_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(1, 150, 40, generator=generator), torch.randn(1, 150, 40, generator=generator)
    ids = torch.randint(0, 40, (1, 150), generator=generator)
    sums = compare_logits(p, q, ids)
    expected = functional.kl_div(q[0, :-1].log_softmax(-1), p[0, :-1].log_softmax(-1), log_target=True, reduction="sum")
    assert sums.kl == pytest.approx(float(expected), rel=1e-5) and sums.tokens == 149
    assert sums.loss == pytest.approx(float(functional.cross_entropy(q[0, :-1], ids[0, 1:], reduction="sum")), rel=1e-5)
    assert sums.flips == int((p[0, :-1].argmax(-1) != q[0, :-1].argmax(-1)).sum())
    same = compare_logits(p, p, ids)
    assert same.kl == 0 and same.flips == 0 and same.loss == same.reference_loss


def test_windows_are_drawn_and_hashed(tiny_llama_dir: Path, text_file: Path) -> None:
    source = open_source(tiny_llama_dir)
    one, same, other = (
        load_gate_text(source.tokenizer(), source.config, (text_file,), windows=4, sequence_length=32, seed=seed) for seed in (0, 0, 1)
    )
    assert one.ids.shape == (4, 32) and torch.equal(one.ids, same.ids) and one.ids_sha256 == same.ids_sha256 != other.ids_sha256
    assert one.sha256 == other.sha256 and one.name == text_file.name


def test_too_little_text_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    source = open_source(tiny_llama_dir)
    with pytest.raises(CorpusError, match=r"short\.txt.*2 are needed"):
        load_gate_text(source.tokenizer(), source.config, (short,), windows=4, sequence_length=64, seed=0)


def test_every_scheme_has_a_threshold_and_fewer_bits_a_larger_one() -> None:
    assert all(default_threshold(scheme) > 0 for scheme in SCHEMES.values() if scheme.weights is not None)
    ordered = [default_threshold(get_scheme(name)) for name in ("W8A16", "W8A8", "W4A16", "W3A16", "W2A16")]
    assert ordered == sorted(ordered) and len(set(ordered)) == len(ordered)
