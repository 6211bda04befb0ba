#include "digits.hpp"

#include "dense.hpp"

namespace fewbit {

SplitDigits split_digits() {
#if defined(FEWBIT_X86)
    static const std::string best = float_instruction_sets().front();
    if (best == "avx512") return avx512::kSplitDigits;
    if (best == "avx2") return avx2::kSplitDigits;
#endif
    return portable::kSplitDigits;
}

} // namespace fewbit
