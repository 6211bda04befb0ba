"""Dense packing: exact round trips, compressed-tensors' int32 words, the nibble order of the layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.formats.grids import value_dtype
from fewbit.formats.packing import pack_bits, pack_values, packed_length, unpack_bits, unpack_values
from fewbit.formats.spec import QuantSpec


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 70), st.integers(0, 2**31))
def test_round_trip_is_exact_and_dense(num_bits: int, rows: int, n: int, seed: int) -> None:
    codes = torch.randint(0, 2**num_bits, (rows, 2, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, num_bits)
    assert packed.shape == (rows, 2, -(-n * num_bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, num_bits, n), codes)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_the_bit_stream_is_little_endian(num_bits: int) -> None:
    codes = torch.randint(0, 2**num_bits, (37,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stream = sum(int(code) << (i * num_bits) for i, code in enumerate(codes))
    assert bytes(pack_bits(codes, num_bits).tolist()) == stream.to_bytes(packed_length(37, num_bits), "little")


def test_two_nibbles_a_byte_low_first() -> None:
    assert pack_bits(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [64, 96, 40])
def test_the_stream_is_compressed_tensors_int32_words(num_bits: int, n: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    low = -(2 ** (num_bits - 1))
    values = torch.randint(low, -low, (5, n), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    ours = pack_values(values, QuantSpec(num_bits))
    theirs = helpers.pack_to_int32(values, num_bits)
    words = torch.nn.functional.pad(ours, (0, -ours.shape[-1] % 4)).view(torch.int32)
    assert torch.equal(words, theirs)
    assert torch.equal(helpers.unpack_from_int32(words, num_bits, values.shape), values)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(8),
        QuantSpec(4),
        QuantSpec(3),
        QuantSpec(2),
        QuantSpec(4, "nf"),
        QuantSpec(8, "float", exponent_bits=4),
        QuantSpec(4, "float", exponent_bits=2),
    ],
    ids=str,
)
def test_stored_values_of_every_type_round_trip(spec: QuantSpec) -> None:
    codes = torch.arange(2**spec.num_bits, dtype=torch.uint8).repeat(3, 1)
    values = codes.view(value_dtype(spec)) if spec.type != "int" else (codes.int() - 2 ** (spec.num_bits - 1)).to(torch.int8)
    back = unpack_values(pack_values(values, spec), spec, values.shape[-1])
    assert back.dtype == values.dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    strided = values.t()
    assert torch.equal(unpack_values(pack_values(strided, spec), spec, 3).view(torch.uint8), strided.contiguous().view(torch.uint8))


def test_packing_does_not_share_memory_with_its_input() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    pack_bits(codes, 8)[0] = 7
    assert int(codes[0]) == 0


def test_wrong_dtype_length_and_width_are_refused() -> None:
    with pytest.raises(FormatError, match="int8"):
        pack_bits(torch.zeros(4, dtype=torch.int8), 4)
    with pytest.raises(FormatError, match="last dimension of 2"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 4)
    with pytest.raises(FormatError, match="9 bits"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), 9)
