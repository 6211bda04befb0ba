"""The KL gate: does the quantized model still predict what the model in high precision predicts, on text that nothing was fitted to?

A few windows of held-out text are carried through the walk on two paths, one through the blocks as they were and one through the rounded
ones, so that the gate needs no more memory than the walk. Behind the last block both go through the final norm and the head, and

    KL_t = sum_v p(v | t) (log p(v | t) - log q(v | t))

is summed over the tokens of each window (p: high precision, q: quantized). Windows are the independent units of the interval, which
`workflows.quantize` makes of these sums. The threshold is a row of `gate.toml`.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fewbit.corpora.documents import draw_evenly
from fewbit.corpora.text import load_corpus
from fewbit.errors import CorpusError
from fewbit.formats.spec import Scheme
from fewbit.models.accounting import check_token_ids
from fewbit.models.tokens import encode, own_bos

__all__ = ["GateSums", "GateText", "compare_logits", "default_threshold", "load_gate_text"]

_MIN_WINDOWS = 2
_POSITIONS = 64  # whose distributions are compared at a time


@dataclass(frozen=True)
class GateText:
    """Windows that the gate looks at.

    Attributes:
        ids: int64 [windows, T].
        name, sha256: of the text. ids_sha256: of the token ids.
    """

    ids: torch.Tensor
    name: str
    sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class GateSums:
    """Sums over the scored tokens of one window.

    Attributes:
        kl: in nats. reference_loss, loss: negative log-likelihood of the next token in nats, of the model in high precision and of the
            quantized one. flips: tokens whose most likely next token differs. tokens: that were scored.
    """

    kl: float
    reference_loss: float
    loss: float
    flips: int
    tokens: int


def load_gate_text(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, texts: Sequence[Path], *, windows: int, sequence_length: int, seed: int
) -> GateText:
    """Cut windows out of held-out text, drawn evenly over it.

    Args:
        texts: the user's files; the held-out part of the standard library when empty.
        windows, sequence_length: fewer and shorter ones where the text or the model has no more.

    Raises:
        CorpusError: less than two windows of text.
        ModelError: the tokenizer gives tokens that the model does not have.
    """
    corpus = load_corpus(files=texts)
    own_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    bos = own_bos(tokenizer)
    length = min(sequence_length, own_length or sequence_length)
    stream = encode(tokenizer, corpus.joined, add_special_tokens=False)
    body = length - len(bos)
    available = len(stream) // body
    if available < _MIN_WINDOWS:
        raise CorpusError(
            f"the gate's text '{corpus.name}' fills {available} windows of {length} tokens, {_MIN_WINDOWS} are needed",
            "give longer text, or skip the gate",
        )
    chosen = draw_evenly(available, min(windows, available), seed)
    ids = torch.tensor([bos + stream[i * body : (i + 1) * body] for i in chosen], dtype=torch.int64)
    check_token_ids(int(ids.max()), config)
    digest = hashlib.sha256(str(list(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()
    return GateText(ids, corpus.name, corpus.sha256, digest)


def compare_logits(reference: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor) -> GateSums:
    """Compare two models' predictions on one window.

    Args:
        reference, quantized: [1, T, vocabulary], floating point; `reference` in high precision.
        ids: [1, T].
    """
    scored = ids.shape[1] - 1  # the last position predicts a token that nobody knows
    parts = [
        _compare(reference[0, start:stop].float(), quantized[0, start:stop].float(), ids[0, start + 1 : stop + 1])
        for start, stop in ((start, min(start + _POSITIONS, scored)) for start in range(0, scored, _POSITIONS))
    ]
    return GateSums(
        kl=sum(part.kl for part in parts),
        reference_loss=sum(part.reference_loss for part in parts),
        loss=sum(part.loss for part in parts),
        flips=sum(part.flips for part in parts),
        tokens=scored,
    )


def _compare(reference: torch.Tensor, quantized: torch.Tensor, following: torch.Tensor) -> GateSums:
    """Some positions [n, vocabulary]; a vocabulary of 150,000 for all positions at once would take gigabytes."""
    p, q = torch.log_softmax(reference, dim=-1), torch.log_softmax(quantized, dim=-1)
    return GateSums(
        kl=float(torch.sum(p.exp() * (p - q), dtype=torch.float64)),
        reference_loss=-float(p.gather(1, following[:, None]).sum(dtype=torch.float64)),
        loss=-float(q.gather(1, following[:, None]).sum(dtype=torch.float64)),
        flips=int((p.argmax(-1) != q.argmax(-1)).sum()),
        tokens=len(following),
    )


def default_threshold(scheme: Scheme) -> float:
    """The row of `gate.toml` for a scheme; that of the next wider one in the table when it has none of its own."""
    assert scheme.weights is not None
    rows = tomllib.loads(files("fewbit.walk").joinpath("gate.toml").read_text(encoding="utf-8"))
    known = {tuple(int(part) for part in name[1:].split("a")): float(value) for name, value in rows.items()}
    weights = scheme.weights.num_bits
    inputs = 16 if scheme.input_activations is None else scheme.input_activations.num_bits
    fitting = [key for key in known if key[0] <= weights and key[1] >= inputs]
    return known[max(fitting, key=lambda key: (key[0], -key[1]))]
