// Memory for packed weights, in huge pages.
//
// At one token every weight is read once per step, from end to end. With pages of 4 KiB a part of the time goes into looking up addresses,
// and prefetchers stop at the end of each page. The system gives pages of 2 MiB only where 2 MiB lie in one piece and on their boundary,
// which a weight of some megabytes from the usual allocator is at most in its middle, and a small one nowhere. So weights are laid one behind
// the other in large reservations; only what is written becomes resident.

#pragma once

#include <cstddef>
#include <memory>

namespace fewbit {

// `bytes` of memory with zeros in them, aligned to a cache line; given back when the last owner is gone. Throws std::bad_alloc.
std::shared_ptr<void> weight_memory(std::size_t bytes);

} // namespace fewbit
