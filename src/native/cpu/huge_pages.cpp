#include "huge_pages.hpp"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1, not in older headers
#endif
#endif

namespace fewbit {

void use_huge_pages(const void *data, std::size_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = std::uintptr_t(2) << 20;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin >= end) return;
    // Refused by older kernels and for mapped files; nothing depends on it.
    (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_COLLAPSE);
#else
    (void)data, (void)bytes;
#endif
}

} // namespace fewbit
