// Weights in high precision for neon; see dense.hpp.
#include "dense.hpp"

#include <utility>

namespace fewbit::neon {
namespace {

#define FEWBIT_LANES 4
#define FEWBIT_TOKENS 10
#define FEWBIT_ROWS 4
#include "engine/simd.inc"

#include "panel.inc"

#include "dense.inc"

} // namespace

extern const DenseMultiply kDenseMultiply = dense_multiply;

} // namespace fewbit::neon
