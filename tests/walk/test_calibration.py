"""Calibration data: even, reproducible, from any text, no more tokenized than needed, and refused when there is too little."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from fewbit.corpora.documents import Conversation, load_documents
from fewbit.corpora.stdlib import stdlib_documents
from fewbit.errors import CorpusError, FewbitError, ModelError, UsageError
from fewbit.walk import calibration
from fewbit.walk.calibration import held_back_windows, load_calibration

CONFIG = LlamaConfig(max_position_embeddings=4096, vocab_size=512)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<end>"
)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return loaded


@pytest.fixture
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def lines(count: int, words: str = "value") -> str:
    return "".join(f"{words}_{i} = {i}\n" for i in range(count))


def file_of(tmp_path: Path, text: str, name: str = "text.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def numbers_of(text: str) -> list[int]:
    return [int(line.rpartition("= ")[2]) for line in text.splitlines()[1:-1]]


def test_windows_are_drawn_evenly_from_the_text_without_tokenizing_it_all(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = lines(20_000)
    tokenized: list[int] = []
    encode = calibration.encode
    monkeypatch.setattr(calibration, "encode", lambda t, s, **kw: tokenized.append(len(s)) or encode(t, s, **kw))
    data = load_calibration(tokenizer, CONFIG, files=[file_of(tmp_path, text)], samples=14, sequence_length=64, seed=1)
    assert data.ids.shape == (14, 64) and data.held_back.shape == (2, 64) and data.ids.dtype == torch.int64
    assert sum(tokenized) < len(text) / 5
    windows = [tokenizer.decode(row) for row in torch.cat([data.ids, data.held_back])]
    assert all(window in text and text[text.index(window) - 1] == "\n" for window in windows)
    places = sorted(text.index(window) for window in windows)
    assert [place * 16 // len(text) for place in places] == list(range(16)), "one window in each sixteenth of the text"
    held = sorted(numbers_of(tokenizer.decode(row))[0] for row in data.held_back)
    assert held[0] < 10_000 < held[1]


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = file_of(tmp_path, lines(5_000))
    one, same, other = (load_calibration(tokenizer, CONFIG, files=[file], samples=8, sequence_length=32, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.ids, same.ids) and one.info == same.info
    assert one.info.ids_sha256 != other.info.ids_sha256 and one.info.text_sha256 == other.info.text_sha256
    assert one.info.source == "text.txt" and one.info.chat_template_sha256 is None


def test_short_text_is_used_without_gaps_and_overlaps(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = lines(300)
    stream = tokenizer(text).input_ids
    available = len(stream) // 32
    data = load_calibration(tokenizer, CONFIG, files=[file_of(tmp_path, text)], samples=available - 8, sequence_length=32)
    held = held_back_windows(available - 8)
    starts = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
    drawn = [tuple(row.tolist()) for row in torch.cat([data.ids, data.held_back])]
    assert len(set(drawn)) == len(drawn) == available - 8 + held and set(drawn) <= set(starts)


def test_too_little_text_says_how_much_there_is_and_is_needed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = file_of(tmp_path, lines(100))
    available = len(tokenizer(lines(100)).input_ids) // 64
    with pytest.raises(CorpusError, match=rf"text\.txt' is too short: it fills {available} windows of 64 tokens, 136 are needed"):
        load_calibration(tokenizer, CONFIG, files=[file], samples=128, sequence_length=64)


@pytest.mark.parametrize("count", [200, 20_000])
def test_each_window_begins_with_the_tokenizers_own_bos(bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, count: int) -> None:
    data = load_calibration(bos_tokenizer, CONFIG, files=[file_of(tmp_path, lines(count))], samples=6, sequence_length=48)
    assert data.ids.shape == (6, 48) and bool((data.ids[:, 0] == 0).all()) and not bool((data.ids[:, 1:] == 0).any())


def test_windows_no_longer_than_the_model_and_the_note_says_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = LlamaConfig(max_position_embeddings=40, vocab_size=512)
    data = load_calibration(tokenizer, config, files=[file_of(tmp_path, lines(3000))], samples=2, sequence_length=512)
    assert data.ids.shape[1] == data.info.sequence_length == 40 and "not 512" in data.info.note


def test_the_default_is_the_training_part_of_the_standard_library(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [document for document in stdlib_documents("held-out")][:40]
    asked: list[str] = []
    monkeypatch.setattr("fewbit.corpora.documents.stdlib_documents", lambda split: asked.append(split) or some)
    data = load_calibration(tokenizer, CONFIG, samples=4, sequence_length=32)
    assert asked == ["train"] and data.info.source == "stdlib"


def test_text_becomes_conversations_with_the_templates_marks(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    data = load_calibration(tokenizer, CONFIG, files=[file_of(tmp_path, lines(20_000))], samples=8, sequence_length=128, chat_template=True)
    windows = [tokenizer.decode(row) for row in data.ids]
    assert all(window.startswith("<user>value_") and "<assistant>value_" in window for window in windows)
    assert data.info.chat_template_sha256 is not None
    tokenizer.chat_template = TEMPLATE + " "
    again = load_calibration(tokenizer, CONFIG, files=[file_of(tmp_path, lines(20_000))], samples=8, sequence_length=64, chat_template=True)
    assert again.info.chat_template_sha256 != data.info.chat_template_sha256


@pytest.mark.parametrize("count", [60, 3000])
def test_jsonl_conversations_fill_windows_one_after_the_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, count: int) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i}"}]} for i in range(count)]
    file = file_of(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "chat.jsonl")
    data = load_calibration(tokenizer, CONFIG, files=[file], samples=4, sequence_length=64, chat_template=True)
    stream = "".join(f"<user>ask {i}<assistant>answer {i}<end>" for i in range(count))
    windows = [tokenizer.decode(row) for row in torch.cat([data.ids, data.held_back])]
    assert len(set(windows)) == 6 and all(window in stream for window in windows)
    if count == 3000:
        assert all(window.startswith("<user>ask ") for window in windows)
    plain = load_calibration(tokenizer, CONFIG, files=[file], samples=2, sequence_length=32)
    assert "<user>" not in tokenizer.decode(plain.ids[0]) and "answer" in tokenizer.decode(plain.ids[0])


def test_a_template_that_adds_the_bos_itself_has_it_once(bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bos_tokenizer.chat_template = "<|endoftext|>" + TEMPLATE
    file = file_of(tmp_path, lines(20_000))
    data = load_calibration(bos_tokenizer, CONFIG, files=[file], samples=4, sequence_length=64, chat_template=True)
    assert bool((data.ids[:, 0] == 0).all()) and not bool((data.ids[:, 1] == 0).any())


def test_a_data_set_is_read_at_places_all_over_it(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        read: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, str]:
            self.read.append(index)
            return {"text": f"row {index}: " + lines(20), "extra": "no"}

    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load_calibration(tokenizer, CONFIG, dataset="org/name", samples=8, sequence_length=64)
    assert data.ids.shape == (8, 64) and data.info.source == "org/name" and "of 1000000 rows" in data.info.note
    assert len(Rows.read) < 3000 and min(Rows.read) < 10_000 and max(Rows.read) > 990_000
    for spec in ("org/name:train_sft", "org/name:en", "org/name:en:test", "org/name:train[:1%]", "org/name:en:train[:1%]"):
        load_documents(dataset=spec, enough_characters=100)
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", None, "train_sft"),
        ("org/name", "en", "train"),
        ("org/name", "en", "test"),
        ("org/name", None, "train[:1%]"),
        ("org/name", "en", "train[:1%]"),
    ]


def test_conversations_of_a_data_set_in_either_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: rows))
    assert load_documents(dataset="x/y").items == (Conversation((("user", "a"), ("assistant", "b"))),)


def test_without_the_package_or_the_network_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"fewbit\[datasets\]"):
        load_documents(dataset="x/y")

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\ntrace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CorpusError, match="'x/y' cannot be read: no route to the hub;"):
        load_documents(dataset="x/y")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"samples": 0}, UsageError, "0 samples"),
        ({"sequence_length": 1}, UsageError, "two tokens"),
        ({"chat_template": True}, UsageError, "no chat template"),
        ({"dataset": "a:b:c:d"}, UsageError, "a:b:c:d"),
        ({"dataset": "a", "files": [Path("x")]}, UsageError, "both"),
        ({"files": [Path("nowhere.txt")]}, CorpusError, "nowhere.txt"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: dict[str, object], error: type[FewbitError], says: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(error, match=says):
        load_calibration(tokenizer, CONFIG, **arguments)  # type: ignore[arg-type]


def test_damaged_jsonl_and_refused_conversations_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 2 of .*no JSON"):
        load_documents([file_of(tmp_path, '{"text": "a"}\n{"text": \n', "a.jsonl")])
    with pytest.raises(CorpusError, match=r"line 1 of .*b\.jsonl holds no text: it has id, body"):
        load_documents([file_of(tmp_path, '{"id": 1, "body": "a"}\n', "b.jsonl")])
    tokenizer.chat_template = TEMPLATE
    rows = json.dumps({"messages": [{"role": "tool", "content": "called"}]}) + "\n"
    with pytest.raises(CorpusError, match="begins 'called': no tools"):
        load_calibration(tokenizer, CONFIG, files=[file_of(tmp_path, rows * 50, "c.jsonl")], chat_template=True)


def test_tokens_that_the_model_lacks_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary has 100"):
        load_calibration(tokenizer, LlamaConfig(vocab_size=100), files=[file_of(tmp_path, lines(3000))], samples=2, sequence_length=32)
