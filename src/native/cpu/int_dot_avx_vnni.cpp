// int_dot.hpp for AVX-VNNI: dpbusd in the encoding of CPUs without AVX-512 (Alder Lake and later).
#define FEWBIT_NAME "avx-vnni"
#define FEWBIT_KERNELS int_kernels_avx_vnni
#define FEWBIT_DPBUSD _mm256_dpbusd_avx_epi32
#include "int_dot_256.inc"
