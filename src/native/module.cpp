// The Python face of fewbit's native code; its types are written down in src/fewbit/_native.pyi.

#include "read_bandwidth.hpp"

#include <nanobind/nanobind.h>

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_native, m) {
    m.doc() = "Native code of fewbit: the memory bandwidth probe.";
    m.def("instruction_set", &fewbit::instruction_set,
          "The widest read loop that this CPU runs: \"avx512\", \"avx2\" or \"portable\".");
    m.def("read_bandwidth", &fewbit::read_bandwidth, "bytes"_a, "threads"_a, "seconds"_a = 1.0, nb::call_guard<nb::gil_scoped_release>(),
          "DRAM read bandwidth in 1e9 bytes per second, the best pass over a buffer of `bytes` with `threads` threads.");
}
