// The inner loops of prepare.hpp, one set per instruction set. Plain data only, as in linear.hpp.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

struct RowKernels {
    const char *name;
    // BF16 to float32.
    void (*widen)(const std::uint16_t *in, float *out, std::size_t count);
    // Sum of squares in float32, by several partial sums.
    float (*sum_of_squares)(const float *x, std::size_t count);
    // out = x * factor * weight; with `round` each of the two products rounded to BF16.
    void (*normalize)(const float *x, const float *weight, float factor, bool round, float *out, std::size_t count);
    // One group: codes [padded], zeros behind `count`. Returns the sum of the codes and writes the scale; see prepare.hpp.
    std::int32_t (*quantize)(const float *x, std::size_t count, std::size_t padded, float range, float static_scale, std::int8_t *codes,
                             float *scale);
};

const RowKernels &row_kernels_portable();
#if defined(__x86_64__)
const RowKernels &row_kernels_avx2();
const RowKernels &row_kernels_avx512();
#elif defined(__aarch64__)
const RowKernels &row_kernels_neon();
#endif

} // namespace fewbit
