"""The decode engine: a whole forward pass of Llama, Mistral, Qwen2 and Qwen3 in one native call, over the kernels' own weights.

A decode step of a 0.5B model reads 0.3 GB at 4 bits, 7 ms at 40 GB/s. Through transformers the same step dispatches some 600 operators from
Python, 10 ms and more whatever the format. So the engine (src/native/cpu/engine) walks through the layers in C++, with all threads, and
takes the products from the linears' methods: `LinearMethod.native` gives a `Linear` that knows its format. The engine knows none.

It computes what transformers computes. A model in BF16 is rounded to BF16 at the same places, so greedy decoding gives the same tokens
(but for ties that the order of a sum breaks) and quality that was measured through transformers holds. `tests/runtime/test_engine.py`
compares the two. What it cannot run it refuses with a reason (`engine_refusal`), and the model runs through transformers.

The KV cache has a fixed capacity. Formats and the window of newest tokens in high precision are the scheme's, as in `runtime.kv_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewbit.errors import KernelError, UsageError
from fewbit.kernels.base import KernelRequest
from fewbit.kernels.cpu.extension import missing_native, native, use_torch_threads
from fewbit.kernels.dispatch import select
from fewbit.runtime.kv_kind import kv_kind
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import LoadedModel
from fewbit.runtime.rotary import RotaryTable, rotary_refusal

if TYPE_CHECKING:
    from fewbit import _native

__all__ = ["Engine", "EngineCache", "engine_refusal"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LARGEST_HEAD = 512


def engine_refusal(loaded: LoadedModel) -> str | None:
    """Why the engine cannot run this model; None when it can."""
    return _refuse_model(loaded) or _refuse_cache(loaded) or _refuse_kernels(loaded)


def _refuse_model(loaded: LoadedModel) -> str | None:
    config, device = loaded.config, loaded.model.device
    missing = missing_native()
    if missing is not None:
        return missing
    if device.type != "cpu":
        return f"the engine runs on the CPU, the model is on {device}"
    if loaded.dtype not in (torch.bfloat16, torch.float32):
        return f"the engine computes in bfloat16 or float32, the model in {loaded.dtype}"
    if config.model_type not in _FAMILIES:
        return f"the engine runs {', '.join(_FAMILIES)}, not '{config.model_type}'"
    if config.hidden_act not in ("silu", "swish"):
        return f"the engine has SiLU, the model {config.hidden_act}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"the engine does not know layers of type {', '.join(sorted(kinds))}"
    head_dim = _head_dim(config)
    if head_dim % 2 or head_dim > _LARGEST_HEAD:
        return f"the engine runs even head dimensions up to {_LARGEST_HEAD}, not {head_dim}"
    return rotary_refusal(loaded.model.model.rotary_emb, head_dim)


def _refuse_cache(loaded: LoadedModel) -> str | None:
    keys, values = loaded.scheme.kv_keys, loaded.scheme.kv_values
    if keys != values:
        return f"the engine's cache has one format for keys and values, not {keys} and {values}"
    if keys is not None and kv_kind(keys) is None:
        return f"the engine's cache does not know {keys}"
    if keys is not None and keys.group_size is not None and _head_dim(loaded.config) % keys.group_size:
        return f"KV group size {keys.group_size} does not divide the head dimension {_head_dim(loaded.config)}"
    return None


def _refuse_kernels(loaded: LoadedModel) -> str | None:
    refused: dict[str, list[str]] = {}
    for name in _linear_names(loaded):
        if _native_linear(loaded.model.get_submodule(name)) is None:
            refused.setdefault(_kernel_name(loaded.model.get_submodule(name)), []).append(name)
    if not refused:
        return None
    kernel, names = next(iter(refused.items()))
    return f"kernel '{kernel}' has no native form that the engine could call ({len(names)} linears, the first is {names[0]})"


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _linear_names(loaded: LoadedModel) -> Iterator[str]:
    for layer in range(loaded.config.num_hidden_layers):
        yield from (f"model.layers.{layer}.{name}" for name in _LINEARS)
    yield "lm_head"


def _kernel_name(module: nn.Module) -> str:
    if isinstance(module, QuantLinear):
        return module.quant_method.selection.kernel.name
    return "dense" if isinstance(module, nn.Linear) else type(module).__name__


def _native_linear(module: nn.Module) -> _native.Linear | None:
    """What the engine multiplies with; it shares the memory of the module's packed weight."""
    if isinstance(module, QuantLinear):
        return module.quant_method.native(module)
    if type(module) is not nn.Linear:
        return None
    weight = module.weight.detach()
    request = KernelRequest(None, None, module.out_features, module.in_features, str(weight.device), weight.dtype)
    kernel = select(request).kernel
    return kernel.native(kernel.pack(weight, request), request)


