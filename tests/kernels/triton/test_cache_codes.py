"""The assembly in Triton kernels, instruction by instruction on every code: Triton's interpreter has no assembler, and a GPU may be absent.

Semantics from NVIDIA's PTX ISA: `prmt` picks four of the eight bytes of its two operands by the nibbles of the selector, bit 3 of a nibble
spreads the sign instead; `lop3` with the table 0xEA is (a & b) | c; `fma.rn.bf16x2` rounds a * b + c once, for each half of a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

Words = npt.NDArray[np.uint32]


def _bf16(halves: Words) -> npt.NDArray[np.float64]:
    return (halves << np.uint32(16)).view(np.float32).astype(np.float64)


def _fma(a: Words, b: Words, c: Words) -> Words:
    out = np.zeros_like(a)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (_bf16((word >> shift) & np.uint32(0xFFFF)) for word in (a, b, c))
        exact = x * y + z  # of numbers of 8 bits: float64 is exact here, which the next line makes sure of
        assert np.array_equal(exact - x * y, z)
        rounded = torch.from_numpy(exact).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        out |= rounded.astype(np.uint32) << shift
    return out


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    places = [int(selector[0]) >> (4 * i) & 15 for i in range(4)]
    assert all(place < 8 for place in places), "sign spreading is not emulated"
    both = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    return sum((both[place] << np.uint32(8 * i) for i, place in enumerate(places)), np.zeros_like(a))


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    assert int(table[0]) == 0xEA
    return (a & b) | c


_INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a, "shr.b32": lambda a, n: a >> n, "and.b32": lambda a, b: a & b, "prmt.b32": _prmt, "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma,
}  # fmt: skip


def run_ptx(text: str, registers: dict[str, Words]) -> dict[str, Words]:
    """Run straight-line PTX.

    Args:
        registers: operands by name, `$2`; all of one length.

    Returns:
        All registers at the end.
    """
    registers, length = dict(registers), len(next(iter(registers.values())))
    for line in re.findall(r"([^;{}]+);", text):
        name, _, rest = line.strip().partition(" ")
        if name == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        values = [registers[o] if o in registers else np.full(length, int(o, 0), np.uint32) for o in operands]
        registers[target] = _INSTRUCTIONS[name](*values)
    return registers


def _constants(kind: str, which: int) -> dict[str, Words]:
    """What `byte_numbers` passes besides the two words."""
    from fewbit.kernels.triton import cache_codes as c

    low, sign = (c._INT8_LOW, c._INT8_SIGN) if kind == "int8" else (c._E4M3_LOW, c._E4M3_SIGN)
    values = (c._FIRST_BYTE.value + which * c._NEXT_BYTE.value, low.value, c._128.value, sign.value)
    return {f"${3 + 2 * i}": np.full(256, value % 2**32, np.uint32) for i, value in enumerate(values)}


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_code_becomes_its_number(kind: str, which: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from fewbit.kernels.triton.cache_codes import _E4M3_TO_BF16, _INT8_TO_BF16

    program, dtype = (_INT8_TO_BF16, torch.int8) if kind == "int8" else (_E4M3_TO_BF16, torch.float8_e4m3fn)
    code = np.arange(256, dtype=np.uint32)[:, None]
    words = [((code * np.array([1, 3, 5, 7], np.uint32) + np.uint32(start)) % 256).astype(np.uint8) for start in (0, 77)]
    assert all(len(set(word[:, which])) == 256 for word in words)  # every code at every place, beside others
    operands = {f"${1 + i}": np.ascontiguousarray(word).view(np.uint32)[:, 0] for i, word in enumerate(words)}
    done = run_ptx(program.value, operands | _constants(kind, which))["$0"]
    found = torch.from_numpy(done.view(np.int16).reshape(256, 2)).view(torch.bfloat16)
    wanted = torch.from_numpy(np.stack([word[:, which] for word in words], 1)).view(dtype).to(torch.bfloat16)
    number = ~wanted.isnan()
    assert torch.equal(found.view(torch.int16)[number], wanted.view(torch.int16)[number])  # bit by bit, -0 too
    assert kind == "int8" or set(found[~number].tolist()) == {480.0, -480.0}


def test_the_emulation_can_fail() -> None:
    word = {"$2": np.array([0x81FF7F02], np.uint32)}
    assert run_ptx("prmt.b32 $0, $2, 0, 0x4140;", word)["$0"][0] == 0x007F0002
    assert run_ptx("prmt.b32 $0, $2, 0, 0x3424;", word)["$0"][0] == 0x8100FF00
    assert run_ptx("fma.rn.bf16x2 $0, $2, 0x3F803F80, 0x3F803F80;", {"$2": np.array([0x40003F80], np.uint32)})["$0"][0] == 0x40404000
