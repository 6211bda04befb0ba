// row_kernels.hpp for AVX2.
#include "row_kernels.hpp"

#include <immintrin.h>
#include <utility>

namespace fewbit {
namespace {

#define FEWBIT_LANES 8
#include "engine/simd.inc"

inline vf multiply_add(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

#include "row_kernels.inc"

} // namespace

const RowKernels &row_kernels_avx2() {
    static constexpr RowKernels kernels{"avx2", widen, sum_of_squares, normalize, quantize};
    return kernels;
}

} // namespace fewbit
