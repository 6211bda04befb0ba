"""How text becomes windows of tokens, as data: a perplexity without its protocol cannot be compared with anything.

What is scored. A window is a run of token ids that the model reads from position 0, with nothing before it. The model predicts each
token from those before it in the window; the first token of a window has none and is **never scored**, so a window of n ids gives n - 1
scored tokens. Windows do not overlap. Perplexity is exp of the mean over all scored tokens, so a long window weighs more than a short
one. (Averaging the windows' perplexities instead gives another, larger figure: Jensen's inequality.)

Longer context means lower perplexity (Llama-2-7B on WikiText-2: 5.47 at 2,048 tokens, 5.12 at 4,096), because fewer tokens are
predicted from little context; hence every result carries the context length that was really used.

The protocols:

    stdlib         The texts joined, tokenized once, cut into windows of 512 tokens. When `max_tokens` cuts the corpus, windows are
                   drawn evenly over all of it. Each window starts with the beginning-of-sequence token when the tokenizer adds one by
                   itself, because some models (Gemma) predict nothing sensible without; it takes the place of one text token, and the
                   first text token is scored.
    standard-2048  What the quantization papers report: the texts joined, tokenized once with the tokenizer's defaults (a
                   beginning-of-sequence token stands once, before the whole text), cut into windows of 2,048 tokens, the rest at the
                   end dropped; all windows are used.
    lab-512        The first 100 texts of more than 100 characters, each tokenized on its own with the tokenizer's defaults and cut off
                   at 512 tokens.

All use the model's own maximum length when that is smaller, and say so in the result's note.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fewbit.corpora.documents import draw_evenly
from fewbit.corpora.text import Corpus
from fewbit.errors import CorpusError, UsageError
from fewbit.models.accounting import check_token_ids
from fewbit.models.tokens import encode, own_bos
from fewbit.results import ProtocolInfo

__all__ = ["PROTOCOLS", "Protocol", "Windows", "default_protocol", "get_protocol", "make_windows"]

# A mean over one window has no error bar, and fewbit reports no quality without one.
_MIN_WINDOWS = 2


@dataclass(frozen=True)
class Protocol:
    """A named way to cut text into windows.

    Attributes:
        name: what the user types and the result carries.
        context_length: tokens of a window, at most.
        joined: True: the texts as one stream, cut into equal windows. False: one window per text, cut off at `context_length`.
        bos_per_window: put the tokenizer's own beginning-of-sequence token before every window instead of once before the text.
        max_texts: first texts that are used when not joined; None for all.
        longer_than_characters: texts up to this length are skipped when not joined.
    """

    name: str
    context_length: int
    joined: bool = True
    bos_per_window: bool = False
    max_texts: int | None = None
    longer_than_characters: int = 0


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("stdlib", 512, bos_per_window=True),
        Protocol("standard-2048", 2048),
        Protocol("lab-512", 512, joined=False, max_texts=100, longer_than_characters=100),
    )
}
_DEFAULT_BY_CORPUS = {"wikitext2": "standard-2048"}


@dataclass(frozen=True)
class Windows:
    """The token windows that quality is measured on.

    Attributes:
        ids: one int64 tensor [tokens] per window, on the CPU, at least two tokens each; all but the first are scored.
        scored_bytes: UTF-8 bytes of the scored text, over all windows.
        info: what a result says about how it was measured.
    """

    ids: tuple[torch.Tensor, ...]
    scored_bytes: int
    info: ProtocolInfo


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UsageError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{name}'", f"choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def default_protocol(corpus: Corpus) -> Protocol:
    """The protocol that a corpus is usually measured with: the papers' for WikiText-2, `stdlib` for all else."""
    return PROTOCOLS[_DEFAULT_BY_CORPUS.get(corpus.name, "stdlib")]


