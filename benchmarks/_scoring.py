"""One evaluator for every quantization of a model, whoever made it.

The model runs in float32 with the quantized tensors put in its place, and its answers on held-out text are compared with those of the
same model in high precision (float32 as well), token by token: KL divergence, perplexity, flipped predictions, per window. float32 on
both sides keeps kernels, BF16 rounding and runtime formats out of a comparison that is about the choice of the numbers alone.

Two quantizations are compared by the ratio of their mean KL divergences. Windows are the independent units, and both sides see the same
ones, so the interval is that of a ratio of paired means (the delta method, in the logarithm): with a_w and b_w the KL of window w, each
the mean over the calibration seeds,

    r = mean(a) / mean(b)        d_w = a_w / mean(a) - b_w / mean(b)        se(log r) = sd(d) / sqrt(W)

and the 95 % interval is r exp(-+ t(0.975, W - 1) se). Seeds enter through the mean: three are too few for a spread of their own, and
each seed is printed beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit.corpora.text import load_corpus
from fewbit.evaluate.protocols import make_windows
from fewbit.evaluate.statistics import t_quantile

__all__ = ["Evaluator", "Score", "ratio_of_means"]

_BATCH_WINDOWS = 4


@dataclass(frozen=True)
class Score:
    """What one quantization costs, per window of held-out text.

    Attributes:
        kl: mean KL divergence per scored token of each window, nats.
        loss: mean negative log-likelihood per scored token of each window, nats.
        flips: share of scored tokens of each window with another most likely token.
    """

    kl: tuple[float, ...]
    loss: tuple[float, ...]
    flips: tuple[float, ...]

    @property
    def mean_kl(self) -> float:
        return math.fsum(self.kl) / len(self.kl)

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self.loss) / len(self.loss))

    @classmethod
    def read(cls, path: Path) -> Score:
        return cls(**{name: tuple(values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class Evaluator:
    """A model in high precision and the windows it is scored on.

    Args:
        model: a Hugging Face directory.
        max_tokens: of held-out text, drawn evenly over the corpus by the `stdlib` protocol.

    Attributes:
        model_key: hash of the model's files.
        key: hash of the model's files and of the windows; scores under different keys are never compared.
        perplexity: of the model in high precision.
    """

    def __init__(self, model: Path, *, max_tokens: int = 32_768) -> None:
        self.directory = model
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._source = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        windows = make_windows("stdlib", load_corpus(), AutoTokenizer.from_pretrained(model), self.model.config, max_tokens=max_tokens)
        self.ids = torch.stack(windows.ids)
        digest = hashlib.sha256()
        for file in sorted(model.glob("*.safetensors")):
            digest.update(file.read_bytes())
        self.model_key = digest.hexdigest()[:16]
        digest.update(self.ids.numpy().tobytes())
        self.key = digest.hexdigest()[:16]
        self._batches: list[torch.Tensor] = list(torch.split(self.ids, _BATCH_WINDOWS))
        self._expected = [self._log_probabilities(batch) for batch in self._batches]
        losses = [_losses(batch, log_p) for batch, log_p in zip(self._batches, self._expected, strict=True)]
        self.perplexity = math.exp(float(torch.cat(losses).double().mean()))

    @torch.inference_mode()
    def _log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [windows, tokens - 1, vocabulary] of ids [windows, tokens]."""
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(dim=-1)

    @torch.inference_mode()
    def score(self, tensors: Mapping[str, torch.Tensor] | Path) -> Score:
        """Put the tensors in, read the windows, and put the source's tensors back.

        Args:
            tensors: in any float dtype under the model's names, or a safetensors file of them; all others stay as they are.

        Raises:
            ValueError: a name that the model lacks, another shape, or values that are not finite.
        """
        if isinstance(tensors, Path):
            tensors = load_file(tensors)
        linears = {f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head.weight"}
        missing = linears - set(tensors)
        if missing:
            raise ValueError(f"{len(missing)} linears are not in the export, {sorted(missing)[0]} among them")
        for name, tensor in tensors.items():
            if name not in self._source or self._source[name].shape != tensor.shape:
                raise ValueError(f"tensor {name} {list(tensor.shape)} does not fit the model")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"tensor {name} has values that are not finite")
        try:
            self.model.load_state_dict(dict(tensors), strict=False)
            return self._compare()
        finally:
            self.model.load_state_dict(self._source)

    def _compare(self) -> Score:
        kl, loss, flips = [], [], []
        for ids, log_p in zip(self._batches, self._expected, strict=True):
            log_q = self._log_probabilities(ids)
            kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().mean(dim=1))
            loss.append(_losses(ids, log_q).double().mean(dim=1))
            flips.append((log_p.argmax(dim=-1) != log_q.argmax(dim=-1)).double().mean(dim=1))
        return Score(*(tuple(torch.cat(parts).tolist()) for parts in (kl, loss, flips)))


def _losses(ids: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """-log q(token) of each scored token, [windows, tokens - 1]."""
    return -log_q.gather(-1, ids[:, 1:, None])[..., 0]


def ratio_of_means(ours: Sequence[Score], theirs: Sequence[Score]) -> tuple[float, float, float]:
    """Mean KL of `ours` over mean KL of `theirs` with its 95 % interval over windows.

    Args:
        ours, theirs: one score per calibration seed, over the same windows.

    Returns:
        the ratio, and the lower and the upper end of its interval.
    """
    a, b = (torch.tensor([score.kl for score in side], dtype=torch.float64).mean(dim=0) for side in (ours, theirs))
    ratio = float(a.mean() / b.mean())
    spread = float((a / a.mean() - b / b.mean()).std()) / math.sqrt(len(a))
    factor = math.exp(t_quantile(len(a) - 1) * spread)
    return ratio, ratio / factor, ratio * factor