class EngineCache:
    """Keys and values of some sequences, with room for a fixed number of tokens each, and where the engine puts its answers.

    Attributes:
        logits: float32 [sequences, vocabulary], of the latest step.
        best: int64 [sequences], the most likely token of each; the first of several.
    """

    def __init__(self, native_cache: _native.EngineCache, rotary: RotaryTable, vocabulary: int) -> None:
        self.native = native_cache
        self.rotary = rotary
        self.logits = torch.zeros(native_cache.sequences, vocabulary)
        self.best = torch.zeros(native_cache.sequences, dtype=torch.long)

    @property
    def sequences(self) -> int:
        """Sequences that the cache has room for."""
        return self.native.sequences

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return self.native.capacity

    def get_seq_length(self, sequence: int = 0) -> int:
        """Tokens that are cached."""
        return self.native.length(sequence)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every sequence; their number is given negative, as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        for sequence in range(self.sequences):
            self.native.crop(sequence, max(self.native.length(sequence) + tokens_to_remove, 0))

    def fill_for_timing(self, tokens: int) -> None:
        """Every sequence has so many tokens, of arbitrary finite values: for timings, whose results nobody reads.

        Raises:
            ValueError: no room for the tokens.
        """
        for sequence in range(self.sequences):
            self.native.fill(sequence, tokens)

    def nbytes(self) -> int:
        """Bytes that are set aside; pages that no token has reached are not resident."""
        return self.native.nbytes

    def bytes_per_token(self) -> float:
        """Bytes that one more token of one sequence takes in the long run, scales and zero points included."""
        return self.native.bytes_per_token

    def constant_bytes(self) -> int:
        """Bytes per sequence that do not grow: the window in high precision beside a quantized history."""
        return self.native.constant_bytes


