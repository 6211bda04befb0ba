#include "kernels.hpp"

#include "../cpu_features.hpp"

namespace fewbit::engine {

const Kernels &kernels() {
#if defined(FEWBIT_X86)
    static const Kernels &chosen = cpu_features().avx512 ? avx512::kKernels : cpu_features().avx2 ? avx2::kKernels : portable::kKernels;
    return chosen;
#else
    return portable::kKernels;
#endif
}

}  // namespace fewbit::engine
