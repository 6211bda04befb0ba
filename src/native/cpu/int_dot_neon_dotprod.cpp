// int_dot.hpp for NEON with dot products of bytes (Armv8.2 FEAT_DotProd: Neoverse N1, Cortex-A76, Jetson Orin, Apple M1).
#define FEWBIT_NAME "neon-dotprod"
#define FEWBIT_KERNELS int_kernels_neon_dotprod
#include "int_dot_neon.inc"
