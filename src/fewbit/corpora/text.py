"""The text that quality is measured on: the standard library, WikiText-2, or the user's own files.

A corpus is a tuple of texts in a fixed order and the SHA-256 of what they say. Protocols (`evaluate.protocols`) cut windows out of it;
nothing here knows a tokenizer. Joined, the texts are separated by one blank line (`"\\n\\n"`), the convention of the GPTQ paper's
evaluation code that later papers kept.

WikiText-2 exists in three spellings, which give different perplexities:

- the *rows* of the hub's data set: one per line of the original file with its line end, blank lines as empty rows; papers join the
  4,358 rows of the test split with blank lines, so a paragraph break becomes several line ends;
- the *raw file* `wiki.test.raw`, which those rows were read from. It is turned back into the same rows here, so that `wikitext2` and
  `wikitext2:FILE` have equal text and equal hashes;
- the *word-level file* `wiki.test.tokens`, where rare words are `<unk>`. It is read the same way, but its perplexities stand beside no
  paper's: the corpus's `note` says so.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewbit.corpora.stdlib import stdlib_documents
from fewbit.errors import CorpusError, UsageError

__all__ = ["SEPARATOR", "Corpus", "load_corpus", "read_text"]

SEPARATOR = "\n\n"
_WIKITEXT2 = "wikitext2"
_OWN_FILE = f"pass a local copy of wiki.test.raw with --corpus {_WIKITEXT2}:FILE"


@dataclass(frozen=True)
class Corpus:
    """Text to measure quality on.

    Attributes:
        name: `stdlib`, `wikitext2`, or the name of the user's file.
        texts: documents (standard library, files) or rows (WikiText-2), in a fixed order.
        sha256: over `joined` in UTF-8, hexadecimal; results with different hashes are never compared.
        note: what a reader of the result should know about the text; empty when nothing.
    """

    name: str
    texts: tuple[str, ...]
    sha256: str
    note: str = ""

    @property
    def joined(self) -> str:
        """All texts as one, separated by blank lines."""
        return SEPARATOR.join(self.texts)


def load_corpus(spec: str | None = None, files: Sequence[Path] = ()) -> Corpus:
    """Read the text that quality is measured on.

    Args:
        spec: `stdlib` (also None), `wikitext2` (from the hub, needs the `datasets` package) or `wikitext2:FILE`.
        files: the user's own UTF-8 text files, one document each, in place of a named corpus.

    Raises:
        UsageError: an unknown name, or a name and files at once.
        CorpusError: text that is missing, empty, unreadable or not UTF-8.
    """
    if files:
        if spec is not None:
            raise UsageError(f"both the corpus '{spec}' and {len(files)} text file(s) were given", "pass either --corpus or --text")
        paths = [Path(file) for file in files]
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
        return _corpus(name, [read_text(path) for path in paths])
    kind, _, file = (spec or "stdlib").partition(":")
    if kind == "stdlib" and not file:
        return _corpus("stdlib", [text for _, text in stdlib_documents("held-out")])
    if kind == _WIKITEXT2:
        return _wikitext2(_rows_of_raw_file(read_text(Path(file))) if file else _rows_of_hub())
    raise UsageError(
        f"unknown corpus '{spec}'", f"choose stdlib, {_WIKITEXT2} or {_WIKITEXT2}:FILE, or pass your own text with --text FILE"
    )


def _corpus(name: str, texts: Sequence[str], note: str = "") -> Corpus:
    return Corpus(name, tuple(texts), hashlib.sha256(SEPARATOR.join(texts).encode()).hexdigest(), note)


def read_text(path: Path) -> str:
    """The file's text, byte for byte: line ends are not translated.

    Raises:
        CorpusError: the file is missing, unreadable, not UTF-8 or empty.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"the text file {path} does not exist", "check the path") from None
    except OSError as error:
        raise CorpusError(f"the text file {path} cannot be read: {error.strerror}", "pass a readable text file") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"the text file {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}", "convert it to UTF-8"
        ) from None
    if not text.strip():
        raise CorpusError(f"the text file {path} is empty", "pass a file with text")
    return text


def _wikitext2(rows: Sequence[str]) -> Corpus:
    word_level = any("<unk>" in row for row in rows)
    note = "word-level WikiText-2 with <unk> marks; papers measure on the raw version, whose perplexities differ" if word_level else ""
    return _corpus(_WIKITEXT2, rows, note)


def _rows_of_raw_file(text: str) -> list[str]:
    """The hub data set's rows: each line with its line end, blank lines (a space and a line end in the file) as empty rows."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _rows_of_hub() -> list[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise CorpusError(
            f"the corpus '{_WIKITEXT2}' comes from the Hugging Face hub through the package 'datasets', which is not installed",
            f"pip install datasets, or {_OWN_FILE}",
        ) from None
    try:
        return [str(row) for row in datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]]
    except Exception as error:  # the library and its HTTP clients raise a dozen unrelated types when the hub cannot be reached
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"the corpus '{_WIKITEXT2}' could not be fetched from the hub: {reason}", _OWN_FILE) from error
