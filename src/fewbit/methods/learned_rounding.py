"""Learned rounding: codes and scales of a whole block, trained until its output comes close to the original's.

A linear's own error (GPTQ's objective) counts each output alike. What matters is what the block makes of it: attention and the gate weigh
outputs, and one linear can undo another's error. Block reconstruction (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516) minimizes

    mean over tokens of |block(x; W_hat) - block_original(x')|^2,     W_hat = scale * round(u)

over latent weights u (in units of the grid) and scales. x are the inputs on the quantized path, x' those of the original, so that a block
also makes up for the blocks before it. Gradients pass the rounding as if it were not there (straight-through), and are zero where a code
is clipped.

AutoRound takes 200 steps along the sign of the gradient, every weight by the same amount. Here Adam does, which moves those weights most
whose gradient is large and steady (docs/log.md has the comparison). The latent starts at the given codes, at most `_SPAN` off towards the
real weight: codes that GPTQ chose against their nearest neighbour stay chosen until the gradient says otherwise.

The loss over all windows is taken before, on the way and at the end, and the best state is kept: training never makes a block worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fewbit.errors import FormatError
from fewbit.formats.grids import decode_values, encode_values, round_to_grid
from fewbit.formats.grouping import from_groups, to_groups
from fewbit.formats.scales import SMALLEST_SCALE, scale_as_float
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["LearnedRounding", "LearnedRoundingSettings", "learn_rounding"]

_SPAN = 0.45  # of a step: further off, the first noise would flip the code
_CHECKS = 4  # how often the loss over all windows is taken on the way


@dataclass(frozen=True)
class LearnedRoundingSettings:
    """How a block is trained.

    Attributes:
        steps: of the optimizer.
        batch: windows of each step.
        code_rate: first learning rate of the latent weights, in steps of the grid; falls to zero linearly.
        scale_rate: that of the scales, relative to their size. Scales that are stored in a byte (E4M3, E8M0) are not trained.
        seed: of the order of windows.
    """

    steps: int = 200
    batch: int = 8
    code_rate: float = 1e-2
    scale_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.code_rate < 0 or self.scale_rate < 0:
            raise FormatError(f"{self} cannot be meant", "steps and batch are at least 1, rates are not negative")


@dataclass(frozen=True)
class LearnedRounding:
    """What training came to.

    Attributes:
        quantized: each linear's weight.
        loss_before, loss_after: mean squared error of the block's output over all windows.
        changed: share of codes that differ from those that were given.
    """

    quantized: dict[str, QuantizedTensor]
    loss_before: float
    loss_after: float
    changed: float


def learn_rounding(
    forward: Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    quantized: Mapping[str, QuantizedTensor],
    windows: int,
    pair: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    settings: LearnedRoundingSettings | None = None,
) -> LearnedRounding:
    """Train the codes and scales of the linears of one block.

    Args:
        forward: (name to weight [out, in], inputs [1, T, width]) -> outputs [1, T, width]; differentiable in the weights.
        weights: the original weight of each linear; not changed.
        quantized: where training starts, for the same names.
        windows: how many there are.
        pair: window number -> (inputs on the quantized path, wanted outputs), each [1, T, width].
        settings: see there.

    Raises:
        FormatError: a format without a grid of its own to train on (codebooks), names that do not match, or no window.
    """
    settings = settings or LearnedRoundingSettings()
    if set(weights) != set(quantized) or not weights or windows < 1:
        raise FormatError("learned rounding needs the same linears with weights and codes, and at least one window")
    latents = {name: _Latent(weights[name], q) for name, q in quantized.items()}

    def loss_of(window: int) -> torch.Tensor:
        inputs, wanted = pair(window)
        return (forward({name: latent.weight() for name, latent in latents.items()}, inputs) - wanted).square().mean()

    def total() -> float:
        with torch.no_grad():
            return sum(float(loss_of(window)) for window in range(windows)) / windows

    before = best = total()
    best_state = {name: latent.state() for name, latent in latents.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [latent.codes for latent in latents.values()], "lr": settings.code_rate},
            {"params": [latent.stretch for latent in latents.values() if latent.trains_scale], "lr": settings.scale_rate},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / settings.steps)
    order = _Order(windows, settings.seed)
    for step in range(1, settings.steps + 1):
        optimizer.zero_grad()
        with torch.enable_grad():
            for window in order.take(min(settings.batch, windows)):
                (loss_of(window) / min(settings.batch, windows)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step == settings.steps or step % max(settings.steps // _CHECKS, 1) == 0:
            now = total()
            if now < best:
                best, best_state = now, {name: latent.state() for name, latent in latents.items()}
    result = {name: latent.quantized(*best_state[name]) for name, latent in latents.items()}
    different = sum(int(torch.ne(_bytes(result[name]), _bytes(quantized[name])).sum()) for name in result)
    return LearnedRounding(result, before, best, different / sum(q.values.numel() for q in result.values()))


def _bytes(q: QuantizedTensor) -> torch.Tensor:
    return q.values.view(torch.uint8)


class _Order:
    """Windows in random order, each once before any comes again."""

    def __init__(self, windows: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._windows = windows
        self._left: list[int] = []

    def take(self, count: int) -> Sequence[int]:
        taken: list[int] = []
        while len(taken) < count:
            if not self._left:
                self._left = torch.randperm(self._windows, generator=self._generator).tolist()
            taken.append(self._left.pop())
        return taken


class _RoundThrough(torch.autograd.Function):
    """Round to the grid; the gradient passes where the value lies within the grid."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, u: torch.Tensor, spec: QuantSpec, low: float, high: float) -> torch.Tensor:
        context.save_for_backward((u >= low) & (u <= high))
        return round_to_grid(u.clone(), spec)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inside,) = context.saved_tensors  # type: ignore[attr-defined]
        return gradient * inside, None, None, None


