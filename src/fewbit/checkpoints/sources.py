"""Where a model's tensors come from: a directory, the hub, the bundled model, or random numbers in real shapes.

A source hands out one tensor at a time, so that loading a model never holds more than one layer in two formats. It knows files and
configurations, not modules: the loader asks for `model.layers.0.mlp.up_proj.weight` and does not care where it lies.

A checkpoint that is quantized on disk looks the same from outside: its names are those of the high-precision model, `get_quantized(prefix)`
gives the stored integers, and `get` dequantizes them.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from fewbit.checkpoints.gguf_header import gguf_path
from fewbit.checkpoints.gguf_source import GgufSource
from fewbit.checkpoints.layout import LinearsReader, quantization_fields
from fewbit.checkpoints.registry import quantized_reader
from fewbit.checkpoints.safetensors_files import SafetensorsFiles
from fewbit.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from fewbit.formats.quantize import dequantize
from fewbit.formats.spec import Scheme
from fewbit.formats.tensor import QuantizedTensor
from fewbit.models.names import DiskNames
from fewbit.models.reference import reference_model_dir
from fewbit.models.structure import build_empty_model

__all__ = ["DirectorySource", "RandomSource", "RenamedSource", "TensorSource", "open_source"]

# Everything a causal language model needs, and nothing that could run code: no pickle, no Python.
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_MOST_LAYERS = 4096
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class TensorSource(Protocol):
    """What the loader needs of a model.

    Attributes:
        config: transformers' configuration.
        scheme: the formats that linears are stored in already; None for a high-precision checkpoint.
        quantized_linears: dotted names of the linears that are stored so.
        directory: the Hugging Face directory; None when there is none.
        weight_bytes_on_disk: of the weight files; None when there are none.
        layout: how it lies on disk: `none` in high precision, `gptq`, ...
        notes: what of the checkpoint is not carried out here, one line each.
    """

    @property
    def layout(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def scheme(self) -> Scheme | None: ...
    @property
    def quantized_linears(self) -> frozenset[str]: ...
    @property
    def directory(self) -> Path | None: ...
    @property
    def weight_bytes_on_disk(self) -> int | None: ...

    def names(self) -> list[str]:
        """The tensors' names, in the order that reads fastest."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it; of a quantized one as the model has it."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored dtype; a quantized one in float32."""
        ...

    def get_quantized(self, prefix: str) -> QuantizedTensor | None:
        """The stored quantized weight of the linear `prefix`; None when it is stored in high precision."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        ...

    def generation_config(self) -> GenerationConfig | None:
        """What the publisher says about generating, end tokens above all; None when nothing."""
        ...

    def sha256(self) -> str | None:
        """Hash over the weight files; None when there are none."""
        ...

    def describe(self) -> str:
        """What a person calls it."""
        ...


class DirectorySource:
    """A Hugging Face directory: config.json, safetensors weights, a tokenizer.

    Args:
        path: the directory.
        name: what a person calls it; the path when empty.

    Raises:
        ModelNotFoundError: no such directory, no config.json, or no safetensors weights.
        UnsupportedModelError: an architecture that transformers does not know, or a quantized layout that fewbit does not read.
        CheckpointError: config.json or a weight file is damaged.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self._path = Path(path)
        self._name = name or str(path)
        if not self._path.is_dir():
            what = "is a file, not a model directory" if self._path.exists() else "does not exist"
            raise ModelNotFoundError(f"'{path}' {what}", "name a Hugging Face directory or a hub id such as Qwen/Qwen2.5-0.5B")
        self.config = _read_config(self._path)
        self._files = SafetensorsFiles(self._path)
        self._quantized = _quantized_reader(self._path, self.config)
        self.quantized_linears: frozenset[str] = frozenset(self._quantized.linears if self._quantized else ())
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sha256: str | None = None

    @property
    def directory(self) -> Path | None:
        """The directory."""
        return self._path

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of a quantized checkpoint."""
        return self._quantized.scheme if self._quantized else None

    @property
    def layout(self) -> str:
        """`none`, or what config.json calls `quant_method`."""
        return str(self._quantized.fields["quant_method"]) if self._quantized else "none"

    @property
    def notes(self) -> tuple[str, ...]:
        """The reader's."""
        return self._quantized.notes if self._quantized else ()

    @property
    def files(self) -> SafetensorsFiles:
        """The weight files."""
        return self._files

    @property
    def reader(self) -> LinearsReader | None:
        """The reader of a quantized checkpoint; None for a high-precision one."""
        return self._quantized

    @property
    def weight_bytes_on_disk(self) -> int | None:
        """Bytes of the safetensors files."""
        return self._files.total_bytes

    def names(self) -> list[str]:
        """Names as in the high-precision model: a quantized linear's several tensors appear as one `weight`."""
        if self._quantized is None:
            return self._files.names()
        kept = [name for name in self._files.names() if name not in self._quantized.owned]
        return kept + [f"{prefix}.weight" for prefix in sorted(self.quantized_linears)]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header; of a quantized weight, once it was read."""
        prefix = name.removesuffix(".weight")
        if name.endswith(".weight") and prefix in self.quantized_linears:
            assert self._quantized is not None
            return self._quantized.read(prefix).shape
        return self._files.shape(name)

    def get(self, name: str) -> torch.Tensor:
        """One tensor; a quantized weight is dequantized to float32."""
        quantized = self.get_quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return self._files.get(name) if quantized is None else dequantize(quantized)

    def get_quantized(self, prefix: str) -> QuantizedTensor | None:
        """The stored integers of one linear."""
        if self._quantized is None or prefix not in self.quantized_linears:
            return None
        return self._quantized.read(prefix)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read once, kept.

        Raises:
            ModelNotFoundError: the directory has no tokenizer, or none that transformers can read.
        """
        if self._tokenizer is None:
            remedy = "copy tokenizer.json and tokenizer_config.json of the model into it"
            if not any((self._path / name).is_file() for name in _TOKENIZER_FILES):
                raise ModelNotFoundError(f"no tokenizer in '{self._path}'", remedy)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # tokenizers raises bare Exception on a damaged file
                raise ModelNotFoundError(f"cannot read the tokenizer in '{self._path}': {_first_line(error)}", remedy) from error
        return self._tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """From generation_config.json."""
        if not (self._path / "generation_config.json").is_file():
            return None
        try:
            config: GenerationConfig = GenerationConfig.from_pretrained(self._path, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"'{self._path / 'generation_config.json'}' cannot be read: {_first_line(error)}", "repair or remove it"
            ) from error
        return config

    def sha256(self) -> str | None:
        """Computed once, kept."""
        if self._sha256 is None:
            self._sha256 = self._files.sha256()
        return self._sha256

    def describe(self) -> str:
        """The path or the hub id."""
        return self._name


