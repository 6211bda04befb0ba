"""Calibration data: the tokens that calibrated methods look at, as windows of equal length.

GPTQ, AWQ and their kin need some 64,000 tokens that resemble what the model will read. They come from documents (`corpora.documents`), are
packed to windows of T tokens without padding, and are drawn evenly over the whole text: the text is cut into as many equal stretches as
windows are needed, and in each one a place is drawn under the seed. Only what is drawn is tokenized, so that 128 windows out of 26 MB
of text take a second and not a minute.

    text            documents joined by blank lines; a window begins at the beginning of a line
    conversations   with the tokenizer's chat template: a window begins with a conversation and is filled up with those that follow.
                    A plain document becomes conversations of about one window each, its first half the user's turn, the second the
                    assistant's, because a calibration set without the template's marks misses the outliers that they cause

A window begins with the beginning-of-sequence token when the tokenizer (or the template) puts one there, as in `evaluate.protocols`.

Besides the `samples` windows that methods see, some more are *held back* (one in sixteen, at least two): a layer's sanity check and a
method's choice between two settings need tokens that the method was not fitted to. Both are hashed, so that a result says what it saw.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fewbit.corpora.documents import Conversation, Documents, draw_evenly, load_documents
from fewbit.corpora.text import SEPARATOR
from fewbit.errors import CorpusError, UsageError
from fewbit.models.accounting import check_token_ids
from fewbit.models.tokens import encode, own_bos
from fewbit.results import CalibrationInfo

__all__ = ["CalibrationData", "held_back_windows", "load_calibration"]

_HELD_BACK_SHARE, _MIN_HELD_BACK = 16, 2
_CHARACTERS_PER_TOKEN = 4  # before anything is known; a data set is read up to several times what this asks for
_ROOM = 2.5  # text this many times as long as needed is drawn from; a shorter one is tokenized as a whole
_PROBES, _PROBE_CHARACTERS = 16, 2048


@dataclass(frozen=True)
class CalibrationData:
    """Windows of token ids.

    Attributes:
        ids: int64 [samples, T]; what methods are fitted to.
        held_back: int64 [at least 2, T]; evenly spread over the same text, for checks.
        info: where they come from, for the checkpoint's recipe.
    """

    ids: torch.Tensor
    held_back: torch.Tensor
    info: CalibrationInfo


def held_back_windows(samples: int) -> int:
    """How many windows are held back beside `samples`: one in sixteen, at least two."""
    return max(_MIN_HELD_BACK, -(-samples // _HELD_BACK_SHARE))


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    files: Sequence[Path] = (),
    dataset: str | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    chat_template: bool = False,
) -> CalibrationData:
    """Read, draw and pack calibration data.

    Args:
        tokenizer, config: the model's; `max_position_embeddings` bounds the windows.
        files, dataset: as in `corpora.documents.load_documents`; the training part of the standard library when neither is given.
        samples: windows that methods are fitted to.
        sequence_length: tokens of a window.
        seed: of the places that are drawn.
        chat_template: wrap the text in the tokenizer's chat template; else conversations are read as plain text.

    Raises:
        UsageError: numbers that cannot be meant, or a chat template that the tokenizer does not have.
        CorpusError: too little text, or text that cannot be read.
        ModelError: the tokenizer gives tokens that the model does not have.
    """
    if samples < 1 or sequence_length < 2:
        raise UsageError(f"{samples} samples of {sequence_length} tokens", "take at least one sample of at least two tokens")
    template = _template(tokenizer) if chat_template else None
    own_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(sequence_length, own_length or sequence_length)
    held = held_back_windows(samples)
    enough = int(8 * _ROOM * _CHARACTERS_PER_TOKEN * length * (samples + held))
    documents = load_documents(files, dataset, enough_characters=enough, seed=seed)
    packer = _Packer(tokenizer, documents.name, length, samples + held, seed)
    windows = packer.text(documents) if template is None else packer.conversations(documents)
    stacked = torch.tensor(windows, dtype=torch.int64)
    check_token_ids(int(stacked.max()), config)
    back = [(2 * i + 1) * len(windows) // (2 * held) for i in range(held)]
    kept = [i for i in range(len(windows)) if i not in set(back)]
    notes = [documents.note] if documents.note else []
    if length < sequence_length:
        notes.append(f"windows of {length} tokens, the model's own length, not {sequence_length}")
    info = CalibrationInfo(
        source=documents.name,
        text_sha256=documents.sha256,
        ids_sha256=_sha256(stacked[kept], stacked[back]),
        samples=samples,
        held_back=held,
        sequence_length=length,
        seed=seed,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        python=platform.python_version(),
        note="; ".join(notes),
    )
    return CalibrationData(stacked[kept], stacked[back], info)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UsageError("the model's tokenizer has no chat template", "calibrate on plain text, without the chat template") from None


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for ids in tensors:
        digest.update(str(list(ids.shape)).encode() + ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class _Packer:
    """Makes `count` windows of `length` tokens out of documents.

    Attributes:
        bos: what each window begins with: the tokenizer's own beginning-of-sequence token, or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, length: int, count: int, seed: int) -> None:
        self._tokenizer, self._name, self._length, self._count, self._seed = tokenizer, name, length, count, seed
        self.bos = own_bos(tokenizer)

    def text(self, documents: Documents) -> list[list[int]]:
        """Windows of the documents as one text; conversations without their roles."""
        text = SEPARATOR.join(item if isinstance(item, str) else item.text for item in documents.items)
        span = self._characters_of_window(text)
        if len(text) < _ROOM * span * self._count:
            return self._cut(self._encode(text))
        windows = []
        generator = random.Random(self._seed)
        for i in range(self._count):
            low, high = len(text) * i // self._count, len(text) * (i + 1) // self._count
            start = low + int(generator.random() * (high - low - span))
            windows.append(self._fill(text, _line_start(text, start, start + span // 4), span))
        return windows

    def conversations(self, documents: Documents) -> list[list[int]]:
        """Windows of the documents in the tokenizer's chat template."""
        texts = [item if isinstance(item, str) else item.text for item in documents.items]
        span = self._characters_of_window(SEPARATOR.join(texts))
        all_of_them = list(chain.from_iterable(_as_conversations(item, span) for item in documents.items))
        if not all_of_them:
            raise CorpusError(f"'{self._name}' has no text that could be a conversation", "calibrate on longer texts, or on plain text")
        sizes = [len(conversation.text) for conversation in all_of_them]
        if len(all_of_them) < self._count or sum(sizes) < _ROOM * span * self._count:
            return self._cut(list(chain.from_iterable(map(self._render, all_of_them))))
        ends = list(accumulate(sizes))
        windows = []
        for first in _indices_at(ends, draw_evenly(ends[-1], self._count, self._seed)):
            following = (all_of_them[(first + i) % len(all_of_them)] for i in range(len(all_of_them)))
            windows.append(self._first_tokens(map(self._render, following)))
        return windows

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, add_special_tokens=False)

    def _characters_of_window(self, text: str) -> int:
        """About how many characters fill a window, from some places in the text, with a tenth on top."""
        starts = draw_evenly(max(len(text) - _PROBE_CHARACTERS, 1), min(_PROBES, max(len(text) - _PROBE_CHARACTERS, 1)), self._seed)
        probes = [text[start : start + _PROBE_CHARACTERS] for start in starts]
        tokens = sum(len(self._encode(probe)) for probe in probes)
        return int(1.1 * self._length * sum(map(len, probes)) / max(tokens, 1)) + 16

    def _fill(self, text: str, start: int, span: int) -> list[int]:
        """A window of the text from `start` on; near the end of the text, the last window that there is."""
        needed = self._length - len(self.bos)
        while True:
            piece = text[start : start + span]
            ids = self._encode(piece)
            if len(ids) > needed:  # one more than needed: the last token may be cut by the piece's end
                return self.bos + ids[:needed]
            if start + span >= len(text):
                start = max(0, start - span)
            span *= 2

    def _first_tokens(self, parts: Iterable[list[int]]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += part
            if len(ids) >= self._length:
                break
        return self._with_bos(ids)[: self._length]

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

    def _render(self, conversation: Conversation) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in conversation.messages]
        try:
            return self._encode(str(self._tokenizer.apply_chat_template(messages, tokenize=False)))
        except TemplateError as error:
            raise CorpusError(
                f"the chat template refuses a conversation of '{self._name}' that begins '{conversation.messages[0][1][:40]}': {error}",
                "repair or leave out such conversations, or calibrate on plain text",
            ) from error

    def _cut(self, stream: list[int]) -> list[list[int]]:
        """Windows drawn from all that a short text gives.

        Raises:
            CorpusError: there are too few.
        """
        needed = self._length - len(self.bos)
        available = len(stream) // needed
        if available < self._count:
            raise CorpusError(
                f"the calibration text '{self._name}' is too short: it fills {available} windows of {self._length} tokens, {self._count} "
                "are needed (those held back for checks included)",
                f"take fewer samples, a shorter sequence length, or about {self._count / max(available, 1):.1f} times the text",
            )
        return [self.bos + stream[i * needed : (i + 1) * needed] for i in draw_evenly(available, self._count, self._seed)]


def _line_start(text: str, start: int, limit: int) -> int:
    """The next beginning of a line, else of a word, at or behind `start` and before `limit`; `start` itself when there is none."""
    if start == 0:
        return 0
    for mark in ("\n", " "):
        found = text.find(mark, start - 1, limit)
        if found >= 0:
            return found + 1 if mark == "\n" else found
    return start


def _indices_at(ends: Sequence[int], positions: Sequence[int]) -> list[int]:
    """For each position (ascending) the index of the item whose characters it falls into; no item twice while others are free."""
    indices: list[int] = []
    index = 0
    for position in positions:
        while ends[index] <= position:
            index += 1
        indices.append(index)
        index = min(index + 1, len(ends) - 1)
    return indices


def _as_conversations(document: str | Conversation, span: int) -> list[Conversation]:
    """A conversation as it is; plain text as conversations of about `span` characters, half the user's and half the assistant's."""
    if isinstance(document, Conversation):
        return [document]
    found = []
    start = 0
    while start < len(document):
        end = min(start + span, len(document))
        if end < len(document):
            end = _line_start(document, end, end + span // 4)
        middle = _line_start(document, (start + end) // 2, end)
        asked, answered = document[start:middle].strip(), document[middle:end].strip()
        if asked and answered:
            found.append(Conversation((("user", asked), ("assistant", answered))))
        start = end
    return found