class _Latent:
    """One linear in training: latent codes [out, in] in units of the grid (zero points included) and a stretch per scale."""

    def __init__(self, weight: torch.Tensor, q: QuantizedTensor) -> None:
        spec = q.spec
        if spec.type == "codebook":
            raise FormatError(f"{spec} cannot be trained: its codes have no order", "use another method for codebooks")
        self._q, self._spec = q, spec
        self._rows, self._columns = q.shape
        self.trains_scale = spec.scale_dtype in ("float32", "bfloat16", "float16")
        self._start = scale_as_float(q.scale, spec, q.global_scale)
        self._zero = None if q.zero_point is None else self._spread(q.zero_point.float())
        points = decode_values(q.values, spec)
        wanted = weight.float() / self._spread(self._start)
        if self._zero is not None:
            wanted += self._zero
        self._low, self._high = float(points.new_tensor(_ends(spec)[0])), float(points.new_tensor(_ends(spec)[1]))
        self.codes = torch.nn.Parameter(points + (wanted - points).clamp_(-_SPAN, _SPAN))
        self.stretch = torch.nn.Parameter(torch.zeros_like(self._start), requires_grad=self.trains_scale)

    def _spread(self, scale: torch.Tensor) -> torch.Tensor:
        """One scale per weight, [out, in]; differentiable."""
        if self._q.g_idx is not None:
            return scale[:, self._q.g_idx.long()]
        groups = to_groups(torch.empty(self._rows, self._columns, device="meta"), self._spec)
        return from_groups(scale.unsqueeze(-1).expand(groups.shape), self._spec, self._rows, self._columns)

    def _scale(self) -> torch.Tensor:
        """As it will be stored, float32; the gradient passes the rounding of the scale, too."""
        if not self.trains_scale:
            return self._start
        exact = self._start * (1.0 + self.stretch)
        return exact + (self._stored(exact.detach()).float() - exact).detach()

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        smallest = SMALLEST_SCALE[self._spec.scale_dtype]
        magnitude = scale.abs().clamp(smallest, torch.finfo(self._q.scale.dtype).max)
        return torch.where(scale < 0, -magnitude, magnitude).to(self._q.scale.dtype)

    def weight(self) -> torch.Tensor:
        """What the linear multiplies with, float32 [out, in]."""
        rounded: torch.Tensor = _RoundThrough.apply(self.codes, self._spec, self._low, self._high)  # type: ignore[no-untyped-call]
        if self._zero is not None:
            rounded = rounded - self._zero
        return rounded * self._spread(self._scale())

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and stored scales as they are now."""
        with torch.no_grad():
            values = encode_values(self.codes.detach().clone(), self._spec)
            return values, self._stored(self._scale()) if self.trains_scale else self._q.scale

    def quantized(self, values: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
        """The weight of a state."""
        return replace(self._q, values=values, scale=scale)


def _ends(spec: QuantSpec) -> tuple[float, float]:
    """The range within which rounding errs by half a step at most."""
    if spec.type == "int":
        return -(2.0 ** (spec.num_bits - 1)) - 0.5, 2.0 ** (spec.num_bits - 1) - 0.5
    extreme = decode_values(encode_values(torch.tensor([-1e30, 1e30]), spec), spec)
    return float(extreme[0]), float(extreme[1])
