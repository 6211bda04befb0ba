// row_kernels.hpp for AVX2: the portable loops eight values at a time, with the same results to the last bit.
//
// This file is compiled for AVX2 and may only run where it is there: no inline function of another header, nothing of the standard library.

#include "row_kernels.hpp"

#include <immintrin.h>

namespace fewbit {
namespace {

constexpr std::size_t kLanes = 8;
constexpr float kSmallest = 0x1p-126f; // scales are normal numbers
constexpr int kInfinity = 0x7f800000;

// The first `count` values, zeros behind them. Whole registers take the short way.
inline __m256 load(const float *from, std::size_t count) {
    if (count >= kLanes) return _mm256_loadu_ps(from);
    float values[kLanes] = {};
    for (std::size_t i = 0; i < count; ++i) values[i] = from[i];
    return _mm256_loadu_ps(values);
}

inline void store(float *to, __m256 values, std::size_t count) {
    if (count >= kLanes) {
        _mm256_storeu_ps(to, values);
        return;
    }
    float parts[kLanes];
    _mm256_storeu_ps(parts, values);
    for (std::size_t i = 0; i < count; ++i) to[i] = parts[i];
}

inline __m256 to_bfloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 cut = _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000))));
    return _mm256_blendv_ps(cut, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

void widen(const std::uint16_t *in, float *out, std::size_t count) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(in + i)));
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
    }
    for (; i < count; ++i) {
        const std::uint32_t bits = std::uint32_t(in[i]) << 16;
        __builtin_memcpy(out + i, &bits, sizeof bits);
    }
}

float sum_of_squares(const float *x, std::size_t count) {
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __m256 values = load(x + i, count - i);
        sums[i / kLanes % 2] = _mm256_add_ps(sums[i / kLanes % 2], _mm256_mul_ps(values, values));
    }
    float parts[2 * kLanes], sum = 0;
    _mm256_storeu_ps(parts, sums[0]);
    _mm256_storeu_ps(parts + kLanes, sums[1]);
    for (float part : parts) sum += part;
    return sum;
}

void normalize(const float *x, const float *weight, float factor, bool round, float *out, std::size_t count) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (std::size_t i = 0; i < count; i += kLanes) {
        __m256 values = _mm256_mul_ps(load(x + i, count - i), factors);
        if (round) values = to_bfloat16(values);
        values = _mm256_mul_ps(values, load(weight + i, count - i));
        if (round) values = to_bfloat16(values);
        store(out + i, values, count - i);
    }
}

// The largest magnitude as the bits of a float: as integers magnitudes are in the order of their values, infinities and NaN above all.
inline int largest_bits(const float *x, std::size_t count) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (std::size_t i = 0; i < count; i += kLanes) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(load(x + i, count - i)), magnitude));
    }
    int parts[kLanes], result = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(parts), largest);
    for (int part : parts) result = part > result ? part : result;
    return result;
}

std::int32_t quantize(const float *x, std::size_t count, std::size_t padded, float range, float static_scale, std::int8_t *codes,
                      float *scale) {
    const int bits = largest_bits(x, count);
    if (count < padded || bits >= kInfinity) {
        for (std::size_t i = 0; i < padded; ++i) codes[i] = 0;
    }
    if (bits >= kInfinity) {
        *scale = __builtin_nanf("");
        return 0;
    }
    float step = static_scale;
    if (step == 0) {
        float largest;
        __builtin_memcpy(&largest, &bits, sizeof largest);
        step = largest / range;
        step = bits == 0 ? 1.0f : step < kSmallest ? kSmallest : step;
    }
    *scale = step;
    const __m256 steps = _mm256_set1_ps(step), low = _mm256_set1_ps(-128.0f), high = _mm256_set1_ps(127.0f);
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1,
                                           -1, -1, -1, -1, -1, -1, -1);
    __m256i sum = _mm256_setzero_si256();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __m256 values = _mm256_min_ps(_mm256_max_ps(_mm256_div_ps(load(x + i, count - i), steps), low), high);
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        sum = _mm256_add_epi32(sum, rounded);
        const __m256i packed = _mm256_shuffle_epi8(rounded, bytes);
        const std::uint32_t halves[2] = {std::uint32_t(_mm256_extract_epi32(packed, 0)), std::uint32_t(_mm256_extract_epi32(packed, 4))};
        const std::size_t left = count - i;
        __builtin_memcpy(codes + i, halves, left < kLanes ? left : kLanes);
    }
    int parts[kLanes], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(parts), sum);
    for (int part : parts) total += part;
    return total;
}

} // namespace

const RowKernels &row_kernels_avx2() {
    static constexpr RowKernels kernels{"avx2", widen, sum_of_squares, normalize, quantize};
    return kernels;
}

} // namespace fewbit
