// Integer weights times INT8 activations: what the instruction sets implement, as plain data.
//
//     y[m, n] = sum_g  s_x[m, g] * s_w[n, g] * ( sum_{k in g} c[n, k] * x[m, k]  -  (offset + z[n, g]) * sum_{k in g} x[m, k] )
//
// c are unsigned codes, c = q + offset with offset 2^(bits - 1): the dot product instructions of x86 want one unsigned operand. The
// correction costs nothing for symmetric weights, since the sums of x belong to the input: the accumulators start at -offset * sum.
//
// Layout in memory, the same for all instruction sets. A tile is 16 rows of the weight, one line of it 64 bytes:
//
//     INT8    byte 4 r + j of line l: c[r, 4 l + j]                                                       4 columns of 16 rows
//     INT4    byte 4 r + j of line l: c[r, 8 l + j] | c[r, 8 l + 4 + j] << 4                              8 columns of 16 rows
//     INT2    byte 4 r + j of line l: c[r, 16 l + j] | c[., . + 4 + j] << 2 | c[., . + 8 + j] << 4 | ...  16 columns of 16 rows
//     INT3    three lines hold 32 columns, q_i = c[r, 32 l + 4 i + j] in byte 4 r + j:
//                 q0 | q1 << 3 | (q6 >> 1) << 6      q2 | q3 << 3 | (q7 >> 1) << 6      q4 | q5 << 3 | (q6 & 1) << 6 | (q7 & 1) << 7
//
// so that the 32-bit lane r of a register (two registers of AVX2, four of NEON) belongs to row r, four columns of x are broadcast, and no sum
// ever crosses lanes. Rows and columns are padded, x with zeros.
//
// Codes, scales and zero points of a tile lie wherever the strides say; `cpu.tiles` in Python puts them one behind the other, so that a range of
// rows is one stream of memory.

#pragma once

#include "linear.hpp"

#include <cstddef>
#include <cstdint>

namespace fewbit {

constexpr std::size_t kTileRows = 16;
constexpr std::size_t kLineBytes = 64;

enum class ScaleLayout {
    channel,        // float32 [tiles, 16]
    groups_float32, // float32 [tiles, groups, 16]
    groups_bfloat16 // BF16 [tiles, ceil(groups / 2), 16, 2]: two groups side by side, one shift or mask away from float32
};

struct IntWeight {
    std::size_t out_features = 0;
    std::size_t group = 0;  // columns of one group of the input
    std::size_t groups = 0; // of the input, per row
    const std::uint8_t *codes = nullptr;
    ScaleLayout scale_layout = ScaleLayout::channel;
    const void *scales = nullptr;
    const std::int8_t *zeros = nullptr; // [tiles, groups, 16], channel: [tiles, 16]; null: symmetric
    std::size_t code_stride = 0, scale_stride = 0, zero_stride = 0; // bytes from one tile to the next
};

// As Linear::multiply; begin is a multiple of kTileRows.
using IntMultiply = void (*)(const IntWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);

struct IntKernels {
    const char *name;
    IntMultiply int2, int3, int4, int8;
};

const IntKernels &int_kernels_portable();
#if defined(__x86_64__)
const IntKernels &int_kernels_avx512_vnni();
const IntKernels &int_kernels_avx512vl_vnni();
const IntKernels &int_kernels_avx_vnni();
const IntKernels &int_kernels_avx2();
#elif defined(__aarch64__)
const IntKernels &int_kernels_neon_i8mm();
const IntKernels &int_kernels_neon_dotprod();
const IntKernels &int_kernels_neon();
#endif

} // namespace fewbit
