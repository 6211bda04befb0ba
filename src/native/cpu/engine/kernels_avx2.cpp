// The engine's kernels for avx2; see kernels.hpp.
#include "kernels.hpp"

namespace fewbit::engine::avx2 {
namespace {

#define FEWBIT_LANES 8
#define FEWBIT_ROW_TILE 4
#include "simd.inc"

#include "elementwise.inc"

#include "kv_head.inc"

#include "attention.inc"

}  // namespace

extern const Kernels kKernels = {"avx2", embed_bf16, rms_norm, rotate, finish, add, silu_multiply,
                                 argmax, put_window, put_history, retire, attend};

}  // namespace fewbit::engine::avx2
