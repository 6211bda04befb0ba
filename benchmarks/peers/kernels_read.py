"""Plain reads of memory: the ceiling of every kernel at M = 1. Contenders `read-DISTANCE-STREAMS-huge|small`, of `fewbit._native`."""

from __future__ import annotations

from typing import Any

from _worker import Pass, serve

from fewbit import _native

_buffers: dict[tuple[int, bool], _native.ReadBuffer] = {}


def setup(case: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    _, distance, streams, pages = case["contender"].split("-")
    key = (case["bytes"], pages == "huge")
    if key not in _buffers:
        _buffers[key] = _native.ReadBuffer(case["bytes"], case["threads"], key[1])
    buffer = _buffers[key]
    return lambda: buffer.read(int(distance), int(streams)), {"bytes": buffer.bytes, "calls": 1}


if __name__ == "__main__":
    serve(setup)
