// Weights in BF16 or float32 as they come, row after row: what the instruction sets implement, as plain data, and the Linear over it.
//
//     y[m, n] = sum_k x[m, k] * W[n, k]            x in float32; BF16 weights are widened in registers; sums in float32
//
// Few tokens are bound by memory: several rows of the weight times all tokens, as dot products along the columns, each weight read once.
// Many tokens are bound by the multiply-adds: a panel of the weight is widened and transposed into the L2 cache, and every token that passes
// meets two vectors of outputs (dense.inc has the details).
//
// Nothing is repacked, so that a tied embedding and lm_head stay one tensor, and loading a BF16 model costs no second copy.

#pragma once

#include "linear.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace fewbit {

struct DenseWeight {
    const void *data = nullptr;
    bool bfloat16 = false;
    std::size_t in = 0, stride = 0; // rows are `stride` elements apart
};

// As Linear::multiply, for any begin and end.
using DenseMultiply = void (*)(const DenseWeight &weight, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end);

namespace portable { extern const DenseMultiply kDenseMultiply; }
#if defined(FEWBIT_X86)
namespace avx2 { extern const DenseMultiply kDenseMultiply; }
namespace avx512 { extern const DenseMultiply kDenseMultiply; }
#elif defined(FEWBIT_ARM)
namespace neon { extern const DenseMultiply kDenseMultiply; }
#endif

// `avx512`, `avx2`, `neon`, `portable`: those that this CPU runs, the best first.
std::vector<std::string> float_instruction_sets();

// Throws std::invalid_argument: an instruction set that this CPU lacks.
std::unique_ptr<Linear> make_dense_linear(const DenseWeight &weight, std::size_t out_features, const std::string &instruction_set);

} // namespace fewbit
