// Several products one after the other, as a decode step has them: one `run` of the pool, a barrier between two products.

#pragma once

#include "linear.hpp"
#include "prepare.hpp"

#include <vector>

namespace fewbit {

// y[i][m, n] = sum_k x[m, k] * W_i[n, k] for each linear, all with x.columns columns; the inputs are prepared anew for each. y[i]: float32
// [x.rows, out_features of linear i], contiguous.
void multiply_in_turn(const std::vector<const Linear *> &linears, const Rows &x, const std::vector<float *> &y);

} // namespace fewbit
