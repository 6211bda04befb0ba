"""Sizes as people write them: `8GiB`, `500MB`, `1073741824`."""

from __future__ import annotations

import re

from fewbit.errors import UsageError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of a size; decimal units are powers of 1000, binary ones of 1024, no unit means bytes.

    Raises:
        UsageError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 0 < float(match.group(1)) < 1e18:
        raise UsageError(f"'{text}' is not a size", "write for example 8GiB or 500MB")
    return int(float(match.group(1)) * unit)
