// Inputs as 24-bit integers in three signed bytes, for exact products with integer weights (digit_dot.hpp).
//
//     t = 2^(e - 22), 2^e <= max |x| * (1 + 2^-7) < 2^(e+1) over the block        n = round(x / t), |n| < 2^23 / (1 + 2^-7)
//     n = q0 + 256 q1 + 65536 q2                                                  q in -128..127
//
// A BF16 input, 8 significant bits, is represented exactly unless it is 2^15 times smaller than the largest of its block; what any input
// loses is at most 2^-23 of that largest one. A block with a NaN or an infinity gets t = NaN.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

// One block: x [count] to codes [3][padded], the digits `digit_stride` bytes apart and zeros behind `count`, and the sums of each digit,
// `sum_stride` apart. `padded` is a multiple of 16.
using SplitDigits = void (*)(const float *x, std::size_t count, std::size_t padded, std::int8_t *codes, std::size_t digit_stride, float *scale,
                             std::int32_t *sums, std::size_t sum_stride);

// The fastest that this CPU runs.
SplitDigits split_digits();

namespace portable { extern const SplitDigits kSplitDigits; }
#if defined(FEWBIT_X86)
namespace avx2 { extern const SplitDigits kSplitDigits; }
namespace avx512 { extern const SplitDigits kSplitDigits; }
#endif

} // namespace fewbit
