#include "kernels.hpp"

namespace fewbit::engine {

const Kernels &kernels() {
#if defined(FEWBIT_X86)
    static const Kernels &chosen = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                                       ? avx512::kKernels
                                   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::kKernels
                                                                                                      : portable::kKernels;
    return chosen;
#else
    return portable::kKernels;
#endif
}

}  // namespace fewbit::engine
