"""Make the second benchmark model: the reference model cut down, turned into a Qwen2, and trained until its weights are its own.

Benchmarks of quantization methods must not be tuned to one model. A second one of another family and shape, really trained, is cheap when
it starts from the first:

1. structured pruning: of all pairs of layers the one goes without which the loss on training text is lowest; of each feed-forward block
   the channels stay that contribute most, mean |activation| x norm of the channel's column in `down_proj` (768 -> 512)
2. the Llama becomes a Qwen2: the same equations with biases on q, k and v, which start at zero
3. recovery: next-token prediction and distillation from the reference model at the same time,

       loss = (1 - a) CE(student, text) + a KL(teacher || student),      a = 0.5

   with Muon (Jordan et al. 2024) for matrices and AdamW for embedding, norms and biases. Biases learn ten times faster than the norms, so
   that they reach a size at which a method that forgets them fails.

About 25 minutes of one CPU core, in FP32; rounded to BF16 once, at the end. Every figure in the card is measured on the rounded weights:

    python scripts/make_second_model.py --out benchmarks/models/stdlib-qwen2

The run writes its state every 25 steps and continues from it when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax
from train_reference_model import LENGTH, sample, windows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fewbit.corpora.stdlib import stdlib_documents
from fewbit.models.reference import reference_model_dir

LAYERS = 4
INTERMEDIATE = 512
TOKENS_PER_STEP = 4096
TEACHER_SHARE = 0.5
MATRIX_RATE, VECTOR_RATE, BIAS_RATE = 0.01, 1e-3, 1e-2


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by five Newton-Schulz steps, in FP32: torch's own works in BF16, which old CPUs do not multiply."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(average, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of the singular value decomposition U S V^T (the quintic iteration of Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """tokens int64 [batch, length + 1] -> logits [batch * length, vocabulary] for all but the last token."""
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    return linear(hidden, model.lm_head.weight).flatten(0, 1)


@torch.no_grad()
def loss_over(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Mean nats per token; batch int64 [windows, length + 1]."""
    losses = [cross_entropy(logits_of(model, part).float(), part[:, 1:].flatten()) for part in batch.split(4)]
    return float(torch.stack(losses).mean())


# ---------------------------------------------------------------------------------------------------------------- the cut


def layers_to_keep(teacher: LlamaForCausalLM, batch: torch.Tensor) -> list[int]:
    """The LAYERS layers whose model, the others left out, has the lowest loss on the batch."""
    layers = teacher.model.layers
    best = (math.inf, list(range(LAYERS)))
    for kept in itertools.combinations(range(len(layers)), LAYERS):
        teacher.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
        best = min(best, (loss_over(teacher, batch), list(kept)))
    teacher.model.layers = layers
    print(f"layers {best[1]} stay: {best[0]:.3f} nats per token before recovery", flush=True)
    return best[1]


@torch.no_grad()
def channels_to_keep(teacher: LlamaForCausalLM, batch: torch.Tensor) -> list[torch.Tensor]:
    """Per layer, the sorted indices of the INTERMEDIATE feed-forward channels with the largest mean |activation| x column norm."""
    sums = [torch.zeros(teacher.config.intermediate_size) for _ in teacher.model.layers]
    hooks = []
    for total, layer in zip(sums, teacher.model.layers, strict=True):
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, total=total: total.add_(args[0].abs().sum((0, 1)))))
    loss_over(teacher, batch)
    for hook in hooks:
        hook.remove()
    scores = [total * layer.mlp.down_proj.weight.norm(dim=0) for total, layer in zip(sums, teacher.model.layers, strict=True)]
    return [score.topk(INTERMEDIATE).indices.sort().values for score in scores]


def student_config(teacher: LlamaForCausalLM) -> Qwen2Config:
    c = teacher.config
    return Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters=dict(c.rope_parameters),
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )


