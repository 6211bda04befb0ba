"""A factor of the inputs' second moments: what stands for H = mean_t x_t x_t^T where [K, K] would cost too much.

With F F^T = H the squared output error of a row with weight error d is d H d^T = ||d F||^2. A Gaussian sketch F = R G, with H = R R^T and
G [K, n] of independent normal numbers with variance 1/n, keeps that without bias at a cost of n instead of K per weight; so does a sample
of tokens, F = X^T / sqrt(n), with more variance where a few tokens are much larger than others.
"""

from __future__ import annotations

import math

import torch

from fewbit.errors import FormatError
from fewbit.methods.statistics import InputStatistics

__all__ = ["moments_factor"]


def moments_factor(statistics: InputStatistics, *, vectors: int, seed: int = 0) -> torch.Tensor:
    """F [K, n], float32, with F F^T = H, or as an unbiased estimate when K > `vectors`.

    Args:
        statistics: with second moments or a sample; second moments are preferred up to a width of `vectors`, a sample of at least as many
            tokens beyond.
        vectors: n of the sketch.
        seed: of the sketch.

    Raises:
        FormatError: statistics with neither.
    """
    sample = statistics.sample
    hessian = None if statistics.columns > vectors and sample.shape[0] >= vectors else statistics.hessian
    if hessian is None:
        if sample.shape[0] == 0:
            raise FormatError("no second moments and no sample of the inputs are known", "gather statistics with hessian=True")
        return (sample / math.sqrt(sample.shape[0])).T.contiguous()
    root = _root(hessian)
    if statistics.columns <= vectors:
        return root
    gaussian = torch.randn(statistics.columns, vectors, generator=torch.Generator().manual_seed(seed)).to(root.device)
    return torch.matmul(root, gaussian.div_(math.sqrt(vectors)))


def _root(hessian: torch.Tensor) -> torch.Tensor:
    """R with R R^T = H, H positive semidefinite up to rounding; H is overwritten."""
    hessian.diagonal().add_(1e-6 * float(hessian.diagonal().mean()) + 1e-30)
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not int(failed):
        return lower
    values, vectors = torch.linalg.eigh(hessian)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
    return root
