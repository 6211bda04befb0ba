// The engine's kernels for every CPU; see kernels.hpp.
#include "kernels.hpp"

namespace fewbit::engine::portable {
namespace {

#define FEWBIT_LANES 4
#define FEWBIT_ROW_TILE 2
#include "simd.inc"

#include "elementwise.inc"

#include "kv_head.inc"

#include "attention.inc"

}  // namespace

extern const Kernels kKernels = {"portable", embed_bf16, rms_norm, rotate, finish, add, silu_multiply,
                                 argmax, put_window, put_history, retire, attend};

}  // namespace fewbit::engine::portable
