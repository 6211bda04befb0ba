#include "thread_pool.hpp"

#include <chrono>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewbit {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough for the gap between two products of a layer, short enough that an idle process costs nothing.
constexpr std::chrono::microseconds kSpin{20};
constexpr int kYields = 20;
constexpr std::size_t kMostThreads = 1024;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::size_t default_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::size_t(CPU_COUNT(&set));
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count == 0 ? 1 : count;
}

std::mutex &pool_mutex() {
    static std::mutex *mutex = new std::mutex; // never destroyed: threads may outlive static objects
    return *mutex;
}

std::atomic<ThreadPool *> current{nullptr};

// In a forked child the workers do not exist; the parent's pool object is left alone there and a new one made at the next call.
void forget_after_fork() {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
#endif
}

} // namespace

void ThreadPool::Signal::wait_past(std::uint64_t seen) {
    const Clock::time_point until = Clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            if (value.load(std::memory_order_acquire) != seen) return;
            relax();
        }
    } while (Clock::now() < until);
    for (int i = 0; i < kYields; ++i) {
        if (value.load(std::memory_order_acquire) != seen) return;
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);
    changed.wait(lock, [&] { return value.load() != seen; });
    sleepers.fetch_sub(1);
}

void ThreadPool::Signal::raise(std::uint64_t to) {
    value.store(to); // sequentially consistent, as are the sleepers' steps: one of the two sides sees the other
    if (sleepers.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex); }
    changed.notify_all();
}

ThreadPool::ThreadPool(std::size_t threads) : threads_(threads) {
    for (std::size_t thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
    entry_ = nullptr;
    started_.raise(started_.value.load() + 1);
    for (std::thread &worker : workers_) worker.join();
}

void ThreadPool::work(std::size_t thread) {
    for (std::uint64_t seen = 0;; ++seen) {
        started_.wait_past(seen);
        if (entry_ == nullptr) return;
        entry_(context_, thread);
        barrier(thread);
    }
}

void ThreadPool::run_erased(Entry entry, void *context) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    if (threads_ == 1) {
        entry(context, 0);
        return;
    }
    entry_ = entry;
    context_ = context;
    started_.raise(started_.value.load(std::memory_order_relaxed) + 1);
    entry(context, 0);
    barrier(0);
}

void ThreadPool::barrier(std::size_t) {
    if (threads_ == 1) return;
    const std::uint64_t round = passed_.value.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.raise(round + 1);
    } else {
        passed_.wait_past(round);
    }
}

ThreadPool &pool() {
    ThreadPool *found = current.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    std::lock_guard<std::mutex> lock(pool_mutex());
    if (current.load() == nullptr) {
        forget_after_fork();
        current.store(new ThreadPool(default_threads()));
    }
    return *current.load();
}

std::size_t threads() { return pool().threads(); }

void set_threads(std::size_t threads) {
    if (threads < 1 || threads > kMostThreads) throw std::invalid_argument("threads must be 1 to 1024");
    if (pool().threads() == threads) return;
    std::lock_guard<std::mutex> lock(pool_mutex());
    delete current.exchange(nullptr);
    current.store(new ThreadPool(threads));
}

} // namespace fewbit
