#include "row_kernels.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace fewbit {
namespace {

constexpr float kRounder = 12582912.0f; // 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even
constexpr float kSmallest = 0x1p-126f;  // scales are normal numbers

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return x;
    return from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

void widen(const std::uint16_t *in, float *out, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = from_bits(std::uint32_t(in[i]) << 16);
}

float sum_of_squares(const float *x, std::size_t count) {
    float sums[16] = {};
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (std::size_t j = 0; j < 16; ++j) sums[j] += x[i + j] * x[i + j];
    }
    for (; i < count; ++i) sums[i % 16] += x[i] * x[i];
    float sum = 0;
    for (float part : sums) sum += part;
    return sum;
}

void normalize(const float *x, const float *weight, float factor, bool round, float *out, std::size_t count) {
    if (round) {
        for (std::size_t i = 0; i < count; ++i) out[i] = to_bfloat16(to_bfloat16(x[i] * factor) * weight[i]);
    } else {
        for (std::size_t i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
    }
}

std::int32_t quantize(const float *x, std::size_t count, std::size_t padded, float range, float static_scale, std::int8_t *codes,
                      float *scale) {
    float largest = 0;
    bool finite = true;
    for (std::size_t i = 0; i < count; ++i) {
        const float magnitude = std::fabs(x[i]);
        largest = magnitude > largest ? magnitude : largest;
        finite = finite && magnitude <= std::numeric_limits<float>::max();
    }
    float step = static_scale;
    if (step == 0) {
        step = largest / range;
        step = largest == 0 ? 1.0f : step < kSmallest ? kSmallest : step;
    }
    *scale = finite ? step : std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, padded);
    if (!finite) return 0;
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < count; ++i) {
        float value = x[i] / step;
        value = value < -128.0f ? -128.0f : value > 127.0f ? 127.0f : value; // ends are integers: clamping first rounds the same
        const float rounded = (value + kRounder) - kRounder;
        codes[i] = std::int8_t(rounded);
        sum += std::int32_t(rounded);
    }
    return sum;
}

} // namespace

const RowKernels &row_kernels_portable() {
    static const RowKernels kernels{"portable", widen, sum_of_squares, normalize, quantize};
    return kernels;
}

} // namespace fewbit
