// The engine's kernels for avx512; see kernels.hpp.
#include "kernels.hpp"

namespace fewbit::engine::avx512 {
namespace {

#define FEWBIT_LANES 16
#define FEWBIT_ROW_TILE 6
#include "simd.inc"

#include "elementwise.inc"

#include "kv_head.inc"

#include "attention.inc"

}  // namespace

extern const Kernels kKernels = {"avx512", embed_bf16, rms_norm, rotate, finish, add, silu_multiply,
                                 argmax, put_window, put_history, retire, attend};

}  // namespace fewbit::engine::avx512
