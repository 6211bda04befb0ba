// Inputs in digits for avx2; see digits.hpp.
#include "digits.hpp"

namespace fewbit::avx2 {
namespace {

#define FEWBIT_LANES 8
#include "engine/simd.inc"

#include "digits.inc"

} // namespace

extern const SplitDigits kSplitDigits = split_into_digits;

} // namespace fewbit::avx2
