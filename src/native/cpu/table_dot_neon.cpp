// Weights in tables and FP8 for neon; see table_dot.hpp.
#include "table_dot.hpp"

#include <arm_neon.h>
#include <utility>

namespace fewbit::neon {
namespace {

#define FEWBIT_NEON
#define FEWBIT_LANES 4
#define FEWBIT_TOKENS 10
#define FEWBIT_VECTORS 4
#include "engine/simd.inc"

#include "panel.inc"

#include "table_vectors.inc"

#include "table_dot.inc"

} // namespace

extern const TableMultiply kTableMultiply = table_multiply;

} // namespace fewbit::neon
