// row_kernels.hpp for NEON.
#include "row_kernels.hpp"

#include <arm_neon.h>
#include <utility>

namespace fewbit {
namespace {

#define FEWBIT_LANES 4
#include "engine/simd.inc"

inline vf multiply_add(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }

#include "row_kernels.inc"

} // namespace

const RowKernels &row_kernels_neon() {
    static constexpr RowKernels kernels{"neon", widen, sum_of_squares, normalize, quantize};
    return kernels;
}

} // namespace fewbit
