// DRAM read bandwidth: the ceiling that decoding is measured against.
//
// At batch 1 every weight is read once per token, so no kernel decodes faster than memory delivers the weights. What "as fast as memory
// delivers" means on this machine, in this hour, with this many threads, is measured here by the simplest thing that can reach it:
//
//   * The buffer is far larger than the last-level cache, so that each pass comes from DRAM.
//   * Each thread reads its own contiguous part, which it has written first, so that on a NUMA machine the pages lie beside it.
//   * The loop does nothing but load: 512 bytes per turn into independent accumulators joined by xor, which costs less than the loads.
//   * Some CPUs need software prefetch to keep enough lines in flight, others are slowed down by it. Some prefetch better along several
//     streams than along one. Passes take the loops of `read_loops` in turn, and the best pass counts: everything that disturbs a pass
//     only makes it slower.
//   * Huge pages spare most TLB misses. read_bandwidth asks for them; a ReadBuffer can be had without, to see what they bring.
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
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
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
constexpr std::size_t kStreams = 4;                         // of the loops with several streams
// Prefetch distance in bytes (0: none) and streams per thread.
constexpr ReadLoopKind kLoops[] = {{0, 1}, {1024, 1}, {2048, 1}, {4096, 1}, {0, kStreams}, {1024, kStreams}};

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

// Four streams, each over a quarter of [data, data + bytes), 128 bytes of each per turn; bytes a multiple of 4 * kBlock.
__attribute__((target("avx512f"))) std::uint64_t read_avx512_streams(const char *data, std::size_t bytes, std::size_t distance) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    const std::size_t part = bytes / kStreams;
    for (std::size_t at = 0; at < part; at += 2 * kLine) {
        const char *p = data + at, *q = p + part, *r = q + part, *s = r + part;
        if (distance != 0) {
            for (const char *stream : {p, q, r, s}) {
                __builtin_prefetch(stream + distance, 0, 0);
                __builtin_prefetch(stream + distance + kLine, 0, 0);
            }
        }
        a = _mm512_xor_si512(a, _mm512_xor_si512(_mm512_load_si512(p), _mm512_load_si512(p + 64)));
        b = _mm512_xor_si512(b, _mm512_xor_si512(_mm512_load_si512(q), _mm512_load_si512(q + 64)));
        c = _mm512_xor_si512(c, _mm512_xor_si512(_mm512_load_si512(r), _mm512_load_si512(r + 64)));
        d = _mm512_xor_si512(d, _mm512_xor_si512(_mm512_load_si512(s), _mm512_load_si512(s + 64)));
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
    ReadLoop streams; // the loop over several streams; null where there is none
};

Loop widest_loop() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {"avx512", read_avx512, read_avx512_streams};
    if (__builtin_cpu_supports("avx2")) return {"avx2", read_avx2, nullptr};
#endif
    return {"portable", read_portable, nullptr};
}

// Puts the calling thread on one of the cores that the process may use. The system balances threads too slowly for passes of some
// milliseconds: two of them on one core would read at half speed.
void pin(int index) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) == 0) return;
    index %= CPU_COUNT(&allowed);
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (!CPU_ISSET(core, &allowed) || index-- != 0) continue;
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        (void)sched_setaffinity(0, sizeof one, &one); // 0: the calling thread; refused, it runs where the system puts it
        return;
    }
#else
    (void)index;
#endif
}

// Runs work(0) .. work(threads - 1) at the same time, each on a core of its own where there are enough, and waits for all of them.
template <typename Work> void in_parallel(int threads, Work work) {
    std::vector<std::thread> pool;
    pool.reserve(threads);
    for (int i = 0; i < threads; ++i) {
        pool.emplace_back([&work, i] {
            pin(i);
            work(i);
        });
    }
    for (std::thread &thread : pool) thread.join();
}

} // namespace

const char *instruction_set() { return widest_loop().name; }

std::vector<ReadLoopKind> read_loops() {
    std::vector<ReadLoopKind> kinds;
    for (const ReadLoopKind &kind : kLoops) {
        if (kind.streams == 1 || widest_loop().streams != nullptr) kinds.push_back(kind);
    }
    return kinds;
}

ReadBuffer::ReadBuffer(std::size_t bytes, int threads, bool huge_pages) : threads_(threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    // Every part is a whole number of huge pages: aligned for the widest loads, and no page is shared by two threads.
    part_ = bytes / threads / kHugePage * kHugePage;
    if (part_ == 0) throw std::invalid_argument("bytes must be at least 2 MiB per thread");
    memory_ = static_cast<char *>(std::aligned_alloc(kHugePage, part_ * threads));
    if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    // A kernel that refuses only makes the figure a little lower.
    (void)madvise(memory_, part_ * threads, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void)huge_pages;
#endif
    in_parallel(threads, [&](int i) { std::memset(memory_ + part_ * i, i + 1, part_); });
}

ReadBuffer::~ReadBuffer() { std::free(memory_); }

double ReadBuffer::read(ReadLoopKind kind) {
    const Loop loop = widest_loop();
    if (kind.streams != 1 && (kind.streams != kStreams || loop.streams == nullptr)) {
        throw std::invalid_argument("no read loop with so many streams; see read_loops()");
    }
    const ReadLoop read = kind.streams == 1 ? loop.read : loop.streams;
    std::vector<Clock::time_point> begin(threads_), end(threads_);
    std::atomic<std::uint64_t> sink{0}; // keeps the loads alive
    in_parallel(threads_, [&](int i) {
        begin[i] = Clock::now();
        sink ^= read(memory_ + part_ * i, part_, kind.distance);
        end[i] = Clock::now();
    });
    const std::chrono::duration<double> time = *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
    return time.count();
}

double read_bandwidth(std::size_t bytes, int threads, double seconds) {
    if (!(seconds >= 0)) throw std::invalid_argument("seconds must not be negative");
    ReadBuffer buffer(bytes, threads, true);
    const std::vector<ReadLoopKind> kinds = read_loops();
    const Clock::time_point deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    double best = 0;
    for (std::size_t pass = 0; pass < kinds.size() || Clock::now() < deadline; ++pass) {
        best = std::max(best, static_cast<double>(buffer.bytes()) / buffer.read(kinds[pass % kinds.size()]) * 1e-9);
    }
    return best;
}

} // namespace fewbit
