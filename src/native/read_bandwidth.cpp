// DRAM read bandwidth: the ceiling that decoding is measured against.
//
// At batch 1 every weight is read once per token, so no kernel decodes faster than memory delivers the weights. What "as fast as memory
// delivers" means on this machine, in this hour, with this many threads, is measured here by the simplest thing that can reach it:
//
//   * The buffer is far larger than the last-level cache, so that each pass comes from DRAM.
//   * Each thread reads its own contiguous part, which it has written first, so that on a NUMA machine the pages lie beside it.
//   * The loop does nothing but load: 512 bytes per turn into independent accumulators joined by xor, which costs less than the loads.
//   * Some CPUs need software prefetch to keep enough lines in flight, others are slowed down by it. Passes take the distances
//     in turn, and the best pass counts: everything that disturbs a pass only makes it slower.
//   * A pass lasts from the first thread's first load to the last thread's last load. Starting the threads is not in it.
//
// The instruction set is chosen at run time; the file is compiled for the baseline of the architecture.

#include "read_bandwidth.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kBlock = 512;                         // bytes per turn of a loop, eight cache lines of 64
constexpr std::size_t kLine = 64;                           // granularity of prefetch
constexpr std::size_t kHugePage = std::size_t{2} << 20;     // alignment, so that the kernel can back the buffer with 2 MiB pages
constexpr std::size_t kDistances[] = {0, 1024, 2048, 4096}; // prefetch distances in bytes; 0: none

// Reads [data, data + bytes), bytes a multiple of kBlock; prefetches `distance` bytes ahead. The result depends on every byte.
using ReadLoop = std::uint64_t (*)(const char *data, std::size_t bytes, std::size_t distance);

inline void prefetch_block(const char *address) {
    for (std::size_t line = 0; line < kBlock; line += kLine) __builtin_prefetch(address + line, 0, 0);
}

std::uint64_t read_portable(const char *data, std::size_t bytes, std::size_t distance) {
    std::uint64_t sums[kBlock / 8] = {};
    for (std::size_t at = 0; at < bytes; at += kBlock) {
        if (distance != 0) prefetch_block(data + at + distance);
        std::uint64_t words[kBlock / 8];
        std::memcpy(words, data + at, kBlock);
        for (std::size_t i = 0; i < kBlock / 8; ++i) sums[i] ^= words[i];
    }
    std::uint64_t sum = 0;
    for (std::uint64_t word : sums) sum ^= word;
    return sum;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) std::uint64_t read_avx2(const char *data, std::size_t bytes, std::size_t distance) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (std::size_t at = 0; at < bytes; at += kBlock) {
        if (distance != 0) prefetch_block(data + at + distance);
        const __m256i *p = reinterpret_cast<const __m256i *>(data + at);
        for (int i = 0; i < 16; i += 4) { // 16 x 32 bytes; the compiler unrolls it
            a = _mm256_xor_si256(a, _mm256_load_si256(p + i));
            b = _mm256_xor_si256(b, _mm256_load_si256(p + i + 1));
            c = _mm256_xor_si256(c, _mm256_load_si256(p + i + 2));
            d = _mm256_xor_si256(d, _mm256_load_si256(p + i + 3));
        }
    }
    alignas(32) std::uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i *>(words), _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d)));
    return words[0] ^ words[1] ^ words[2] ^ words[3];
}

__attribute__((target("avx512f"))) std::uint64_t read_avx512(const char *data, std::size_t bytes, std::size_t distance) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (std::size_t at = 0; at < bytes; at += kBlock) {
        if (distance != 0) prefetch_block(data + at + distance);
        const char *p = data + at;
        a = _mm512_xor_si512(a, _mm512_load_si512(p));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(p + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(p + 192));
        a = _mm512_xor_si512(a, _mm512_load_si512(p + 256));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + 320));
        c = _mm512_xor_si512(c, _mm512_load_si512(p + 384));
        d = _mm512_xor_si512(d, _mm512_load_si512(p + 448));
    }
    alignas(64) std::uint64_t words[8];
    _mm512_store_si512(words, _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
    std::uint64_t sum = 0;
    for (std::uint64_t word : words) sum ^= word;
    return sum;
}

#endif

struct Loop {
    const char *name;
    ReadLoop read;
};

Loop widest_loop() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {"avx512", read_avx512};
    if (__builtin_cpu_supports("avx2")) return {"avx2", read_avx2};
#endif
    return {"portable", read_portable};
}

struct Free {
    void operator()(char *memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(std::size_t bytes) {
    Buffer buffer(static_cast<char *>(std::aligned_alloc(kHugePage, bytes)));
    if (!buffer) throw std::bad_alloc();
#if defined(__linux__)
    // Huge pages spare most TLB misses. A kernel that refuses only makes the figure a little lower.
    (void)madvise(buffer.get(), bytes, MADV_HUGEPAGE);
#endif
    return buffer;
}

// Runs work(0) .. work(threads - 1) at the same time and waits for all of them.
template <typename Work> void in_parallel(int threads, Work work) {
    std::vector<std::thread> pool;
    pool.reserve(threads);
    for (int i = 0; i < threads; ++i) pool.emplace_back(work, i);
    for (std::thread &thread : pool) thread.join();
}

} // namespace

const char *instruction_set() { return widest_loop().name; }

double read_bandwidth(std::size_t bytes, int threads, double seconds) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    if (!(seconds >= 0)) throw std::invalid_argument("seconds must not be negative");
    // Every part is a whole number of huge pages: aligned for the widest loads, and no page is shared by two threads.
    const std::size_t part = bytes / threads / kHugePage * kHugePage;
    if (part == 0) throw std::invalid_argument("bytes must be at least 2 MiB per thread");

    const ReadLoop read = widest_loop().read;
    const Buffer buffer = allocate(part * threads);
    in_parallel(threads, [&](int i) { std::memset(buffer.get() + part * i, i + 1, part); });

    std::atomic<std::uint64_t> sink{0}; // keeps the loads alive
    double best = 0;
    const Clock::time_point deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    const int at_least = sizeof kDistances / sizeof kDistances[0];
    for (int pass = 0; pass < at_least || Clock::now() < deadline; ++pass) {
        const std::size_t distance = kDistances[pass % at_least];
        std::vector<Clock::time_point> begin(threads), end(threads);
        in_parallel(threads, [&](int i) {
            begin[i] = Clock::now();
            sink ^= read(buffer.get() + part * i, part, distance);
            end[i] = Clock::now();
        });
        const std::chrono::duration<double> time =
            *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
        best = std::max(best, static_cast<double>(part) * threads / time.count() * 1e-9);
    }
    return best;
}

} // namespace fewbit
