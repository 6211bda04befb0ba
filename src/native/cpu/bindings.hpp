#pragma once

#include <nanobind/nanobind.h>

namespace fewbit {

// The CPU kernels in Python: threads, Linear, and what makes one.
void bind_cpu(nanobind::module_ &m);
void bind_rows(nanobind::module_ &m);

} // namespace fewbit