def make_windows(
    protocol: str | Protocol | None,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Windows:
    """Cut a corpus into windows.

    Args:
        protocol: a name, a protocol, or None for the corpus's usual one.
        corpus: the text.
        tokenizer: the model's.
        config: the model's; `max_position_embeddings` bounds the windows.
        seed: of the draw when `max_tokens` cuts the corpus.
        max_tokens: most tokens in all windows together; None for the whole corpus.

    Raises:
        UsageError: an unknown protocol, or `max_tokens` below two windows.
        CorpusError: the text fills fewer than two windows.
        ModelError: the tokenizer gives tokens that the model does not have.
    """
    chosen = default_protocol(corpus) if protocol is None else get_protocol(protocol) if isinstance(protocol, str) else protocol
    own_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = min(chosen.context_length, own_length or chosen.context_length)
    bos = own_bos(tokenizer) if chosen.bos_per_window else []
    every = _cut_stream(chosen, corpus, tokenizer, context, bos) if chosen.joined else _one_per_text(chosen, corpus, tokenizer, context)
    kept = draw_evenly(len(every), _count_within(every, max_tokens), seed)
    ids = tuple(torch.tensor(every[index], dtype=torch.int64) for index in kept)
    check_token_ids(max(int(window.max()) for window in ids), config)
    notes = [corpus.note] if corpus.note else []
    if context < chosen.context_length:
        notes.append(f"windows of {context} tokens, the model's own length, not {chosen.context_length}")
    if len(kept) < len(every):
        notes.append(f"{len(kept)} of {len(every)} windows, drawn evenly over the corpus")
    info = ProtocolInfo(
        name=chosen.name,
        corpus=corpus.name,
        context_length=context,
        stride=context - len(bos),
        windows=len(ids),
        scored_tokens=sum(len(window) - 1 for window in ids),
        text_sha256=corpus.sha256,
        python=platform.python_version(),
        seed=seed,
        note="; ".join(notes),
    )
    return Windows(ids, sum(_text_bytes(tokenizer, window[1:]) for window in ids), info)


def _cut_stream(protocol: Protocol, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, bos: list[int]) -> list[list[int]]:
    stream = encode(tokenizer, corpus.joined, add_special_tokens=not protocol.bos_per_window)
    length = context - len(bos)
    windows = [bos + stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if len(windows) < _MIN_WINDOWS:
        raise CorpusError(
            f"the text '{corpus.name}' is too short: {len(stream)} tokens, protocol {protocol.name} needs {_MIN_WINDOWS} windows of "
            f"{context} to give an error bar",
            "pass more text with --text, or choose a protocol with a shorter context",
        )
    return windows


def _one_per_text(protocol: Protocol, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int) -> list[list[int]]:
    texts = [text for text in corpus.texts if len(text) > protocol.longer_than_characters][: protocol.max_texts]
    windows = [window for text in texts if len(window := encode(tokenizer, text)[:context]) > 1]
    if len(windows) < _MIN_WINDOWS:
        raise CorpusError(
            f"the text '{corpus.name}' is too short: {len(windows)} text(s) of more than {protocol.longer_than_characters} characters, "
            f"protocol {protocol.name} needs {_MIN_WINDOWS} to give an error bar",
            "pass several files with --text, or choose --protocol stdlib, which cuts windows out of one text",
        )
    return windows


def _count_within(windows: Sequence[Sequence[int]], max_tokens: int | None) -> int:
    """How many windows of average length fit into `max_tokens`."""
    total = sum(len(window) for window in windows)
    if max_tokens is None or max_tokens >= total:
        return len(windows)
    count = max_tokens * len(windows) // total
    if count < _MIN_WINDOWS:
        needed = -(-_MIN_WINDOWS * total // len(windows))
        raise UsageError(f"max_tokens is {max_tokens}, less than {_MIN_WINDOWS} windows ({needed} tokens)", "an error bar needs more text")
    return count


def _text_bytes(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> int:
    """UTF-8 bytes that the tokens stand for; a character cut in two at a window's edge is off by a byte or two."""
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())
