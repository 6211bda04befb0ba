"""Text to token ids in the way that evaluation and calibration share.

Some models (Gemma, Llama) are trained with a beginning-of-sequence token at position 0 and predict nothing sensible without it; others
(Qwen) have none. Who knows is the tokenizer: what it puts before an empty text by itself belongs before every window.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

__all__ = ["encode", "own_bos"]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text of any length."""
    # verbose=False: a whole corpus is longer than the model's maximum on purpose, no warning is due
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def own_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token when the tokenizer puts one before text by itself, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in encode(tokenizer, "") else []
