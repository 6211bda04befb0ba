// int_dot.hpp for NEON without dot product instructions (Armv8.0).
#define FEWBIT_NAME "neon"
#define FEWBIT_KERNELS int_kernels_neon
#include "int_dot_neon.inc"
