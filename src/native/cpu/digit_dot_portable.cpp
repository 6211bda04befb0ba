// digit_dot.hpp in plain C++, for every processor.

#include "digit_dot.hpp"

#include <cstring>

namespace fewbit {
namespace {

#include "byte_vectors_portable.inc"

#include "digit_dot.inc"

} // namespace

void multiply_digits_portable(const DigitWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    multiply_digits(weight, x, y, y_stride, begin, end);
}

} // namespace fewbit
