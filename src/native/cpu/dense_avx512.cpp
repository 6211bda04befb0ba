// Weights in high precision for avx512; see dense.hpp.
#include "dense.hpp"

#include <utility>

namespace fewbit::avx512 {
namespace {

#define FEWBIT_LANES 16
#define FEWBIT_TOKENS 12
#define FEWBIT_ROWS 8
#include "engine/simd.inc"

#include "panel.inc"

#include "dense.inc"

} // namespace

extern const DenseMultiply kDenseMultiply = dense_multiply;

} // namespace fewbit::avx512
