"""Neighbouring scale codes: an exact search for the best block scale of the FP4 formats.

A block scale of NVFP4 is an E4M3 number and one of MXFP4 a power of two: few values, stored as a byte, in the order of the byte. So the
scale of least error need not be looked for in a series of ranges: all codes around min-max can be tried.

**Upwards, further than min-max.** E2M1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6. Between 4 and 6 lies a wide gap, and a block whose largest value
goes to 4 uses points that are denser relative to it. Beyond that nothing is gained: once the largest value is at most 3.5 steps, no value
rounds to 4 or 6, and half the scale holds the very same points and more. The best scale is therefore below max / 3.5 = 12/7 of min-max,
less than seven E4M3 codes up (eight make a factor of 2) and at most one power of two.

**Downwards** the largest values saturate. Twelve E4M3 codes are a factor of 0.35, where clipping costs more than any finer step brings
(on the reference model's weights four codes fewer find the same minimum). For importance that is zero at the largest value, MXFP4 has
two powers, a factor of 4.

On the reference model's weights NVFP4's squared error falls to 0.73 of min-max; a search that only shrinks the range stops at 0.86.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fewbit.formats.spec import ScaleDtype

__all__ = ["HEADROOM", "neighbouring_scales"]

# (steps down, steps up, smallest code, largest code): E4M3's code 0 is zero and 127 is NaN; E8M0's 255 is NaN.
_RANGES: dict[ScaleDtype, tuple[int, int, int, int]] = {"float8_e4m3fn": (12, 6, 1, 126), "e8m0": (2, 1, 0, 254)}
HEADROOM = 448 / 256  # NVFP4's global scale leaves this much above the largest block, so that its scale can go up as well


def neighbouring_scales(scale: torch.Tensor, scale_dtype: ScaleDtype) -> Iterator[torch.Tensor]:
    """Each stored scale moved by the same number of codes, for all numbers of the search but 0.

    Args:
        scale: stored scales, float8_e4m3fn or uint8 (E8M0), any shape.

    Yields:
        The same shape and dtype; clamped at the smallest and the largest finite code.
    """
    down, up, smallest, largest = _RANGES[scale_dtype]
    codes = scale.view(torch.uint8).int()
    for offset in (*range(-1, -down - 1, -1), *range(1, up + 1)):
        yield (codes + offset).clamp_(smallest, largest).to(torch.uint8).view(scale.dtype)
