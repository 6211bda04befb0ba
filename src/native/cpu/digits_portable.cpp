// Inputs in digits for portable; see digits.hpp.
#include "digits.hpp"

namespace fewbit::portable {
namespace {

#define FEWBIT_LANES 4
#include "engine/simd.inc"

#include "digits.inc"

} // namespace

extern const SplitDigits kSplitDigits = split_into_digits;

} // namespace fewbit::portable
