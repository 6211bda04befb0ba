// DRAM read bandwidth of this machine. See read_bandwidth.cpp.
#pragma once

#include <cstddef>
#include <vector>

namespace fewbit {

// The widest read loop that this CPU runs: "avx512", "avx2" or "portable".
const char *instruction_set();

// How a pass reads: bytes that are prefetched ahead (0: no software prefetch), and streams that each thread reads side by side.
struct ReadLoopKind {
    std::size_t distance, streams;
};

// The loops that this CPU runs.
std::vector<ReadLoopKind> read_loops();

// A buffer that stays, for passes that take turns with the passes of something else.
class ReadBuffer {
  public:
    // Each of `threads` threads writes, and later reads, its own contiguous part. Throws std::invalid_argument for sizes that make no sense
    // and std::bad_alloc when the memory cannot be had.
    ReadBuffer(std::size_t bytes, int threads, bool huge_pages);
    ~ReadBuffer();
    ReadBuffer(const ReadBuffer &) = delete;
    ReadBuffer &operator=(const ReadBuffer &) = delete;

    std::size_t bytes() const { return part_ * threads_; } // what was asked for, rounded down to 2 MiB per thread
    double read(ReadLoopKind kind);                         // one pass; seconds from the first load of any thread to the last one

  private:
    char *memory_ = nullptr;
    std::size_t part_ = 0;
    int threads_;
};

// Reads a buffer of `bytes` over and over with `threads` threads for about `seconds` seconds (at least one pass for each of
// read_loops()) and returns the best pass in 1e9 bytes per second. Throws std::invalid_argument for sizes that make no sense and
// std::bad_alloc when the buffer cannot be had.
double read_bandwidth(std::size_t bytes, int threads, double seconds);

} // namespace fewbit
