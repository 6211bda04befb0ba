// row_kernels.hpp for AVX-512: the portable loops sixteen values at a time, with the same results to the last bit.
//
// This file is compiled for AVX-512 and may only run where it is there: no inline function of another header, nothing of the standard library.

#include "row_kernels.hpp"

#include <immintrin.h>

namespace fewbit {
namespace {

constexpr std::size_t kLanes = 16;
constexpr float kSmallest = 0x1p-126f; // scales are normal numbers
constexpr int kInfinity = 0x7f800000;

inline __mmask16 first_lanes(std::size_t count) { return count >= kLanes ? 0xffff : __mmask16((1u << count) - 1); }

inline __m512 to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i cut = _mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000)));
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(cut), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

void widen(const std::uint16_t *in, float *out, std::size_t count) {
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, in + i)), 16);
        _mm512_mask_storeu_ps(out + i, lanes, _mm512_castsi512_ps(bits));
    }
}

float sum_of_squares(const float *x, std::size_t count) {
    __m512 sums = _mm512_setzero_ps();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(first_lanes(count - i), x + i);
        sums = _mm512_add_ps(sums, _mm512_mul_ps(values, values));
    }
    float parts[kLanes], sum = 0;
    _mm512_storeu_ps(parts, sums);
    for (std::size_t i = 0; i < kLanes; ++i) sum += parts[i];
    return sum;
}

void normalize(const float *x, const float *weight, float factor, bool round, float *out, std::size_t count) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factors);
        if (round) values = to_bfloat16(values);
        values = _mm512_mul_ps(values, _mm512_maskz_loadu_ps(lanes, weight + i));
        if (round) values = to_bfloat16(values);
        _mm512_mask_storeu_ps(out + i, lanes, values);
    }
}

// The largest magnitude as the bits of a float: as integers magnitudes are in the order of their values, infinities and NaN above all.
inline int largest_bits(const float *x, std::size_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(first_lanes(count - i), x + i);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(values), magnitude));
    }
    return _mm512_reduce_max_epi32(largest);
}

// x / step, rounded as a division rounds (Markstein, IBM J. R&D 34, 1990): the product with the reciprocal, and what it leaves over once more.
// Three instructions where a division of sixteen values takes sixteen cycles. The remainder must be no subnormal and the quotient finite.
inline __m512 quotient(__m512 x, __m512 step, __m512 reciprocal) {
    const __m512 about = _mm512_mul_ps(x, reciprocal);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(about, step, x), reciprocal, about);
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
    const bool divides = static_scale != 0 || step < 0x1p-90f || step > 0x1p90f;
    const __m512 steps = _mm512_set1_ps(step), reciprocal = _mm512_set1_ps(1.0f / step);
    const __m512 low = _mm512_set1_ps(-128.0f), high = _mm512_set1_ps(127.0f);
    __m512i sum = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 some = _mm512_maskz_loadu_ps(lanes, x + i);
        const __m512 values = divides ? _mm512_div_ps(some, steps) : quotient(some, steps, reciprocal);
        const __m512i rounded = _mm512_cvt_roundps_epi32(_mm512_min_ps(_mm512_max_ps(values, low), high),
                                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        sum = _mm512_add_epi32(sum, rounded);
        _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, rounded);
    }
    return _mm512_reduce_add_epi32(sum);
}

} // namespace

const RowKernels &row_kernels_avx512() {
    static constexpr RowKernels kernels{"avx512", widen, sum_of_squares, normalize, quantize};
    return kernels;
}

} // namespace fewbit
