"""A model of which at most one block is in memory.

The model is built without weights (`models.structure.build_without_weights`); a block gets its weights from disk when its turn comes and
loses them afterwards. What surrounds the blocks - embeddings, final norm, output head, and whatever else an architecture has there - is
run by the model's own code, never copied here. Two tricks make that possible:

**Stubs.** While the model runs, every block is replaced by a stub that hands its hidden states on unchanged. The first stub sees what the
blocks are given: hidden states and arguments (position embeddings, masks for each kind of attention), which depend on the length of the
window and not on its tokens. They are recorded once for each length. The last stub ends the run, or, when the blocks' result is at hand,
returns it, and the model goes on through its final norm and head: softcaps and projections that nobody listed here are applied.

**Weights just in time.** A module outside of the blocks reads its parameters when it is called, and keeps them until `release`: finding the
hidden states costs the embedding and not the head.

A checkpoint's tensors may have other names than the model's parameters (`models.names`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fewbit.checkpoints.sources import TensorSource
from fewbit.errors import CheckpointError, UnsupportedModelError
from fewbit.models.names import DiskNames, disk_names
from fewbit.models.structure import block_list_name, build_without_weights

__all__ = ["BlockCall", "Skeleton", "check_values"]


class _EndOfRun(Exception):
    """The last stub has been reached and nothing behind it is wanted."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with, besides the hidden states.

    Attributes:
        arguments: positional arguments behind the hidden states.
        keywords: keyword arguments.
        by_keyword: the hidden states' own keyword when they are not the first positional argument.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    by_keyword: str = ""

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states [batch, T, width]; architectures whose blocks return a tuple have it first."""
        if self.by_keyword:
            result = block(*self.arguments, **{**self.keywords, self.by_keyword: hidden})
        else:
            result = block(hidden, *self.arguments, **self.keywords)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output


@dataclass
class _Recording:
    """What happens during one run over the stubs."""

    calls: dict[int, BlockCall] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    result: torch.Tensor | None = None


class _Stub(nn.Module):
    """Stands in a block's place. Attributes that it lacks are the block's (models ask blocks for the kind of their attention)."""

    def __init__(self, block: nn.Module, index: int, last: bool, as_tuple: bool, recording: _Recording) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not registered as a module
        self._index, self._last, self._as_tuple, self._recording = index, last, as_tuple, recording

    def __getattr__(self, name: str) -> Any:
        if name == "_block":
            raise AttributeError(name)
        return getattr(self._block[0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        recording = self._recording
        by_keyword = "" if arguments else _hidden_keyword(keywords)
        hidden: torch.Tensor = arguments[0] if arguments else keywords.pop(by_keyword)
        if self._index == 0:
            recording.hidden = hidden
        recording.calls[self._index] = BlockCall(tuple(arguments[1:]), keywords, by_keyword)
        if self._last:
            if recording.result is None:
                raise _EndOfRun
            hidden = recording.result
        return (hidden,) if self._as_tuple else hidden


def _hidden_keyword(keywords: Mapping[str, Any]) -> str:
    for name, value in keywords.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3:
            return name
    raise UnsupportedModelError("a block is called without hidden states", "this architecture cannot be walked through")


class Skeleton:
    """A model whose blocks are loaded one by one.

    Args:
        source: a checkpoint in high precision.
        dtype: the working precision.

    Attributes:
        model: transformers' model; blocks that are not loaded are on the `meta` device.
        names: how parameters are found on disk.
        blocks_name: dotted name of the list of blocks.
        overrides: parameters outside of the blocks that are not what the disk says (quantized ones); used while `use_overrides` is True.

    Raises:
        UnsupportedModelError: an architecture that transformers does not know, or without a list of blocks.
    """

    def __init__(self, source: TensorSource, *, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.dtype = source, dtype
        self.model: PreTrainedModel = build_without_weights(source.config, dtype=dtype)
        self.names: DiskNames = disk_names(self.model, source.names())
        self.blocks_name = block_list_name(self.model, source.config.model_type)
        self.overrides: dict[str, torch.Tensor] = {}
        self.use_overrides = False
        self._tied = dict(self.model.all_tied_weights_keys)
        self._resident: set[str] = set()
        self._stored_dtypes: dict[str, torch.dtype] = {}
        self._calls: dict[int, dict[int, BlockCall]] = {}
        self._as_tuple: bool | None = None

    # ------------------------------------------------------------------------------------------------------------ the blocks

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks."""
        found = self.model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def num_blocks(self) -> int:
        """Blocks that the model runs."""
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        """The dotted name of a block."""
        return f"{self.blocks_name}.{index}"

    def load_block(self, index: int) -> nn.Module:
        """One block with its weights from disk, in the working precision.

        Raises:
            CheckpointError: a tensor is missing, damaged, of another shape, or has NaN or infinite values.
        """
        block = self.blocks[index]
        prefix = self.block_name(index)
        for name, parameter in list(block.named_parameters()):
            _put(block, name, self.read(f"{prefix}.{name}", parameter.shape))
        for name, _ in block.named_buffers():
            if f"{prefix}.{name}" in self.names.single:
                block.get_buffer(name).copy_(self.source.get(self.names.single[f"{prefix}.{name}"]))
        return block

    def stored_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """The dtypes of a block's parameters when they were last read, as the disk has them, by dotted name in the block."""
        prefix = f"{self.block_name(index)}."
        return {name.removeprefix(prefix): dtype for name, dtype in self._stored_dtypes.items() if name.startswith(prefix)}

    def unload_block(self, index: int) -> None:
        """Let a block's weights go."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            _put(block, name, torch.empty(parameter.shape, dtype=self.dtype, device="meta"))

    def read(self, name: str, shape: torch.Size | None = None) -> torch.Tensor:
        """One parameter in the working precision, from disk, or from `overrides` where they are used.

        Args:
            name: dotted, from the model's root.
            shape: what it must have; None for no check.

        Raises:
            CheckpointError: as `load_block`.
        """
        if self.use_overrides and name in self.overrides:
            return self.overrides[name].to(self.dtype)
        tensor = self.stored(name)
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"tensor '{name}' is {list(tensor.shape)}, config.json says {list(shape)}", "they belong to different models"
            )
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def stored(self, name: str) -> torch.Tensor:
        """One parameter as the disk has it, in its stored dtype.

        Raises:
            CheckpointError: it is missing, damaged, or has NaN or infinite values.
        """
        disk = self.names.single.get(name) or self.names.single.get(self._tied.get(name, ""))
        if disk is None:
            back = next((target for target, origin in self._tied.items() if origin == name and target in self.names.single), None)
            disk = self.names.single.get(back or "")
        if disk is None:
            raise CheckpointError(
                f"'{self.source.describe()}' has no tensor '{name}'", "the weights belong to another configuration, or a shard is missing"
            )
        tensor = self.source.get(disk)
        check_values(disk, tensor)
        self._stored_dtypes[name] = tensor.dtype
        return tensor

    # ------------------------------------------------------------------------------------------------ what surrounds the blocks

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block is given for a window of token ids [1, T]: [1, T, width] in the working precision."""
        recording = _Recording()
        self._run(recording, ids)
        assert recording.hidden is not None
        self._calls.setdefault(ids.shape[1], recording.calls)
        return recording.hidden.to(self.dtype)

    def call(self, index: int, length: int) -> BlockCall:
        """What block `index` is called with for windows of `length` tokens, known once such a window was embedded."""
        return self._calls[length][index]

    def check_calls(self, ids: torch.Tensor) -> None:
        """Make sure that the blocks' arguments do not depend on the tokens.

        Args:
            ids: [1, T], another window of a length that was embedded before.

        Raises:
            UnsupportedModelError: they do.
        """
        recording = _Recording()
        self._run(recording, ids)
        for index, call in self._calls[ids.shape[1]].items():
            if not _same((call.arguments, dict(call.keywords)), (recording.calls[index].arguments, dict(recording.calls[index].keywords))):
                raise UnsupportedModelError(
                    f"the blocks of '{self.source.config.model_type}' are given arguments that depend on the text",
                    "use a method that needs no calibration, and no gate",
                )

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the model predicts when its blocks end with `hidden`: [1, T, vocabulary] in the working precision."""
        recording = _Recording(result=hidden)
        output: torch.Tensor = self._run(recording, ids, hidden).logits
        return output

    def release(self) -> None:
        """Let the weights outside of the blocks go."""
        for name in self._resident:
            _put(self.model, name, torch.empty(self.model.get_parameter(name).shape, dtype=self.dtype, device="meta"))
        self._resident.clear()

    def _run(self, recording: _Recording, ids: torch.Tensor, hidden: torch.Tensor | None = None) -> Any:
        """The model over stubs; None when the last stub ended the run."""
        if self._as_tuple is None:
            self._as_tuple = self._blocks_return_tuples(ids)
        real = list(self.blocks)
        embedding = self.model.get_input_embeddings()
        # The embedding need not be read again when the model takes what comes behind it.
        short_cut = hidden is not None and getattr(embedding, "embedding_dim", 0) == hidden.shape[-1]
        tokens = {"inputs_embeds": hidden} if short_cut else {"input_ids": ids}
        with torch.no_grad(), self._just_in_time(), contextlib.suppress(_EndOfRun):
            try:
                for index, block in enumerate(real):
                    self.blocks[index] = _Stub(block, index, index == len(real) - 1, bool(self._as_tuple), recording)
                return self.model(**tokens, use_cache=False)
            finally:
                for index, block in enumerate(real):
                    self.blocks[index] = block
        return None

    def _blocks_return_tuples(self, ids: torch.Tensor) -> bool:
        """Ask a block on the meta device, which takes no weights; one that cannot run there is taken to return a tensor."""
        self._as_tuple = False
        recording = _Recording()
        real, block = list(self.blocks), self.blocks[0]
        try:
            self.blocks[0] = _Stub(block, 0, True, False, recording)
            with torch.no_grad(), self._just_in_time(), contextlib.suppress(_EndOfRun):
                self.model(input_ids=ids, use_cache=False)
        finally:
            self.blocks[0] = real[0]
        call, hidden = recording.calls[0], recording.hidden
        assert hidden is not None
        to_meta = _on_meta((call.arguments, dict(call.keywords)))
        try:
            with torch.no_grad(), _buffers_kept(block):
                keywords = {**to_meta[1], **({call.by_keyword: hidden.to("meta")} if call.by_keyword else {})}
                positional = to_meta[0] if call.by_keyword else (hidden.to("meta"), *to_meta[0])
                return isinstance(block(*positional, **keywords), tuple)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            annotation = inspect.signature(block.forward).return_annotation
            return "tuple" in str(annotation).lower()

    @contextmanager
    def _just_in_time(self) -> Iterator[None]:
        """Modules outside of the blocks read their parameters when they are called."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        handles = []
        for name, module in self.model.named_modules():
            if id(module) in inside or isinstance(module, _Stub) or not list(module.parameters(recurse=False)):
                continue
            handles.append(module.register_forward_pre_hook(self._reader(name, module), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, name: str, module: nn.Module) -> Any:
        def read(*_: Any) -> None:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{leaf}" if name else leaf
                if parameter.device.type == "meta":
                    _put(self.model, full, self.read(full, parameter.shape))
                    self._resident.add(full)

        return read


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        CheckpointError: with the number of them.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~tensor.float().isfinite()).sum())
        raise CheckpointError(f"tensor '{name}' has {bad} NaN or infinite values", "the checkpoint is damaged: download or train it again")


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put all buffers back on leaving: GPT-J's attention moves its table of positions to wherever its inputs are."""
    kept = [(owner, name, buffer) for owner in module.modules() for name, buffer in owner._buffers.items()]
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            owner._buffers[name] = buffer


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter, dotted name from `module`."""
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Sequence) and not isinstance(one, str):
        return isinstance(other, Sequence) and len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)
