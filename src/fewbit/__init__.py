"""fewbit: which quantization to deploy, decided by memory, latency and quality measured together."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
