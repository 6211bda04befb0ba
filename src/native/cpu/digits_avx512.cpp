// Inputs in digits for avx512; see digits.hpp.
#include "digits.hpp"

namespace fewbit::avx512 {
namespace {

#define FEWBIT_LANES 16
#include "engine/simd.inc"

#include "digits.inc"

} // namespace

extern const SplitDigits kSplitDigits = split_into_digits;

} // namespace fewbit::avx512
