// Weights whose numbers are small integers times a scale: INT8, INT4, INT3, INT2 and E2M1 (MXFP4, NVFP4), times inputs that are not rounded.
//
//     y[m, n] = sum_g s[n, g] * sum_{k in g} (c[n, k] - z) * x[m, k]          c: the stored code, an unsigned byte once it is unpacked
//     x[m, k] = t * (q0 + 256 q1 + 65536 q2)                                  t: a power of two per token and block of columns (digits.hpp)
//
// So the inner sum is three dot products of bytes, which a CPU with VNNI does 64 at a time, and there is no float multiplication in the inner
// loop. A weight that is turned into a float costs an unpacking, a conversion and one multiply-add for each 16 weights; three byte products
// for 64 weights are cheaper, and no less exact: the digits keep 22 bits below the largest input of their block, where float32 sums keep 24
// bits below the sum, and the integer sums do not round at all.
//
// In memory a weight is a row of tiles of 64 outputs. A tile has for each group of columns a header (64 scales; 64 zero points where the
// format is affine) and then its blocks of `block` columns. In a block, one 64-byte vector holds 4 neighbouring columns of 16 outputs
// (output-major), so that one accumulator register is 16 outputs and nothing has to be added across lanes; four vectors make the 64
// outputs. Codes of less than a byte share it with codes of the block's other columns ("sets" of block / sets columns):
//
//     INT8, 1 set     the byte
//     INT4, 2 sets    low nibble | high nibble << 4                                          also E2M1
//     INT2, 4 sets    a | b << 2 | c << 4 | d << 6
//     INT3, 8 sets    three planes: byte P0 = a0 | b0 << 3 | c[1:0] << 6, P1 = a1 | b1 << 3 | d[1:0] << 6,
//                     P2 = a2 | b2 << 3 | c[2] << 6 | d[2] << 7; the sets are a0 a1 a2 b0 b1 b2 c d
//
// All of it is one stream of bytes that is read from front to end, once.
//
// Plain data only: this header is included by files compiled for single instruction sets.

#pragma once

#include "linear.hpp"

#include <cstddef>
#include <cstdint>

namespace fewbit {

constexpr std::size_t kDigits = 3;

enum class DigitFormat { int8, int4, int3, int2, e2m1 };
enum class ScaleType { float32, bfloat16, e8m0, e4m3 };

constexpr std::size_t kTile = 64;  // outputs
constexpr std::size_t kLanes = 16; // outputs of a vector

struct DigitWeight {
    const std::uint8_t *data = nullptr;
    std::size_t out = 0, in = 0;
    DigitFormat format = DigitFormat::int4;
    ScaleType scale_type = ScaleType::bfloat16;
    bool affine = false;           // a zero point per scale, as an unsigned code; else the middle of the codes
    std::size_t block = 0;         // columns that share an input scale: 16 to 128
    std::size_t blocks = 0;        // per group of columns that share a weight scale
    std::size_t groups = 0;        // groups * blocks * block >= in; columns behind `in` meet inputs of zero
    float factor = 1.0f;           // of the whole weight
    std::size_t header_bytes = 0, block_bytes = 0; // per tile
};

// y[m * y_stride + n] for the outputs of tiles [begin, end). x: int24_groups with groups of `block` columns.
using DigitMultiply = void (*)(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);

void multiply_digits_portable(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);
#if defined(FEWBIT_X86)
void multiply_digits_avx2(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);
void multiply_digits_avx512(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);
#elif defined(FEWBIT_ARM)
void multiply_digits_neon(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);
void multiply_digits_neon_dotprod(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);
#endif

} // namespace fewbit
