"""Windows: the named protocols cut text the way their papers do, evenly, reproducibly, and say so."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from fewbit.corpora.text import Corpus
from fewbit.errors import CorpusError, UsageError
from fewbit.evaluate.protocols import PROTOCOLS, Protocol, default_protocol, make_windows

CONFIG = LlamaConfig(max_position_embeddings=4096)
SMALL = Protocol("small", 32)


def _corpus(*texts: str, name: str = "text", note: str = "") -> Corpus:
    return Corpus(name, texts, hashlib.sha256("\n\n".join(texts).encode()).hexdigest(), note)


def _words(count: int, start: int = 0) -> str:
    return " ".join(f"word{start + i}" for i in range(count))


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return loaded


@pytest.fixture
def bos_tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    """The same with a beginning-of-sequence token that it adds by itself, as Llama's and Gemma's do."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama_dir)
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    loaded.backend_tokenizer.post_processor = template
    return loaded


def test_standard_2048_is_the_joined_text_cut_without_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = _corpus(*(_words(300, 300 * i) for i in range(6)), name="wikitext2")
    windows = make_windows(None, corpus, tokenizer, CONFIG)
    stream = tokenizer.backend_tokenizer.encode("\n\n".join(corpus.texts)).ids
    assert torch.cat(windows.ids).tolist() == stream[: len(stream) // 2048 * 2048]
    assert {len(window) for window in windows.ids} == {2048}
    info = windows.info
    assert (info.name, info.context_length, info.stride, info.note) == ("standard-2048", 2048, 2048, "")
    assert info.scored_tokens == len(windows.ids) * 2047
    assert info.text_sha256 == corpus.sha256


def test_bos_stands_once_before_the_text_in_the_papers_protocol(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    windows = make_windows("standard-2048", _corpus(_words(2000)), bos_tokenizer, CONFIG)
    assert windows.ids[0][0] == 0
    assert all(0 not in window for window in windows.ids[1:])


def test_bos_stands_before_each_window_of_stdlib_and_no_token_is_lost(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    text = _words(1000)
    windows = make_windows("stdlib", _corpus(text), bos_tokenizer, CONFIG)
    assert all(window[0] == 0 and len(window) == 512 for window in windows.ids)
    joined = torch.cat([window[1:] for window in windows.ids]).tolist()
    assert joined == bos_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids[: len(joined)]
    assert windows.info.stride == 511
    # every byte of the text in the windows is scored, so the bytes are those of the decoded text
    assert windows.scored_bytes == len(bos_tokenizer.decode(joined))


def test_without_bos_the_first_token_of_a_window_counts_neither_as_token_nor_as_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = make_windows(SMALL, _corpus(_words(100)), tokenizer, CONFIG)
    assert windows.info.scored_tokens == sum(len(window) - 1 for window in windows.ids)
    assert windows.scored_bytes == sum(len(tokenizer.decode(window[1:])) for window in windows.ids)


def test_lab_512_takes_the_first_100_long_texts_and_cuts_each(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["x" * 100, *(_words(20 + 5 * (i % 60), i) for i in range(120)), ""]
    windows = make_windows("lab-512", _corpus(*texts), tokenizer, CONFIG)
    wanted = [tokenizer.backend_tokenizer.encode(text).ids[:512] for text in texts if len(text) > 100][:100]
    assert [window.tolist() for window in windows.ids] == wanted
    assert {len(window) for window in windows.ids} != {512}
    assert max(map(len, windows.ids)) == 512


def test_max_tokens_draws_evenly_over_the_whole_corpus_and_deterministically(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = _corpus(_words(3000))
    every = make_windows(SMALL, corpus, tokenizer, CONFIG)
    drawn = make_windows(SMALL, corpus, tokenizer, CONFIG, max_tokens=32 * 8 + 31, seed=1)
    assert len(drawn.ids) == 8
    positions = [next(i for i, window in enumerate(every.ids) if torch.equal(window, one)) for one in drawn.ids]
    assert [position * 8 // len(every.ids) for position in positions] == list(range(8))
    again = make_windows(SMALL, corpus, tokenizer, CONFIG, max_tokens=32 * 8, seed=1)
    assert torch.equal(torch.stack(again.ids), torch.stack(drawn.ids))
    other = make_windows(SMALL, corpus, tokenizer, CONFIG, max_tokens=32 * 8, seed=2)
    assert not torch.equal(torch.stack(other.ids), torch.stack(drawn.ids))
    assert drawn.info.note == f"8 of {len(every.ids)} windows, drawn evenly over the corpus"
    assert drawn.info.seed == 1


def test_a_short_model_shortens_the_windows_and_the_notes_say_so(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = _corpus(_words(2000), note="a note of the corpus")
    windows = make_windows("standard-2048", corpus, tokenizer, LlamaConfig(max_position_embeddings=256))
    assert windows.info.context_length == windows.info.stride == 256
    assert {len(window) for window in windows.ids} == {256}
    assert windows.info.note == "a note of the corpus; windows of 256 tokens, the model's own length, not 2048"


def test_text_of_less_than_two_windows_is_too_short(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match=r"'text' is too short: \d+ tokens, protocol stdlib needs 2 windows of 512"):
        make_windows("stdlib", _corpus(_words(30)), tokenizer, CONFIG)
    with pytest.raises(CorpusError, match=r"1 text\(s\) of more than 100 characters"):
        make_windows("lab-512", _corpus(_words(300)), tokenizer, CONFIG)


def test_a_budget_below_two_windows_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=r"max_tokens is 63, less than 2 windows \(64 tokens\)"):
        make_windows(SMALL, _corpus(_words(300)), tokenizer, CONFIG, max_tokens=63)


def test_unknown_protocols_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="unknown protocol 'nope'"):
        make_windows("nope", _corpus(_words(300)), tokenizer, CONFIG)


def test_each_corpus_has_its_usual_protocol() -> None:
    assert default_protocol(_corpus("", name="wikitext2")) is PROTOCOLS["standard-2048"]
    assert default_protocol(_corpus("", name="stdlib")) is default_protocol(_corpus("", name="notes.txt")) is PROTOCOLS["stdlib"]
