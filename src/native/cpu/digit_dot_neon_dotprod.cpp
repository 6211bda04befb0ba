// digit_dot.hpp for NEON with dot products of bytes (FEAT_DotProd).

#include "digit_dot.hpp"

#include <arm_neon.h>
#include <cstring>

namespace fewbit {
namespace {

#include "neon_dot.inc"

#include "byte_vectors_neon.inc"

#include "digit_dot.inc"

} // namespace

void multiply_digits_neon_dotprod(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    multiply_digits(weight, x, y, y_stride, begin, end);
}

} // namespace fewbit
