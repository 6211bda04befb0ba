"""Reading text: the same text from each source has the same hash; text that cannot be used is named."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewbit.corpora.stdlib import stdlib_documents
from fewbit.corpora.text import load_corpus
from fewbit.errors import CorpusError, UsageError

# As in wiki.test.raw: blank lines hold one space, paragraphs are one line.
RAW = " \n = Title = \n \n First paragraph . \n Second paragraph . \n \n = = Section = = \n \n Third . \n \n"
ROWS = ["", " = Title = \n", "", " First paragraph . \n", " Second paragraph . \n", "", " = = Section = = \n", "", " Third . \n", ""]


def test_stdlib_is_the_default_and_holds_the_held_out_documents() -> None:
    corpus = load_corpus()
    assert corpus.name == "stdlib"
    assert list(corpus.texts) == [text for _, text in stdlib_documents("held-out")]
    assert corpus.sha256 == hashlib.sha256(corpus.joined.encode()).hexdigest()
    assert corpus.note == ""


def test_own_files_are_one_document_each_and_keep_their_line_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"one\r\ntwo\n")
    second.write_bytes("Žluťoučký kůň".encode())
    corpus = load_corpus(files=[first, second])
    assert corpus.texts == ("one\r\ntwo\n", "Žluťoučký kůň")
    assert corpus.joined == "one\r\ntwo\n\n\nŽluťoučký kůň"
    assert corpus.name == "a.txt and 1 more"
    assert load_corpus(files=[first]).name == "a.txt"


def test_raw_wikitext_file_gives_the_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(RAW, encoding="utf-8")
    from_file = load_corpus(f"wikitext2:{file}")
    assert list(from_file.texts) == ROWS
    assert (from_file.name, from_file.note) == ("wikitext2", "")

    def load_dataset(path: str, name: str, split: str) -> dict[str, list[str]]:
        assert (path, name, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return {"text": ROWS}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_corpus("wikitext2") == from_file


def test_word_level_wikitext_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.tokens"
    file.write_text(" \n = Robert <unk> = \n", encoding="utf-8")
    assert "<unk>" in load_corpus(f"wikitext2:{file}").note


def test_wikitext_without_the_package_names_it_and_the_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="'datasets', which is not installed") as caught:
        load_corpus("wikitext2")
    assert "--corpus wikitext2:FILE" in caught.value.remedy


def test_wikitext_without_a_network_names_the_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong explanation")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CorpusError, match="Couldn't reach the hub;") as caught:
        load_corpus("wikitext2")
    assert "--corpus wikitext2:FILE" in caught.value.remedy


@pytest.mark.parametrize("spec", ["wikitext", "stdlib:x", "penn", "wikitext-2:x"])
def test_unknown_names_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=f"unknown corpus '{spec}'"):
        load_corpus(spec)


def test_a_name_and_files_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both the corpus"):
        load_corpus("stdlib", [tmp_path / "a.txt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n\t\n", "is empty"), (b"abc\xff", "not UTF-8: byte 0xff at offset 3")],
)
@pytest.mark.parametrize("as_wikitext", [False, True])
def test_unusable_files_are_named(tmp_path: Path, content: bytes | None, message: str, as_wikitext: bool) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(f"wikitext2:{file}") if as_wikitext else load_corpus(files=[file])
    assert str(file) in caught.value.problem
    assert caught.value.remedy


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        load_corpus(files=[tmp_path])
