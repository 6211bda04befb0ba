// Weights in tables and FP8 for portable; see table_dot.hpp.
#include "table_dot.hpp"

#include <utility>

namespace fewbit::portable {
namespace {

#define FEWBIT_LANES 4
#define FEWBIT_TOKENS 6
#define FEWBIT_VECTORS 2
#include "engine/simd.inc"

#include "panel.inc"

#include "table_vectors.inc"

#include "table_dot.inc"

} // namespace

extern const TableMultiply kTableMultiply = table_multiply;

} // namespace fewbit::portable