class Engine:
    """A loaded model on the native engine. The model's weights are shared, not copied.

    Args:
        loaded: a model that `engine_refusal` has nothing against.

    Raises:
        KernelError: the engine cannot run the model; the reason is in the message.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        refusal = engine_refusal(loaded)
        if refusal is not None:
            raise KernelError(f"the engine cannot run '{loaded.source.describe()}': {refusal}", "run it through transformers")
        self.loaded = loaded
        config, model = loaded.config, loaded.model
        self._head_dim = _head_dim(config)
        self._kept: list[object] = []  # what the native engine points to
        layers = [self._layer(layer, index) for index, layer in enumerate(model.model.layers)]
        embedding, norm = model.model.embed_tokens.weight.detach(), self._vector(model.model.norm.weight)
        head = self._linear(model.lm_head)
        self._kept += [embedding, layers]
        self._native = native.Engine(
            embedding.contiguous(),
            layers,
            norm,
            head,
            self._bias(model.lm_head),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=self._head_dim,
            intermediate=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            scale=float(model.model.layers[0].self_attn.scaling),
            bf16=loaded.dtype == torch.bfloat16,
        )

    def new_cache(self, capacity: int, sequences: int = 1) -> EngineCache:
        """An empty cache in the scheme's format.

        Args:
            capacity: tokens that each sequence has room for.
            sequences: that are generated side by side.

        Raises:
            UsageError: no token or no sequence.
        """
        if capacity < 1 or sequences < 1:
            raise UsageError(f"a cache for {sequences} sequences of {capacity} tokens", "ask for at least one of each")
        loaded, config = self.loaded, self.loaded.config
        history = kv_kind(loaded.scheme.kv_keys)
        assert history is not None
        cache = native.EngineCache(
            config.num_hidden_layers,
            sequences,
            config.num_key_value_heads,
            self._head_dim,
            capacity,
            history,
            "bfloat16" if loaded.dtype == torch.bfloat16 else "float32",
            loaded.scheme.kv_residual_window,
        )
        return EngineCache(cache, RotaryTable(loaded.model.model.rotary_emb, capacity, loaded.dtype), config.vocab_size)

    def prefill(self, input_ids: torch.Tensor, cache: EngineCache, sequence: int = 0) -> torch.Tensor:
        """Append tokens to one sequence.

        Args:
            input_ids: int64 [n], n >= 1.

        Returns:
            Float32 logits after the last token, [vocabulary]; overwritten by the next call; `cache.best[sequence]` is the likeliest token.

        Raises:
            ValueError: the cache has no room, or a token is not in the vocabulary.
        """
        row = slice(sequence, sequence + 1)
        self._prefill(input_ids, cache, sequence, cache.logits[row], cache.best[row])
        return cache.logits[sequence]

    def all_logits(self, input_ids: torch.Tensor, cache: EngineCache, sequence: int = 0) -> torch.Tensor:
        """The same with the logits after each token, [n, vocabulary], in a tensor of their own."""
        n = input_ids.shape[0]
        logits = torch.empty(n, self.loaded.config.vocab_size)
        self._prefill(input_ids, cache, sequence, logits, torch.empty(n, dtype=torch.long))
        return logits

    def decode(self, tokens: torch.Tensor, cache: EngineCache) -> torch.Tensor:
        """Append one token to each of the first n sequences.

        Args:
            tokens: int64 [n].

        Returns:
            Float32 logits, [n, vocabulary]; overwritten by the next call. `cache.best[:n]` are the most likely tokens.

        Raises:
            ValueError: the cache has no room, or a token is not in the vocabulary.
        """
        n = tokens.shape[0]
        use_torch_threads()
        cache.rotary.prepare([cache.native.length(sequence) for sequence in range(n)], 1)
        cosine, sine = cache.rotary.tables
        logits = cache.logits[:n]
        self._native.decode(cache.native, cosine, sine, tokens, logits, cache.best[:n])
        return logits

    @property
    def times(self) -> _native.EngineTimes:
        """Milliseconds of the latest pass by class of operator."""
        return self._native.times

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Within this context no product with a weight is computed: what remains of a step is the engine's overhead."""
        self._native.set_emptied(True)
        try:
            yield
        finally:
            self._native.set_emptied(False)

    def _prefill(self, input_ids: torch.Tensor, cache: EngineCache, sequence: int, logits: torch.Tensor, best: torch.Tensor) -> None:
        use_torch_threads()
        cache.rotary.prepare([cache.native.length(sequence)], input_ids.shape[0])
        cosine, sine = cache.rotary.tables
        self._native.prefill(cache.native, cosine, sine, sequence, input_ids.contiguous(), logits, best)

    def _layer(self, layer: nn.Module, index: int) -> _native.EngineLayer:
        modules = [layer.get_submodule(name) for name in _LINEARS]
        attention = layer.get_submodule("self_attn")
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return native.engine_layer(
            self.loaded.config.hidden_size,
            self._head_dim,
            self._vector(layer.get_parameter("input_layernorm.weight")),
            self._vector(layer.get_parameter("post_attention_layernorm.weight")),
            None if query_norm is None else self._vector(query_norm.weight),
            None if key_norm is None else self._vector(key_norm.weight),
            [self._linear(module) for module in modules],
            [self._bias(module) for module in modules],
            self._sliding(index),
        )

    def _sliding(self, index: int) -> int:
        """Tokens that a position of this layer sees, itself included; 0: all."""
        config = self.loaded.config
        kinds: Sequence[str] | None = getattr(config, "layer_types", None)
        slides = kinds[index] == "sliding_attention" if kinds else config.model_type == "mistral"
        return int(getattr(config, "sliding_window", None) or 0) if slides else 0

    def _linear(self, module: nn.Module) -> _native.Linear:
        linear = _native_linear(module)
        assert linear is not None  # engine_refusal has asked
        self._kept.append(linear)
        return linear

    def _vector(self, parameter: torch.Tensor) -> torch.Tensor:
        vector = parameter.detach().float().contiguous()
        self._kept.append(vector)
        return vector

    def _bias(self, module: nn.Module) -> torch.Tensor | None:
        bias = getattr(module, "bias", None)
        return None if bias is None else self._vector(bias)