class RandomSource:
    """Random weights in real shapes, for latency and memory, which depend on shapes and not on values.

    Matrices are N(0, 0.02) and cut from one block of random numbers that repeats (its prime length keeps rows from being equal),
    vectors are ones for gains and zeros for biases. The same seed gives the same weights.

    Args:
        config: the whole model's configuration.
        seed: of the random numbers.
        num_layers: the stack is cut to so many layers; None for all.
    """

    scheme = None
    quantized_linears: frozenset[str] = frozenset()
    directory = None
    weight_bytes_on_disk = None
    layout = "none"
    notes: tuple[str, ...] = ()

    _BLOCK = 1_048_583  # a prime

    def __init__(self, config: PretrainedConfig, seed: int, num_layers: int | None = None) -> None:
        self.config = _cut_layers(config, num_layers)
        self._name = f"shapes:{config.name_or_path or config.model_type}"
        empty = build_empty_model(self.config)
        self._meta = dict(empty.state_dict())
        for tied in getattr(empty, "all_tied_weights_keys", {}):
            self._meta.pop(tied, None)
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(self._BLOCK, generator=generator).mul_(0.02).to(torch.bfloat16)

    def names(self) -> list[str]:
        """In the model's order."""
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's."""
        return tuple(self._meta[name].shape)

    def get(self, name: str) -> torch.Tensor:
        """BF16."""
        shape = self._meta[name].shape
        if len(shape) < 2:
            return torch.zeros(shape, dtype=torch.bfloat16) if name.endswith("bias") else torch.ones(shape, dtype=torch.bfloat16)
        tensor = torch.empty(shape.numel(), dtype=torch.bfloat16)
        filled, start = 0, zlib.crc32(name.encode()) % self._BLOCK
        while filled < tensor.numel():
            piece = self._block[start : start + tensor.numel() - filled]
            tensor[filled : filled + piece.numel()] = piece
            filled, start = filled + piece.numel(), 0
        return tensor.view(shape)

    def get_quantized(self, prefix: str) -> QuantizedTensor | None:
        """None: always high precision."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ModelNotFoundError: random weights read no text."""
        raise ModelNotFoundError(
            f"'{self._name}' has random weights and no tokenizer", "name a model to measure quality or to generate text"
        )

    def generation_config(self) -> GenerationConfig | None:
        """None."""
        return None

    def sha256(self) -> str | None:
        """None."""
        return None

    def describe(self) -> str:
        """`shapes:NAME`."""
        return self._name


