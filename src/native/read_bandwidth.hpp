// DRAM read bandwidth of this machine. See read_bandwidth.cpp.
#pragma once

#include <cstddef>

namespace fewbit {

// The widest read loop that this CPU runs: "avx512", "avx2" or "portable".
const char *instruction_set();

// Reads a buffer of `bytes` over and over with `threads` threads for about `seconds` seconds (at least one pass for each prefetch
// distance) and returns the best pass in 1e9 bytes per second. Throws std::invalid_argument for sizes that make no sense and
// std::bad_alloc when the buffer cannot be had.
double read_bandwidth(std::size_t bytes, int threads, double seconds);

} // namespace fewbit
