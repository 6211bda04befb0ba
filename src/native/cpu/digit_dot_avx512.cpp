// digit_dot.hpp for AVX-512 with VNNI.

#include "digit_dot.hpp"

#include <cstring>
#include <immintrin.h>

namespace fewbit {
namespace {

#include "byte_vectors_avx512.inc"

#include "digit_dot.inc"

} // namespace

void multiply_digits_avx512(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    multiply_digits(weight, x, y, y_stride, begin, end);
}

} // namespace fewbit
