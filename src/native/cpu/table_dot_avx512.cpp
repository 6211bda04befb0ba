// Weights in tables and FP8 for avx512; see table_dot.hpp.
#include "table_dot.hpp"

#include <utility>
#include <immintrin.h>

namespace fewbit::avx512 {
namespace {

#define FEWBIT_LANES 16
#define FEWBIT_TOKENS 12
#define FEWBIT_VECTORS 4
#include "engine/simd.inc"

#include "panel.inc"

#include "table_vectors.inc"

#include "table_dot.inc"

} // namespace

extern const TableMultiply kTableMultiply = table_multiply;

} // namespace fewbit::avx512
