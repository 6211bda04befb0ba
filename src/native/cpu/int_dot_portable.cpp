// int_dot.hpp in plain C++: the definition that the other instruction sets are tested against.

#include "int_dot.hpp"

#include <algorithm>
#include <cstring>

namespace fewbit {
namespace {

float bfloat16(std::uint16_t bits) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

float scale_of(const IntWeight &w, std::size_t tile, std::size_t group, std::size_t row) {
    const void *scales = static_cast<const char *>(w.scales) + tile * w.scale_stride;
    switch (w.scale_layout) {
    case ScaleLayout::channel:
        return static_cast<const float *>(scales)[row];
    case ScaleLayout::groups_float32:
        return static_cast<const float *>(scales)[group * kTileRows + row];
    default:
        return bfloat16(static_cast<const std::uint16_t *>(scales)[(group / 2 * kTileRows + row) * 2 + group % 2]);
    }
}

std::int32_t zero_of(const IntWeight &w, std::size_t tile, std::size_t group, std::size_t row) {
    if (w.zeros == nullptr) return 0;
    return w.zeros[tile * w.zero_stride + (w.scale_layout == ScaleLayout::channel ? 0 : group * kTileRows) + row];
}

// The code of byte `at` of a line that holds columns 4 i + j, for i of a stretch of 32 columns; `codes` are the lines of the stretch.
template <int Bits> int code_of(const std::uint8_t *codes, std::size_t at, std::size_t i) {
    if constexpr (Bits == 3) {
        const int a = codes[at], b = codes[kLineBytes + at], c = codes[2 * kLineBytes + at];
        if (i == 6) return a >> 6 << 1 | (c >> 6 & 1);
        if (i == 7) return b >> 6 << 1 | c >> 7;
        return codes[i / 2 * kLineBytes + at] >> (i % 2 * 3) & 7;
    } else {
        constexpr std::size_t kFields = 8 / Bits;
        return codes[i / kFields * kLineBytes + at] >> (i % kFields * Bits) & ((1 << Bits) - 1);
    }
}

// sums[r] += sum of c * x over one group of a tile.
template <int Bits> void dot(const std::uint8_t *codes, const std::int8_t *x, std::size_t columns, std::int32_t *sums) {
    constexpr std::size_t kStretch = 32; // columns
    for (std::size_t k = 0; k < columns; k += kStretch, codes += kStretch * kTileRows * Bits / 8) {
        for (std::size_t i = 0; i < kStretch / 4 && k + 4 * i < columns; ++i) {
            for (std::size_t at = 0; at < kLineBytes; ++at) sums[at / 4] += code_of<Bits>(codes, at, i) * x[k + 4 * i + at % 4];
        }
    }
}

template <int Bits>
void multiply(const IntWeight &w, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    constexpr std::int32_t kOffset = 1 << (Bits - 1);
    const std::size_t group_bytes = w.group * kTileRows * Bits / 8;
    for (std::size_t first = begin; first < end; first += kTileRows) {
        const std::size_t tile = first / kTileRows, rows = std::min(kTileRows, end - first);
        for (std::size_t m = 0; m < x.rows; ++m) {
            float result[kTileRows] = {};
            for (std::size_t g = 0; g < w.groups; ++g) {
                const std::size_t at = m * w.groups + g;
                std::int32_t sums[kTileRows] = {};
                dot<Bits>(w.codes + tile * w.code_stride + g * group_bytes, x.codes + m * x.code_stride + g * w.group, w.group, sums);
                for (std::size_t r = 0; r < rows; ++r) {
                    const std::int32_t sum = sums[r] - (kOffset + zero_of(w, tile, g, r)) * x.sums[at];
                    result[r] += scale_of(w, tile, g, r) * x.scales[at] * float(sum);
                }
            }
            std::copy_n(result, rows, y + m * y_stride + first);
        }
    }
}

} // namespace

const IntKernels &int_kernels_portable() {
    static const IntKernels kernels{"portable", multiply<2>, multiply<3>, multiply<4>, multiply<8>};
    return kernels;
}

} // namespace fewbit
