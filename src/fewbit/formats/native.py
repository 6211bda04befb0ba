"""The native extension, where it is there: an install without a compiler has none, and torch does the same work more slowly."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

__all__ = ["native_extension"]


@cache
def native_extension() -> Any:
    """`fewbit._native`, None when the package was installed without a compiler."""
    try:
        return import_module("fewbit._native")
    except ImportError:
        return None
