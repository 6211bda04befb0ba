"""Documents for calibration: the user's files, a data set of the hub, or the training part of the standard library.

A document is plain text or a conversation, a list of messages `{"role": ..., "content": ...}`. Where they come from:

    stdlib          the training part of `corpora.stdlib`; never the held-out part, on which quality is measured
    FILE            UTF-8 text, one document
    FILE.jsonl      one JSON object per line: `messages` (or `conversations`) makes a conversation, `text` a plain document
    NAME[:CONFIG][:SPLIT]   a data set of the Hugging Face hub through the package `datasets`; columns as in JSONL. The split is `train`
                            when none is given; with one suffix, names that begin like a split (`train`, `test`, `validation`) are one

A data set may be a thousand times larger than calibration needs. So only runs of neighbouring rows are read, at places drawn evenly over
it, until there is enough text.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewbit.corpora.stdlib import stdlib_documents
from fewbit.corpora.text import read_text
from fewbit.errors import CorpusError, UsageError

__all__ = ["Conversation", "Document", "Documents", "draw_evenly", "load_documents"]

_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev")
_RUNS = 256  # places in a data set that rows are read from
_COLUMNS = ("messages", "conversations", "text", "content")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages in the order they were said: (role, content) pairs, roles as chat templates name them."""

    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """What was said, without the roles."""
        return "\n\n".join(content for _, content in self.messages)


Document = str | Conversation


@dataclass(frozen=True)
class Documents:
    """Text to calibrate on.

    Attributes:
        name: `stdlib`, the file's name, or the data set's id.
        items: in a fixed order; none is empty.
        sha256: over all of them, hexadecimal.
        note: what a reader of the recipe should know; empty when nothing.
    """

    name: str
    items: tuple[Document, ...]
    sha256: str
    note: str = ""


def draw_evenly(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` indices, ascending: one at random from each of `count` equal stretches, so that the whole is covered.

    `random.Random.random` gives the same numbers for a seed on every machine and Python version.
    """
    generator = random.Random(seed)
    edges = [total * i // count for i in range(count + 1)]
    return [low + int(generator.random() * (high - low)) for low, high in pairwise(edges)]


def load_documents(files: Sequence[Path] = (), dataset: str | None = None, *, enough_characters: int = 1 << 26, seed: int = 0) -> Documents:
    """Read text to calibrate on.

    Args:
        files: the user's own files.
        dataset: `NAME[:CONFIG][:SPLIT]` on the hub. Neither files nor a data set: the standard library.
        enough_characters: a data set is read up to about so many characters.
        seed: of the places in a data set that are read.

    Raises:
        UsageError: files and a data set at once, or an id that has no such form.
        CorpusError: text that is missing, empty, unreadable or not UTF-8; JSONL without text in it; a data set that cannot be read.
    """
    if files and dataset is not None:
        raise UsageError(f"both the data set '{dataset}' and {len(files)} text file(s) were given", "calibrate on one of them")
    if dataset is not None:
        return _dataset(dataset, enough_characters, seed)
    if files:
        paths = [Path(file) for file in files]
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
        return _documents(name, [document for path in paths for document in _of_file(path)])
    return _documents("stdlib", [text for _, text in stdlib_documents("train")])


def _documents(name: str, items: Sequence[Document], note: str = "") -> Documents:
    kept = tuple(item for item in items if (item if isinstance(item, str) else item.text).strip())
    if not kept:
        raise CorpusError(f"there is no text in '{name}'", "name a file or a data set with text")
    digest = hashlib.sha256()
    for item in kept:
        encoded = (item if isinstance(item, str) else json.dumps(item.messages)).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return Documents(name, kept, digest.hexdigest(), note)


def _of_file(path: Path) -> list[Document]:
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    found: list[Document] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"line {number} of {path} is no JSON: {error}", "JSONL has one JSON object per line") from None
        found.append(_of_row(row if isinstance(row, dict) else {}, f"line {number} of {path}"))
    return found


def _of_row(row: Mapping[str, Any], where: str) -> Document:
    """The document in one JSON object or one row of a data set."""
    column = next((name for name in _COLUMNS if name in row), None)
    value = None if column is None else row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        messages = [_message(message) for message in value]
        if messages and None not in messages:
            return Conversation(tuple(message for message in messages if message is not None))
    raise CorpusError(
        f"{where} holds no text: it has {', '.join(map(str, row)) or 'no fields'}",
        "calibration reads 'messages' (a list of role and content) or 'text'",
    )


def _message(message: object) -> tuple[str, str] | None:
    """(role, content) of one message in either of the two common spellings; None when it is none."""
    if not isinstance(message, Mapping):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    return (_ROLES.get(role, role), content) if isinstance(role, str) and isinstance(content, str) else None


def _parsed(spec: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of `NAME[:CONFIG][:SPLIT]`; colons in brackets belong to the split (`train[:1%]`)."""
    name, *rest = re.split(r":(?![^\[]*\])", spec)
    if not name or len(rest) > 2:
        raise UsageError(f"'{spec}' names no data set", "write NAME, NAME:CONFIG, NAME:SPLIT or NAME:CONFIG:SPLIT")
    if len(rest) == 1 and rest[0].startswith(_SPLIT_NAMES):
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def _dataset(spec: str, enough_characters: int, seed: int) -> Documents:
    name, config, split = _parsed(spec)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise CorpusError(
            f"the data set '{spec}' needs the package 'datasets', which is not installed",
            "pip install 'fewbit[datasets]', or name text files",
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
        total = len(rows)
        items = _runs_of_rows(rows, total, enough_characters, seed, spec)
    except CorpusError:
        raise
    except Exception as error:  # the library and its HTTP clients raise a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"the data set '{spec}' cannot be read: {reason}", "check its name, or name text files") from error
    note = f"{len(items)} of {total} rows, drawn evenly" if len(items) < total else ""
    return _documents(spec, items, note)


def _runs_of_rows(rows: Any, total: int, enough_characters: int, seed: int, spec: str) -> list[Document]:
    """Documents of runs of neighbouring rows, each run up to its share of the characters; no row twice."""
    runs = min(_RUNS, total)
    starts = draw_evenly(total, runs, seed) if runs else []
    items: list[Document] = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        share = 0
        for index in range(start, end):
            item = _of_row(rows[index], f"row {index} of '{spec}'")
            items.append(item)
            share += len(item if isinstance(item, str) else item.text)
            if share * runs >= enough_characters:
                break
    return items
