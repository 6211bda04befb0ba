#pragma once

#include <cstddef>

namespace fewbit {

// Asks the system to back memory that is already filled with huge pages. Weights are read from end to end in every pass, and with pages of
// 4 KiB a part of the bandwidth goes into looking up addresses. What cannot be had is left as it is.
void use_huge_pages(const void *data, std::size_t bytes);

} // namespace fewbit
