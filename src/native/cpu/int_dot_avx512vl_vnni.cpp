// int_dot.hpp for AVX-512 VL with VNNI at 256 bits. The wider kernels are always preferred; this is the code of AVX-VNNI in the encoding that
// servers have, so that its tests run on them.
#define FEWBIT_NAME "avx512vl-vnni"
#define FEWBIT_KERNELS int_kernels_avx512vl_vnni
#define FEWBIT_DPBUSD _mm256_dpbusd_epi32
#include "int_dot_256.inc"
