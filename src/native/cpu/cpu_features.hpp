// What the CPU can run, asked once. One field for each set of instructions that a file of kernels is compiled for: a kernel may be called
// only where its field is true.

#pragma once

namespace fewbit {

struct CpuFeatures {
    bool avx2 = false;        // with FMA and F16C, as every such CPU has
    bool avx_vnni = false;    // AVX2 and dot products of bytes in its encoding (Alder Lake and later)
    bool avx512 = false;      // F, BW, VL, DQ
    bool avx512_vnni = false; // those and VNNI
    bool dotprod = false;     // Armv8.2: dot products of bytes (SDOT). Every 64-bit Arm CPU has NEON.
    bool i8mm = false;        // Armv8.6: products of 2 x 8 by 8 x 2 bytes (SMMLA); only with dotprod
};

const CpuFeatures &cpu_features();

} // namespace fewbit
