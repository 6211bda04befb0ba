"""Putting a checkpoint together from tensors that come one at a time: the writer's side of `quantize --format` and of `convert`.

    feed      what is to be written: tensor after tensor under the names of the high-precision model, quantized linears as QuantizedTensor
    layout    turns one linear into its tensors
    spool     files of at most 256 MB beside the output, in which finished tensors wait until all are there

Then `shards.copy_into_shards` plans the shards by the headers and copies bytes; tensors that stay as they are never go through memory at
all. So the peak is one linear in two forms, however large the model, and for a moment the disk holds the quantized part twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit.checkpoints.layout import Layout
from fewbit.checkpoints.safetensors_files import SafetensorsFiles, TensorEntry
from fewbit.checkpoints.shards import MAX_SHARD_BYTES, copy_into_shards, write_tensors
from fewbit.errors import OutputError
from fewbit.formats.spec import Scheme
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["Feed", "Spool", "write_shards"]

_SPOOL_BYTES = 256 << 20


@dataclass(frozen=True)
class Feed:
    """What is to be written.

    Attributes:
        names: every tensor by its high-precision name, in the order to write them; a quantized linear appears as its `weight`.
        quantized: dotted names of the quantized linears.
        shape: of a tensor, by name.
        dense: one tensor that is not quantized, in its stored dtype.
        entry: where such a tensor lies in a safetensors file, when it can be copied as it is; None when it must go through `dense`.
        linear: the weight of a quantized linear.
    """

    names: Sequence[str]
    quantized: frozenset[str]
    shape: Callable[[str], tuple[int, ...]]
    dense: Callable[[str], torch.Tensor]
    entry: Callable[[str], TensorEntry | None]
    linear: Callable[[str], QuantizedTensor]


class Spool:
    """Finished tensors that wait on the disk.

    Args:
        directory: made when the first tensor comes; `clear` removes it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._entries: dict[str, TensorEntry] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors; they are written when enough have come together.

        Raises:
            OutputError: a name for the second time.
            OSError: the system refuses a write.
        """
        twice = next((name for name in tensors if name in self._entries or name in self._held), None)
        if twice is not None:
            raise OutputError(f"tensor '{twice}' is written twice", "this is a bug in fewbit: please report it")
        self._held |= tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= _SPOOL_BYTES:
            self._flush()

    def entries(self) -> dict[str, TensorEntry]:
        """Where each tensor lies, in the order in which they came."""
        self._flush()
        return self._entries

    def clear(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _flush(self) -> None:
        if not self._held:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{len(self._entries):08d}.safetensors"
        write_tensors(path, self._held)
        files = SafetensorsFiles(path)
        self._entries |= {name: files.entry(name) for name in self._held}
        self._held, self._bytes = {}, 0


def write_shards(
    feed: Feed,
    layout: Layout,
    scheme: Scheme,
    directory: Path,
    spool: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tell: Callable[[int, int], None] | None = None,
) -> int:
    """Write the weights of a Hugging Face directory.

    Args:
        scheme: as `layout.stored` gives it; every linear of the feed is in its weight format.
        directory: exists.
        spool: a directory for what waits; removed at the end.
        tell: called with (tensors done, tensors).

    Returns:
        Bytes of all tensors.

    Raises:
        FormatError: a linear that the layout cannot store.
        OutputError: a tensor is missing in what was written.
        OSError: the system refuses a write.
    """
    waiting = Spool(spool)
    order: list[tuple[str, TensorEntry | None]] = []
    shapes: dict[str, tuple[int, int]] = {}
    try:
        for done, name in enumerate(feed.names):
            if tell is not None:
                tell(done, len(feed.names))
            prefix = name.removesuffix(".weight")
            if name.endswith(".weight") and prefix in feed.quantized:
                q = feed.linear(prefix)
                shapes[prefix] = q.shape
                tensors = layout.write_linear(prefix, q, scheme)
            elif (entry := feed.entry(name)) is not None:
                order.append((name, entry))
                continue
            else:
                tensors = {name: feed.dense(name)}
            waiting.add(tensors)
            order += [(part, None) for part in tensors]
        entries = waiting.entries()
        pieces = [(name, entries[name] if entry is None else entry) for name, entry in order]
        total = copy_into_shards(directory, pieces, max_shard_bytes, layout.metadata(scheme, shapes, feed.names))
    finally:
        waiting.clear()
    written = SafetensorsFiles(directory)
    lost = next((name for name, _ in pieces if name not in written), None)
    if lost is not None:
        raise OutputError(f"tensor '{lost}' is missing in what was written", "this is a bug in fewbit: please report it")
    return total
