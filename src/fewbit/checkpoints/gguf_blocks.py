"""GGUF's blocks: 32 neighbours of a row with their scale, side by side in the file.

    Q4_0    d F16, 16 bytes                 (code - 8) * d                  INT4, symmetric
    Q4_1    d F16, m F16, 16 bytes          code * d + m                    INT4 with an offset
    Q8_0    d F16, 32 bytes I8              q * d                           INT8, symmetric
    MXFP4   e U8, 16 bytes                  E2M1(code) * 2**(e - 127)       OCP MXFP4
    4 bits: byte j of a block holds value j in its low half and value j + 16 in its high half

Q4_0, Q8_0 and MXFP4 are formats that fewbit has, and go from and to `QuantizedTensor` bit for bit (a scale of Q4_0 may be negative:
llama.cpp's quantizer lets the largest value take the code -8, whatever its sign). Q4_1 is written from affine INT4, with the offset
m = -zero * scale rounded to F16. It is not read back as affine, because m need not be a whole number of steps: like the K- and IQ-types it
is handed out in float32, exactly as the gguf library decodes it. Nothing is rounded twice, at the price of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type

from fewbit.checkpoints.gguf_header import GgufTensor
from fewbit.errors import CheckpointError, FormatError, UnsupportedModelError
from fewbit.formats.spec import QuantSpec
from fewbit.formats.tensor import QuantizedTensor

__all__ = ["DENSE", "READ", "WRITTEN", "decode", "dense_bytes", "pack", "type_of", "unpack"]

GROUP = 32
_INT4 = QuantSpec(4, strategy="group", group_size=GROUP, scale_dtype="float16")
_INT8 = QuantSpec(8, strategy="group", group_size=GROUP, scale_dtype="float16")
_INT4_ASYM = QuantSpec(4, strategy="group", group_size=GROUP, symmetric=False, scale_dtype="float16")
_MXFP4 = QuantSpec(4, "float", "group", group_size=GROUP, exponent_bits=2, scale_dtype="e8m0")

READ: Mapping[Type, QuantSpec] = {Type.Q4_0: _INT4, Type.Q8_0: _INT8, Type.MXFP4: _MXFP4}
WRITTEN: Mapping[Type, QuantSpec] = {**READ, Type.Q4_1: _INT4_ASYM}
DENSE: Mapping[torch.dtype, Type] = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def type_of(spec: QuantSpec) -> Type | None:
    """The type that holds a format; None when none does."""
    return next((stored for stored, held in WRITTEN.items() if held == spec), None)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 16] -> codes uint8 [..., 32]."""
    return torch.cat((packed & 0xF, packed >> 4), dim=-1)


def _packed_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., 32] -> uint8 [..., 16]."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    """[rows, groups] of any dtype -> uint8 [rows, groups, bytes]."""
    return scale.contiguous().unsqueeze(-1).view(torch.uint8)


def pack(q: QuantizedTensor) -> torch.Tensor:
    """The blocks of a weight.

    Args:
        q: [out, in] in one of `WRITTEN`, columns in order.

    Returns:
        uint8 [out, in / 32 * bytes of a block].

    Raises:
        FormatError: another format, or an offset that F16 does not hold.
    """
    stored = type_of(q.spec)
    if stored is None or q.g_idx is not None:
        raise FormatError(f"GGUF has no block for {q.spec}" + (" with columns out of order" if q.g_idx is not None else ""))
    rows, columns = q.shape
    values = q.values.contiguous().view(rows, columns // GROUP, GROUP)
    parts = [_bytes(q.scale)]
    if stored == Type.Q8_0:
        parts.append(values.view(torch.uint8))
    elif stored == Type.MXFP4:
        parts.append(_packed_nibbles(values))
    else:
        if q.zero_point is not None:
            offset = (-(q.zero_point.float() + 8) * q.scale.float()).to(torch.float16)
            if not bool(offset.isfinite().all()):
                raise FormatError("an offset is beyond F16, in which Q4_1 keeps it", "quantize symmetrically (Q4_0)")
            parts.append(_bytes(offset))
        parts.append(_packed_nibbles((values + 8).view(torch.uint8)))
    return torch.cat(parts, dim=-1).flatten(1).contiguous()


def unpack(raw: torch.Tensor, tensor: GgufTensor, name: str) -> QuantizedTensor:
    """The weight of blocks that fewbit has a format for.

    Args:
        raw: uint8 [nbytes] of a tensor [out, in] whose type is in `READ`.

    Raises:
        CheckpointError: a scale that is NaN or infinite.
    """
    rows, columns = tensor.shape
    spec = READ[tensor.type]
    blocks = raw.view(rows, columns // GROUP, -1)
    if tensor.type == Type.MXFP4:
        scale, values = blocks[..., 0].contiguous(), _nibbles(blocks[..., 1:])
        spoiled = bool((scale == 255).any())
    else:
        scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        spoiled = not bool(scale.float().isfinite().all())
        values = blocks[..., 2:].view(torch.int8) if tensor.type == Type.Q8_0 else _nibbles(blocks[..., 2:]).view(torch.int8) - 8
    if spoiled:
        raise CheckpointError(f"tensor '{name}' has NaN or infinite scales", "the file is damaged: download or write it again")
    return QuantizedTensor(values.flatten(1).contiguous(), scale, spec)


def decode(raw: torch.Tensor, tensor: GgufTensor, name: str) -> torch.Tensor:
    """The numbers of any tensor: F32, F16 and BF16 in their own dtype, whatever is quantized in float32.

    Raises:
        UnsupportedModelError: a type that the gguf library does not decode.
    """
    for dtype, stored in DENSE.items():
        if tensor.type == stored:
            return raw.view(dtype).view(tensor.shape)
    try:
        values = gguf.quants.dequantize(raw.numpy().reshape(*tensor.shape[:-1], -1), tensor.type)
    except (NotImplementedError, KeyError) as error:
        raise UnsupportedModelError(f"tensor '{name}' is stored as {tensor.type.name}, which cannot be decoded") from error
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(tensor.shape)


def dense_bytes(tensor: torch.Tensor) -> tuple[Type, torch.Tensor]:
    """How a tensor that is not quantized is stored: vectors in F32, as llama.cpp needs them, matrices in their own dtype.

    Returns:
        The type, and the contiguous tensor in it.

    Raises:
        FormatError: a dtype that GGUF lacks.
    """
    if tensor.ndim == 1 and tensor.is_floating_point():
        tensor = tensor.float()
    stored = DENSE.get(tensor.dtype)
    if stored is None:
        raise FormatError(f"GGUF has no type for {tensor.dtype}")
    return stored, tensor.contiguous()