class RenamedSource:
    """Another source under the names of the model's parameters (`models.names`); what is merged or unknown keeps its own.

    Args:
        source: the one to read from.
        names: what it calls the model's parameters.
    """

    def __init__(self, source: TensorSource, names: DiskNames) -> None:
        self._source = source
        self._disk = dict(names.single)
        self._model = {disk: name for name, disk in names.single.items()}
        prefixes = {disk.rpartition(".")[0]: name.rpartition(".")[0] for disk, name in self._model.items() if disk.endswith(".weight")}
        self._prefixes = {name: disk for disk, name in prefixes.items()}
        self.quantized_linears = frozenset(prefixes.get(prefix, prefix) for prefix in source.quantized_linears)

    @property
    def config(self) -> PretrainedConfig:
        """The source's."""
        return self._source.config

    @property
    def scheme(self) -> Scheme | None:
        """The source's."""
        return self._source.scheme

    @property
    def directory(self) -> Path | None:
        """The source's."""
        return self._source.directory

    @property
    def weight_bytes_on_disk(self) -> int | None:
        """The source's."""
        return self._source.weight_bytes_on_disk

    def names(self) -> list[str]:
        """In the source's order."""
        return [self._model.get(name, name) for name in self._source.names()]

    @property
    def layout(self) -> str:
        """The source's."""
        return self._source.layout

    @property
    def notes(self) -> tuple[str, ...]:
        """The source's."""
        return self._source.notes

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's by the model's name."""
        return self._source.shape(self._disk.get(name, name))

    def get(self, name: str) -> torch.Tensor:
        """One tensor by the model's name."""
        return self._source.get(self._disk.get(name, name))

    def get_quantized(self, prefix: str) -> QuantizedTensor | None:
        """The stored integers of one linear by the model's name."""
        return self._source.get_quantized(self._prefixes.get(prefix, prefix))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's."""
        return self._source.tokenizer()

    def generation_config(self) -> GenerationConfig | None:
        """The source's."""
        return self._source.generation_config()

    def sha256(self) -> str | None:
        """The source's."""
        return self._source.sha256()

    def describe(self) -> str:
        """As the source."""
        return self._source.describe()


def open_source(model: str | Path | None = None) -> TensorSource:
    """The source of a model.

    Args:
        model: a local directory or GGUF file; a hub id such as `Qwen/Qwen2.5-0.5B` when there is no such path; the bundled reference
            model when None.

    Raises:
        ModelNotFoundError: no such directory, or the hub cannot be reached and has not been downloaded before.
        UnsupportedModelError, CheckpointError: as `DirectorySource` and `GgufSource`.
    """
    if model is None:
        return DirectorySource(reference_model_dir(), name="fewbit's reference model")
    if not Path(model).exists() and isinstance(model, str) and _HUB_ID.fullmatch(model):
        return DirectorySource(_download(model), name=model)
    gguf = gguf_path(model)
    return DirectorySource(model) if gguf is None else GgufSource(gguf, name=str(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS))
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"'{hub_id}' is neither a local directory nor a model on the hub",
            "check the spelling; log in with `hf auth login` if it is gated",
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"'{hub_id}' is neither a local directory nor a possible hub id", "check the spelling") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"'{hub_id}' is no local directory, and the hub cannot be reached ({type(error).__name__})",
            "name a directory, or connect to the network",
        ) from error


def _read_config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    if not file.is_file():
        raise ModelNotFoundError(f"no config.json in '{path}'", "name a directory that save_pretrained() or the hub has made")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {_first_line(error)}", "download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"'{file}' holds no JSON object", "download it again")
    _check_counts(raw, file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything on values that it does not expect
        kind = raw.get("model_type")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            raise CheckpointError(
                f"'{file}' does not fit the architecture '{kind}': {_one_line(error)}", "repair or download it again"
            ) from error
        remedy = "fewbit runs no code from checkpoints" if "auto_map" in raw else "upgrade transformers if the model is newer than it"
        raise UnsupportedModelError(f"transformers does not know the architecture '{kind}' of '{file}'", remedy) from error
    return config


def _check_counts(raw: dict[str, Any], file: Path) -> None:
    """What counts something must be a positive integer; transformers accepts a negative vocabulary and fails much later."""
    nested = raw.get("text_config")
    for fields in (raw, nested if isinstance(nested, dict) else {}):
        for name in _COUNTS:
            value = fields.get(name)
            if name in fields and value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"'{file}' says {name} = {value!r}, which is no positive integer", "repair or download it again")
        layers = fields.get("num_hidden_layers")
        if layers is not None and layers > _MOST_LAYERS:  # the modules of each are made before a tensor is looked for
            raise CheckpointError(
                f"'{file}' says num_hidden_layers = {layers}, and {_MOST_LAYERS} are the most", "repair or download it again"
            )


def _quantized_reader(path: Path, config: PretrainedConfig) -> LinearsReader | None:
    """The reader of a checkpoint that is quantized on disk; None for a high-precision one."""
    if getattr(config, "quantization_config", None) is None:
        return None
    return quantized_reader(path, quantization_fields(path))


def _cut_layers(config: PretrainedConfig, num_layers: int | None) -> PretrainedConfig:
    config = copy.deepcopy(config)
    if num_layers is not None and num_layers < config.num_hidden_layers:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    return config


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
