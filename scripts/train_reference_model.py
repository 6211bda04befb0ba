"""Train the reference model that ships with fewbit, from the source text of the Python standard library.

A Llama of 5.8 M parameters (6 layers, hidden 256, 4 query and 2 key-value heads of 64, SwiGLU 768, tied embeddings, byte-level BPE with
4,096 tokens) learns Python from the modules that `fewbit.corpora.stdlib` does not hold out. About an hour on two CPU cores with
AVX-512 BF16, minutes on a GPU:

    python scripts/train_reference_model.py --out build/reference

Recipe. Matrices of the blocks are trained with Muon (Jordan et al. 2024, torch.optim.Muon), the embedding and the norms with AdamW. The
learning rate warms up, stays, and falls linearly to zero over the last 600 steps; the last 15 % of the steps see windows of twice the
length, so that the model knows all of its 1,024 positions. Weights are kept in FP32 and rounded to BF16 once, at the end; every figure
in the model card is measured on the rounded weights.

The run writes a checkpoint every 100 steps and continues from it when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbit.corpora.stdlib import stdlib_documents

END_OF_TEXT = "<|endoftext|>"
# GPT-4's split, with numbers in pairs: keeps indentation runs and operators together, which is what Python text is made of.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY = 4096
LENGTH = 512
TOKENS_PER_STEP = 8192


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE with `VOCABULARY` tokens; token 0 is the end-of-text mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * LENGTH,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )


def windows(documents: list[list[int]], length: int, seed: int, skip_tokens: int) -> Iterator[torch.Tensor]:
    """Endless windows of `length + 1` token ids; documents are shuffled anew in each pass and joined by end-of-text."""
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.tensor([token for index in order for token in (0, *documents[index])])
        offset = int(torch.randint(0, length, (1,), generator=generator))
        starts = range(offset, len(stream) - length - 1, length)
        for index in torch.randperm(len(starts), generator=generator).tolist():
            seen += length
            if seen > skip_tokens:
                yield stream[starts[index] : starts[index] + length + 1]


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of tokens[:, 1:] given what stands before; tokens: int64 [batch, length + 1]."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(tokens[:, :-1]).last_hidden_state
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def learning_rate_factor(step: int, steps: int, decay_steps: int) -> float:
    return min(1.0, (step + 1) / 60, (steps - step) / decay_steps)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int, max_windows: int) -> float:
    count = min(max_windows, (len(stream) - 1) // length)
    stride = (len(stream) - 1) // count
    batch = torch.stack([stream[i * stride : i * stride + length + 1] for i in range(count)])
    return float(torch.stack([loss_of(model, part) for part in batch.split(16)]).mean())


def train(args: argparse.Namespace, train_ids: list[list[int]], held_out: torch.Tensor) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(model_config()).to(args.device)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(1 / math.sqrt(2 * model.config.num_hidden_layers))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    log: list[dict[str, float]] = []
    first = 0
    state_file = args.out / "training_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log = state["step"], state["log"]
    long_from = int(0.85 * args.steps)
    short = windows(train_ids, LENGTH, args.seed, min(first, long_from) * TOKENS_PER_STEP)
    long = windows(train_ids, 2 * LENGTH, args.seed + 1, max(0, first - long_from) * TOKENS_PER_STEP)
    started = time.time()
    for step in range(first, args.steps):
        source, length = (short, LENGTH) if step < long_from else (long, 2 * LENGTH)
        batch = torch.stack([next(source) for _ in range(TOKENS_PER_STEP // length)])
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        factor = learning_rate_factor(step, args.steps, args.decay_steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps or step in (9, 29):
            entry = {
                "step": step + 1,
                "train_nats_per_token": round(float(loss.detach()), 4),
                "held_out_nats_per_token": round(held_out_loss(model, held_out, LENGTH, 64), 4),
            }
            log.append(entry)
            print(entry, f"{time.time() - started:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1, "log": log}
            temporary = state_file.with_suffix(".partial")
            torch.save(state, temporary)
            temporary.replace(state_file)
    return model, log


def write_model(args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Round to BF16 and write a Hugging Face directory; the tied head is stored once, as transformers does."""
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    config = model_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(args.out)
    LlamaForCausalLM(config).generation_config.save_pretrained(args.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(args.out)


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    ids = torch.tensor([[0, *tokenizer.encode(prompt).ids]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=True, temperature=0.6, top_p=0.9)
    return str(tokenizer.decode(out[0, 1:].tolist()))


CARD = Path(__file__).with_name("reference_model_card.md")


def model_card(report: dict[str, Any], parameters: int) -> str:
    rows = [f"| {e['step']} | {e['train_nats_per_token']:.3f} | {e['held_out_nats_per_token']:.3f} |" for e in report["log"]]
    samples = ["```python\n" + text.rstrip() + "\n```" for text in report["samples"]]
    return CARD.read_text().format(**report, parameters=parameters, log_rows="\n".join(rows), sample_blocks="\n\n".join(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train fewbit's reference model on the Python standard library.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--decay-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    train_text = [text for _, text in stdlib_documents("train")]
    held_out_text = [text for _, text in stdlib_documents("held-out")]
    tokenizer = train_tokenizer(train_text)
    train_ids = [encoding.ids for encoding in tokenizer.encode_batch(train_text)]
    held_out = torch.tensor([t for encoding in tokenizer.encode_batch(held_out_text) for t in (0, *encoding.ids)])
    print(f"{sum(map(len, train_ids)):,} training tokens, {len(held_out):,} held out", flush=True)

    model, log = train(args, train_ids, held_out)
    write_model(args, model, tokenizer)

    rounded = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    rounded.load_state_dict(load_file(args.out / "model.safetensors"), strict=False)
    tokens_per_byte = len(held_out) / sum(len(text.encode()) for text in held_out_text)
    nats = held_out_loss(rounded, held_out, 2 * LENGTH, 10_000)
    prompts = ["def read_config(path):\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n", "for name in sorted("]
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steps": args.steps,
        "decay_steps": args.decay_steps,
        "seed": args.seed,
        "tokens_seen": args.steps * TOKENS_PER_STEP,
        "train_tokens": sum(map(len, train_ids)),
        "held_out_tokens": len(held_out),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_perplexity": round(math.exp(nats), 3),
        "bytes_per_token": round(1 / tokens_per_byte, 4),
        "held_out_bits_per_byte": round(nats / math.log(2) * tokens_per_byte, 4),
        "log": log,
        "samples": [sample(rounded, tokenizer, prompt, args.seed) for prompt in prompts],
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(report, rounded.num_parameters()))
    print(json.dumps({k: v for k, v in report.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()
