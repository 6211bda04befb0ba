// Weights whose numbers are not integers: tables of 16 (NF4 and other 4-bit codebooks) and FP8 (E4M3, E5M2), times inputs in float32.
//
//     y[m, n] = sum_g s[n, g] * sum_{k in g} table[c[n, k]] * x[m, k]
//
// A code becomes a float in registers, by a permutation of the table or by way of FP16, and then there is one multiply-add for 16 weights.
// FP8 goes through FP16 because subnormal numbers come out right there at full speed: E4M3 is FP16 with a bit less of exponent and seven
// less of mantissa, times 2^8, and E5M2 is the upper half of an FP16 number.
//
// In memory tiles of 64 outputs follow one another, and in them groups of columns:
//
//     scales     float32 or BF16 [64]
//     FP8        bytes [columns][64 outputs]
//     tables     bytes [columns / 8][64 outputs][4]: the low nibbles are columns 8 i + j of output r, the high ones columns 8 i + 4 + j,
//                in byte j of output r
//
// Plain data only: this header is included by files compiled for single instruction sets.

#pragma once

#include "linear.hpp"

#include <cstddef>
#include <cstdint>

namespace fewbit {

enum class TableFormat { table16, e4m3, e5m2 };

constexpr std::size_t kTableTile = 64; // outputs

struct TableWeight {
    const std::uint8_t *data = nullptr;
    std::size_t out = 0, in = 0;
    TableFormat format = TableFormat::table16;
    bool bfloat16_scales = false;
    std::size_t group = 0;  // columns that share a scale; a multiple of 8 for tables
    std::size_t groups = 0; // groups * group >= in; the codes behind `in` are not read
    const float *table = nullptr; // 16 numbers
};

// As Linear::multiply for tiles [begin, end).
using TableMultiply = void (*)(const TableWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);

namespace portable { extern const TableMultiply kTableMultiply; }
#if defined(FEWBIT_X86)
namespace avx2 { extern const TableMultiply kTableMultiply; }
namespace avx512 { extern const TableMultiply kTableMultiply; }
#elif defined(FEWBIT_ARM)
namespace neon { extern const TableMultiply kTableMultiply; }
#endif

} // namespace fewbit
