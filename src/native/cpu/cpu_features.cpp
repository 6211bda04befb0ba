#include "cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fewbit {
namespace {

#if defined(__x86_64__)

// Asked of the CPU itself: compilers have learned the name only lately.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

CpuFeatures detect() {
    CpuFeatures found;
    found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    found.avx_vnni = found.avx2 && has_avx_vnni();
    found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq");
    found.avx512_vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)

// As in <asm/hwcap.h>, whose older versions lack the second.
constexpr unsigned long kDotProd = 1ul << 20; // HWCAP_ASIMDDP
constexpr unsigned long kI8mm = 1ul << 13;    // HWCAP2_I8MM

CpuFeatures detect() {
    CpuFeatures found;
    found.dotprod = (getauxval(AT_HWCAP) & kDotProd) != 0;
    found.i8mm = found.dotprod && (getauxval(AT_HWCAP2) & kI8mm) != 0;
    return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool says_yes(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

CpuFeatures detect() {
    CpuFeatures found;
    found.dotprod = says_yes("hw.optional.arm.FEAT_DotProd");
    found.i8mm = found.dotprod && says_yes("hw.optional.arm.FEAT_I8MM");
    return found;
}

#else

CpuFeatures detect() { return {}; }

#endif

} // namespace

const CpuFeatures &cpu_features() {
    static const CpuFeatures found = detect();
    return found;
}

} // namespace fewbit
