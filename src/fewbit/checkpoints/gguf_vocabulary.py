"""The tokenizer in a GGUF file, there and back.

llama.cpp has tokenizers of its own, which read tokens, their kinds and merges from the metadata:

    tokenizer.ggml.model    `gpt2` (byte-level BPE) or `llama` (SentencePiece-like, with byte tokens)
    tokenizer.ggml.tokens, token_type, merges (gpt2) or scores (llama)
    tokenizer.ggml.pre      which rule cuts a text into words before the merges: a name, and llama.cpp has the rule in its source
    tokenizer.huggingface.json      tokenizer.json as it is, for those that read it

The rule is where tokenizers differ in what cannot be seen: `_RULES` has the regular expressions of published models whose name in llama.cpp
is known. A tokenizer with another rule gets the nearest name and a note: ids are what they are, but llama.cpp may cut some text otherwise.

fewbit reads tokenizer.huggingface.json back where it is, so that nothing is lost between its own files; of others transformers makes the
tokenizer from the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, LlamaHfVocab, SpecialVocab, TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fewbit.checkpoints.gguf_header import GgufFile
from fewbit.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

__all__ = ["GENERATION_KEY", "read_tokenizer", "write_tokenizer"]

GENERATION_KEY = "fewbit.generation_config"
_JSON_KEY = "tokenizer.huggingface.json"
_CONFIG_KEY = "fewbit.tokenizer_config"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (regular expressions that split in front of the byte level, whether the byte level splits by GPT-2's) -> llama.cpp's name
_RULES: dict[tuple[tuple[str, ...], bool], str] = {
    ((), True): "gpt-2",
    (("digits",), True): "smollm",
    ((_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,), False): "qwen2",
    ((_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,), False): "llama-bpe",
}


def write_tokenizer(writer: GGUFWriter, directory: Path, vocabulary: int) -> list[str]:
    """Add a tokenizer to a file that is being written.

    Args:
        directory: with tokenizer.json and tokenizer_config.json.
        vocabulary: rows of the embedding; the tokens are filled up to it.

    Returns:
        What llama.cpp may do otherwise, one line each.

    Raises:
        ModelNotFoundError: no tokenizer.json.
        UnsupportedModelError: neither byte-level BPE nor BPE with byte tokens.
        CheckpointError: tokens beyond the vocabulary.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"no tokenizer.json in '{directory}'", "save the tokenizer in its fast form: save_pretrained()")
    text = path.read_text(encoding="utf-8")
    fields = json.loads(text)
    byte_tokens = bool(fields["model"].get("byte_fallback"))
    if fields["model"].get("type") != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer of '{directory}' is {fields['model'].get('type')}, not BPE", "use llama.cpp's converter"
        )
    notes = _write_byte_tokens(writer, directory, vocabulary) if byte_tokens else _write_byte_level(writer, fields, vocabulary)
    SpecialVocab(directory, load_merges=not byte_tokens, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
    writer.add_string(_JSON_KEY, text)
    if (directory / "tokenizer_config.json").is_file():
        writer.add_string(_CONFIG_KEY, (directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if (directory / "generation_config.json").is_file():
        writer.add_string(GENERATION_KEY, (directory / "generation_config.json").read_text(encoding="utf-8"))
    return notes


def _write_byte_level(writer: GGUFWriter, fields: dict[str, Any], vocabulary: int) -> list[str]:
    tokens: list[str | None] = [None] * vocabulary
    kinds = [TokenType.UNUSED] * vocabulary
    added = {entry["id"]: entry for entry in fields.get("added_tokens", ())}
    for token, index in [*fields["model"]["vocab"].items(), *((entry["content"], index) for index, entry in added.items())]:
        if not 0 <= index < vocabulary:
            raise CheckpointError(f"the tokenizer has the token {token!r} = {index}, and the model {vocabulary} tokens")
        tokens[index] = token
        special = index in added and added[index].get("special")
        kinds[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED if index in added else TokenType.NORMAL
    rule, notes = _rule(fields.get("pre_tokenizer"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)])
    writer.add_token_types(kinds)
    return notes


def _rule(pre: Any) -> tuple[str, list[str]]:
    """llama.cpp's name of the rule that cuts a text into words."""
    parts = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    patterns: list[str] = []
    byte_level = False
    for one in parts:
        if one.get("type") == "Split" and isinstance(one.get("pattern"), dict) and "Regex" in one["pattern"]:
            patterns.append(one["pattern"]["Regex"])
        elif one.get("type") == "Digits" and one.get("individual_digits"):
            patterns.append("digits")
        elif one.get("type") == "ByteLevel":
            byte_level = bool(one.get("use_regex", True))
        else:
            patterns.append(str(one.get("type")))
    known = _RULES.get((tuple(patterns), byte_level))
    if known is not None:
        return known, []
    nearest = "gpt-2" if byte_level else "qwen2"
    return nearest, [
        f"llama.cpp has no rule that cuts text as this tokenizer does; '{nearest}' is written, and some text gets other tokens"
    ]


def _write_byte_tokens(writer: GGUFWriter, directory: Path, vocabulary: int) -> list[str]:
    found = list(LlamaHfVocab(directory).all_tokens())
    if len(found) > vocabulary:
        raise CheckpointError(f"the tokenizer has {len(found)} tokens, and the model {vocabulary}")
    found += [(f"[PAD{i}]".encode(), -10000.0, TokenType.UNUSED) for i in range(len(found), vocabulary)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in found])
    writer.add_token_scores([score for _, score, _ in found])
    writer.add_token_types([kind for _, _, kind in found])
    return []


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer of a file.

    Raises:
        ModelNotFoundError: it has none that transformers can read.
    """
    own = file.text(_JSON_KEY)
    try:
        if own is not None:
            return _own_tokenizer(file, own)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelNotFoundError(f"cannot read the tokenizer in '{file.path}': {reason}", "name the model's directory instead") from error
    return tokenizer


def _own_tokenizer(file: GgufFile, text: str) -> PreTrainedTokenizerBase:
    config = json.loads(file.text(_CONFIG_KEY) or "{}")
    tokens = file.fields.get("tokenizer.ggml.tokens", [])
    named = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            named[f"{ours}_token"] = tokens[index]
    named |= {key: value for key, value in config.items() if key in ("clean_up_tokenization_spaces", "model_max_length")}
    named |= {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(text), **named
    )
    template = file.text("tokenizer.chat_template")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
