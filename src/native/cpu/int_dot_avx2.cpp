// int_dot.hpp for AVX2 without dot product instructions.
#define FEWBIT_NAME "avx2"
#define FEWBIT_KERNELS int_kernels_avx2
#include "int_dot_256.inc"
