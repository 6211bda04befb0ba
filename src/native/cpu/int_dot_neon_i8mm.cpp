// int_dot.hpp for NEON with products of matrices of bytes (Armv8.6 FEAT_I8MM: Neoverse V1, N2 and V2, Apple M2).
#define FEWBIT_NAME "neon-i8mm"
#define FEWBIT_KERNELS int_kernels_neon_i8mm
#include "int_dot_neon.inc"
