"""A GGUF file as a source of tensors, whoever wrote it.

Names are those of the model in transformers and rows in its order (`checkpoints.gguf_models`). Linears in Q4_0, Q8_0 and MXFP4 come as
quantized weights, bit for bit; all other types are handed out in float32, exactly as they decode, and count as high precision: a file in
Q4_K_M has no scheme of ours, and `notes` says what that means. The file's own scheme is that of most of its quantized weights, single
linears may have another one.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType as Type
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from fewbit.checkpoints.gguf_blocks import DENSE, READ, decode, unpack
from fewbit.checkpoints.gguf_header import GgufFile
from fewbit.checkpoints.gguf_models import ARCHITECTURES, configuration, rows_of_heads, tensor_names
from fewbit.checkpoints.gguf_vocabulary import GENERATION_KEY, read_tokenizer
from fewbit.checkpoints.layout import named
from fewbit.errors import CheckpointError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import QuantSpec, Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.models.structure import build_empty_model

__all__ = ["GgufSource"]

_HEAD = "lm_head.weight"


class GgufSource:
    """One GGUF file.

    Args:
        path: the file.
        name: what a person calls it; the path when empty.

    Attributes:
        file: its header.

    Raises:
        ModelNotFoundError: no such file.
        CheckpointError: it is damaged or contradicts itself.
        UnsupportedModelError: an architecture that fewbit does not read.
    """

    layout = "gguf"
    directory = None

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.file = GgufFile(path)
        self._name = name or str(path)
        self.config: PretrainedConfig = configuration(self.file)
        self._architecture = next(row for row in ARCHITECTURES if row.name == self.file.text("general.architecture"))
        model = build_empty_model(self.config)
        state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        known = tensor_names(self._architecture, list(state), self.config.num_hidden_layers)
        self._disk = {key: disk for key, disk in known.items() if disk in self.file.tensors}
        back = {disk: key for key, disk in self._disk.items()}
        self._names = [back.get(disk, disk) for disk in self.file.tensors if disk != "rope_freqs.weight"]
        for key, disk in self._disk.items():
            found = self.file.tensors[disk].shape
            if found != state[key]:
                raise CheckpointError(
                    f"'{disk}' in '{path}' is {list(found)}, the configuration says {list(state[key])}", "download it again"
                )
        linears = {f"{prefix}.weight" for prefix, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._linears = [key for key in self._disk if key in linears]
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @cached_property
    def types(self) -> Counter[Type]:
        """How many weights of linears are stored in which type."""
        counts: Counter[Type] = Counter()
        for key in self._linears:
            tensor = self.file.tensors[self._disk[key]]
            counts[tensor.type] += tensor.shape[0] * tensor.shape[1]
        return counts

    @cached_property
    def _main(self) -> Type | None:
        """The type of most of the quantized weights; None when that is one which comes decoded, or none is quantized."""
        quantized = Counter({stored: count for stored, count in self.types.items() if stored not in DENSE.values()})
        if not quantized:
            return None
        most = quantized.most_common(1)[0][0]
        return most if most in READ else None

    @cached_property
    def scheme(self) -> Scheme | None:
        """The format of most of the quantized linears; None when they come decoded."""
        return None if self._main is None else named(Scheme("", weights=READ[self._main]))

    @cached_property
    def quantized_linears(self) -> frozenset[str]:
        """Those that come as quantized weights."""
        if self._main is None:
            return frozenset()
        return frozenset(key.removesuffix(".weight") for key in self._linears if self.file.tensors[self._disk[key]].type in READ)

    @cached_property
    def decoded(self) -> frozenset[str]:
        """Names of the tensors in a quantized type that come in float32: those that fewbit has no format for, and embeddings."""
        quantized = {f"{prefix}.weight" for prefix in self.quantized_linears}
        return frozenset(
            name for name in self._names if name not in quantized and self.file.tensors[self.disk_name(name)].type not in DENSE.values()
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Which types are decoded while they are loaded."""
        decoded = sorted({self.file.tensors[self.disk_name(name)].type.name for name in self.decoded})
        return (f"{', '.join(decoded)} are decoded while loading: they take the memory of high precision here",) if decoded else ()

    @property
    def weight_bytes_on_disk(self) -> int | None:
        """Bytes of the file."""
        return self.file.size

    @property
    def linears(self) -> tuple[str, ...]:
        """The dotted names of all linears that the file has."""
        return tuple(key.removesuffix(".weight") for key in self._linears)

    def disk_name(self, name: str) -> str:
        """What the file calls a tensor of the model."""
        return self._disk.get(name, name)

    def names(self) -> list[str]:
        """The model's names in the file's order; a tensor that the model does not know keeps its own."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        tensor = self.file.tensors.get(self._disk.get(name, name))
        if tensor is None:
            raise CheckpointError(f"there is no tensor '{name}' in '{self.file.path}'")
        return tensor.shape

    def get(self, name: str) -> torch.Tensor:
        """One tensor; whatever is quantized in float32."""
        quantized = self.get_quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if quantized is not None:
            return dequantize(quantized)
        disk = self._disk.get(name, name)
        raw = self.file.get(disk)
        value = decode(raw, self.file.tensors[disk], disk)
        order = self.order(name)
        return value if order is None else value[order.argsort()]

    def get_quantized(self, prefix: str) -> QuantizedTensor | None:
        """The stored integers of one linear."""
        if prefix not in self.quantized_linears:
            return None
        disk = self._disk[f"{prefix}.weight"]
        q = unpack(self.file.get(disk), self.file.tensors[disk], disk)
        order = self.order(f"{prefix}.weight")
        if order is None:
            return q
        back = order.argsort()
        return QuantizedTensor(q.values[back], q.scale[back], q.spec)

    def spec_of(self, prefix: str) -> QuantSpec | None:
        """The format of one linear, from the header; None when it is stored in high precision or comes decoded."""
        return READ[self.file.tensors[self._disk[f"{prefix}.weight"]].type] if prefix in self.quantized_linears else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read once, kept.

        Raises:
            ModelNotFoundError: the file has none that transformers can read.
        """
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self.file)
        return self._tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """As fewbit left it; of other files none: their end token is the configuration's."""
        text = self.file.text(GENERATION_KEY)
        if text is None:
            return None
        try:
            config: GenerationConfig = GenerationConfig.from_dict(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{self.file.path}' has a damaged field {GENERATION_KEY}", "download it again") from error
        return config

    def sha256(self) -> str | None:
        """Computed once, kept."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return self.file.sha256()

    def describe(self) -> str:
        """The path or the hub id."""
        return self._name

    def order(self, name: str) -> torch.Tensor | None:
        """The rows of a tensor in the order of the file, int64 [rows]; None when that is the model's."""
        return rows_of_heads(self._architecture, name, self.shape(name)[0], self.config)
