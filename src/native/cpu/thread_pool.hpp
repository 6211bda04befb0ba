// The threads that every CPU kernel of fewbit runs on.
//
// A decode step is some hundred small products, each tens to hundreds of microseconds long: starting threads for each would cost as much as
// the work. So the threads are there once, and a step is one `run` with barriers inside:
//
//     pool().run([&](std::size_t thread) { ...; pool.barrier(thread); ... });
//
// torch has threads of its own (OpenMP). Both stay out of each other's way because neither keeps a core busy when it has nothing to do:
// workers wait for the next `run` a few microseconds and then sleep, and `threads()` follows torch's count (Python sets it).

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace fewbit {

class ThreadPool {
  public:
    // `threads` counts the caller of `run`, which is thread 0.
    explicit ThreadPool(std::size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    std::size_t threads() const { return threads_; }

    // Calls work(thread) on every thread and returns when all have finished. `work` does not throw and does not call `run`; of several callers
    // one runs at a time.
    template <typename Work> void run(Work &&work) {
        using Plain = std::remove_reference_t<Work>;
        run_erased([](void *context, std::size_t thread) { (*static_cast<Plain *>(context))(thread); }, &work);
    }

    // Inside `run`: returns when every thread has called it. What a thread wrote before it, every thread sees after it.
    void barrier(std::size_t thread);

  private:
    using Entry = void (*)(void *context, std::size_t thread);

    void run_erased(Entry entry, void *context);
    void work(std::size_t thread);

    // A counter that some threads wait for and one raises. Waiting spins, then yields, then sleeps.
    struct Signal {
        std::atomic<std::uint64_t> value{0};
        std::atomic<int> sleepers{0};
        std::mutex mutex;
        std::condition_variable changed;

        void wait_past(std::uint64_t seen);
        void raise(std::uint64_t to);
    };

    const std::size_t threads_;
    std::vector<std::thread> workers_;
    std::mutex callers_;
    Entry entry_ = nullptr; // null: end
    void *context_ = nullptr;
    Signal started_;
    alignas(64) std::atomic<std::size_t> arrived_{0};
    Signal passed_;
};

// The process's pool; made at the first call, made again in a forked child.
ThreadPool &pool();

std::size_t threads();

// Replaces the pool. 1 to 1024; throws std::invalid_argument otherwise.
void set_threads(std::size_t threads);

// Work in ranges that threads take as they come, long ones first: memory is read in long streams, and at the end threads finish at nearly the
// same time. Each index of [0, count) once; ranges begin at multiples of `unit` and are not longer than `most` (but as long as `unit`).
class Ranges {
  public:
    Ranges(std::size_t count, std::size_t unit, std::size_t threads, std::size_t most = SIZE_MAX)
        : count_(count), unit_(unit), most_(most < unit ? unit : most / unit * unit), parts_(2 * threads) {}

    // False when nothing is left.
    bool take(std::size_t &begin, std::size_t &end) {
        begin = next_.load(std::memory_order_relaxed);
        do {
            if (begin >= count_) return false;
            const std::size_t share = ((count_ - begin) / parts_ + unit_ - 1) / unit_ * unit_;
            end = begin + std::min(most_, std::max(share, unit_));
            if (end > count_) end = count_;
        } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

  private:
    const std::size_t count_, unit_, most_, parts_;
    std::atomic<std::size_t> next_{0};
};

} // namespace fewbit
