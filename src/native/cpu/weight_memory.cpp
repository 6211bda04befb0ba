#include "weight_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fewbit {
namespace {

constexpr std::size_t kLine = 64;

std::size_t rounded_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

#if defined(__linux__)

constexpr std::size_t kPage = std::size_t(2) << 20;
constexpr std::size_t kReserved = std::size_t(256) << 20; // of addresses at a time: what no weight fits into at the end is less than 1 %

class Reservation {
  public:
    explicit Reservation(std::size_t bytes) : bytes_(rounded_up(bytes, kPage)), mapped_(bytes_ + kPage) {
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
        first_ = reinterpret_cast<char *>(rounded_up(reinterpret_cast<std::uintptr_t>(memory_), kPage));
        (void)madvise(first_, bytes_, MADV_HUGEPAGE); // refused, the pages are small ones
    }
    ~Reservation() { munmap(memory_, mapped_); }
    Reservation(const Reservation &) = delete;
    Reservation &operator=(const Reservation &) = delete;

    // Null: no room.
    char *take(std::size_t bytes) {
        if (bytes > bytes_ - used_) return nullptr;
        char *taken = first_ + used_;
        used_ += rounded_up(bytes, kLine);
        return taken;
    }

    // The whole pages of a part that nobody uses any more go back at once; the rest goes with the reservation.
    static void drop(void *part, std::size_t bytes) {
        const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(part), begin = rounded_up(from, kPage), end = (from + bytes) / kPage * kPage;
        if (begin < end) (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_DONTNEED);
    }

  private:
    const std::size_t bytes_, mapped_;
    std::size_t used_ = 0;
    void *memory_;
    char *first_;
};

#endif

} // namespace

std::shared_ptr<void> weight_memory(std::size_t bytes) {
#if defined(__linux__)
    static std::mutex &mutex = *new std::mutex;
    static std::weak_ptr<Reservation> &current = *new std::weak_ptr<Reservation>; // it lives as long as a weight in it
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Reservation> reservation = current.lock();
    char *taken = reservation == nullptr ? nullptr : reservation->take(bytes);
    if (taken == nullptr) {
        reservation = std::make_shared<Reservation>(std::max(bytes, kReserved));
        taken = reservation->take(bytes);
        current = reservation;
    }
    return {taken, [reservation, bytes](void *part) { Reservation::drop(part, bytes); }};
#else
    void *memory = std::aligned_alloc(kLine, rounded_up(std::max(bytes, kLine), kLine));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return {memory, [](void *part) { std::free(part); }};
#endif
}

} // namespace fewbit