@torch.no_grad()
def cut(teacher: LlamaForCausalLM, batch: torch.Tensor) -> tuple[Qwen2ForCausalLM, list[int]]:
    """The student before training, and the numbers of the teacher's layers that it has."""
    kept, channels = layers_to_keep(teacher, batch), channels_to_keep(teacher, batch)
    student = Qwen2ForCausalLM(student_config(teacher)).float()
    source = teacher.state_dict()
    weights = {name: source[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for new, old in enumerate(kept):
        for name, tensor in teacher.model.layers[old].state_dict().items():
            if name.startswith(("mlp.gate_proj", "mlp.up_proj")):
                tensor = tensor[channels[old]]
            elif name.startswith("mlp.down_proj"):
                tensor = tensor[:, channels[old]]
            weights[f"model.layers.{new}.{name}"] = tensor
        attention = student.model.layers[new].self_attn
        for projection in ("q_proj", "k_proj", "v_proj"):
            weights[f"model.layers.{new}.self_attn.{projection}.bias"] = torch.zeros_like(getattr(attention, projection).bias)
    student.load_state_dict(weights)
    return student, kept


# ------------------------------------------------------------------------------------------------------------ the recovery


def optimizers_of(student: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    named = list(student.named_parameters())
    biases = [p for n, p in named if n.endswith(".bias")]
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in named if not n.endswith(".bias") and not any(p is m for m in matrices)]
    groups = [{"params": others, "lr": VECTOR_RATE}, {"params": biases, "lr": BIAS_RATE}]
    return [Muon(matrices, lr=MATRIX_RATE), torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(student: Qwen2ForCausalLM, teacher: LlamaForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The training loss and, for the record, its cross-entropy part alone, in nats per token."""
    with torch.no_grad():
        target = log_softmax(logits_of(teacher, batch), -1)
    logits = log_softmax(logits_of(student, batch), -1)
    text = torch.nn.functional.nll_loss(logits, batch[:, 1:].flatten())
    distance = kl_div(logits, target, reduction="batchmean", log_target=True)
    return (1 - TEACHER_SHARE) * text + TEACHER_SHARE * distance, float(text.detach())


def recover(
    args: argparse.Namespace, student: Qwen2ForCausalLM, teacher: LlamaForCausalLM, ids: list[list[int]], held_out: torch.Tensor
) -> list[dict[str, float]]:
    """Train in place; returns the log. The last quarter of the steps sees windows of twice the length, as the reference model did."""
    optimizers, log, first = optimizers_of(student), [], 0
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    state_file = args.state
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        student.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log = state["step"], state["log"]
    long_from = int(0.75 * args.steps)
    short = windows(ids, LENGTH, args.seed, min(first, long_from) * TOKENS_PER_STEP)
    long = windows(ids, 2 * LENGTH, args.seed + 1, max(0, first - long_from) * TOKENS_PER_STEP)
    started = time.time()
    for step in range(first, args.steps):
        source, length = (short, LENGTH) if step < long_from else (long, 2 * LENGTH)
        loss, text = loss_of(student, teacher, torch.stack([next(source) for _ in range(TOKENS_PER_STEP // length)]))
        loss.backward()  # type: ignore[no-untyped-call]
        factor = min(1.0, (step + 1) / 20, (args.steps - step) / (0.8 * args.steps))
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0 or step + 1 == args.steps or step == 9:
            entry = {
                "step": step + 1,
                "train_nats_per_token": round(text, 4),
                "held_out_nats_per_token": round(loss_over(student, held_out), 4),
            }
            log.append(entry)
            print(entry, f"{time.time() - started:.0f} s", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            temporary = state_file.with_suffix(".partial")
            torch.save({"model": student.state_dict(), "optimizers": states, "step": step + 1, "log": log}, temporary)
            temporary.replace(state_file)
    return log


# -------------------------------------------------------------------------------------------------------------- the result


def cut_windows(stream: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """[<= count, length + 1] windows, spread evenly over the stream and disjoint."""
    count = min(count, (len(stream) - 1) // length)
    stride = (len(stream) - 1) // count
    return torch.stack([stream[i * stride : i * stride + length + 1] for i in range(count)])


def joined(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """int64: all documents, an end-of-text token before each."""
    return torch.tensor([token for encoding in tokenizer.encode_batch(documents) for token in (0, *encoding.ids)])


def write_model(out: Path, student: Qwen2ForCausalLM) -> None:
    weights = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in student.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    student.config.save_pretrained(out)
    student.generation_config.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(reference_model_dir() / name, out / name)


def model_card(report: dict[str, Any], parameters: int) -> str:
    rows = [f"| {e['step']} | {e['train_nats_per_token']:.3f} | {e['held_out_nats_per_token']:.3f} |" for e in report["log"]]
    samples = ["```python\n" + text.rstrip() + "\n```" for text in report["samples"]]
    template = Path(__file__).with_name("second_model_card.md").read_text(encoding="utf-8")
    return template.format(**report, parameters=parameters, log_rows="\n".join(rows), sample_blocks="\n\n".join(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make fewbit's second benchmark model from the reference model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/second_model_state.pt"), help="where the unfinished run is kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for folder in (args.out, args.state.parent):
        folder.mkdir(parents=True, exist_ok=True)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference_model_dir()).backend_tokenizer
    train_text, held_out_text = ([text for _, text in stdlib_documents(split)] for split in ("train", "held-out"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(train_text)]
    held_out = joined(tokenizer, held_out_text)

    teacher = LlamaForCausalLM.from_pretrained(reference_model_dir(), dtype=torch.float32).eval().requires_grad_(False)
    probe = cut_windows(torch.tensor([t for document in ids for t in (0, *document)]), LENGTH, 16)
    student, kept = cut(teacher, probe)
    log = recover(args, student, teacher, ids, cut_windows(held_out, LENGTH, 32))
    write_model(args.out, student)

    rounded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    # transformers reads the tokenizer of every Qwen2 with Qwen2's split, digits one by one: what users get is what is measured.
    tokenizer = AutoTokenizer.from_pretrained(args.out).backend_tokenizer
    held_out = joined(tokenizer, held_out_text)
    text_bytes = sum(len(text.encode()) for text in held_out_text)
    nats = loss_over(rounded, cut_windows(held_out, 2 * LENGTH, 10_000))
    prompts = ["def read_config(path):\n    ", "class Stack:\n    def __init__(self"]
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steps": args.steps,
        "seed": args.seed,
        "layers_kept": kept,
        "teacher_share": TEACHER_SHARE,
        "tokens_seen": args.steps * TOKENS_PER_STEP,
        "held_out_tokens": len(held_out),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_perplexity": round(math.exp(nats), 3),
        "held_out_bits_per_byte": round(nats / math.log(2) * len(held_out) / text_bytes, 4),
        "bias_rms": {
            name: round(
                float(torch.cat([getattr(layer.self_attn, name).bias for layer in rounded.model.layers]).detach().square().mean().sqrt()), 4
            )
            for name in ("q_proj", "k_proj", "v_proj")
        },
        "log": log,
        "samples": [sample(rounded, tokenizer, prompt, args.seed) for prompt in prompts],
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(report, rounded.num_parameters()), encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()
