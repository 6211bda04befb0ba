// One linear layer on all threads, for callers that hand over and get back whole tensors (Python).

#pragma once

#include "linear.hpp"
#include "prepare.hpp"

namespace fewbit {

// y[m, n] = sum_k x[m, k] * W[n, k] + bias[n], rounded to y's type.
//
// x: [rows, in_features]. y: [rows, out_features], rows y_stride elements apart. bias: float32 [out_features] or null.
void apply(const Linear &linear, const Rows &x, void *y, Type y_type, std::size_t y_stride, const float *bias);

} // namespace fewbit
